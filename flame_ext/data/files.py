"""Local files of documents. Parquet and Arrow are read by the datasets library, JSON lines here: an error names file and line."""

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from datasets import Dataset, DownloadConfig, Features, IterableDataset, load_dataset
from torchtitan.tools.logging import logger

from flame_ext.config.sections import DataSource
from flame_ext.data.documents import Documents, IndexedDocuments, Tokens
from flame_ext.data.rows import LEARNED, TOKENS_FIELD, RowError, checked, unpadded, used_columns
from flame_ext.data.tokenizer import require_in_vocabulary
from flame_ext.errors import ConfigError
from flame_ext.object_stores import filesystem, is_url, mark_of, opened, patiently

ENDINGS = {
    "json": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    "text": (".txt",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "tokens": (".npy",),
}


def open_local(source: DataSource, vocab_size: int) -> tuple[Dataset | IterableDataset, list[str]]:
    """Open the files of a source. Also returns their names. ConfigError if there are none, several kinds or flat tokens."""
    files = local_files(source.path, *ENDINGS)
    counts = {kind: sum(file.endswith(endings) for file in files) for kind, endings in ENDINGS.items()}
    kind, *others = (kind for kind, count in counts.items() if count)
    if others:
        words = ", ".join(f"{count} of {kind}" for kind, count in counts.items() if count)
        raise ConfigError(f"{source.path}: files of several kinds ({words}); name those that are meant with a glob")
    if kind == "tokens":
        raise ConfigError(f"{source.path}: flat files of tokens; name them with a glob that ends in .npy")
    return load_files(source, kind, files, vocab_size), files


def local_files(path: str, *kinds: str) -> list[str]:
    """Returns the sorted files of some ``ENDINGS`` at a path: a file, a folder or a glob; ConfigError if there are none.

    Links are followed. Hidden files and folders below a folder or a wildcard are passed over, as a shell does. Of a URL they are URLs.
    """
    wanted = tuple(chain.from_iterable(ENDINGS[kind] for kind in kinds))
    if is_url(path):
        return _stored_files(path, wanted)
    # Path.glob follows no links to folders, and takes hidden ones.
    pattern = str(Path(glob.escape(path), "**", "*")) if Path(path).is_dir() else path
    found = [path] if Path(path).is_file() else glob.glob(pattern, recursive=True)  # noqa: PTH207
    named = len([*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)])
    files = [file for file in found if file.endswith(wanted) and not Path(file).is_dir()]
    files = sorted(file for file in files if not _in_a_loop(file, named))
    if not files:
        endings = ", ".join(chain.from_iterable(ENDINGS.values()))
        hub = f"; a dataset on the Hub is hf://{path}" if path.count("/") == 1 else ""
        raise ConfigError(f"{path!r}: no file matches; files of documents end in {endings}{hub}")
    if absent := [file for file in files if not Path(file).is_file()]:
        raise ConfigError(f"{absent[0]}: a link to {os.path.realpath(absent[0])}, where no file is; mend or remove it")
    return files


def _stored_files(url: str, wanted: tuple[str, ...]) -> list[str]:
    """As :func:`local_files`, in an object store."""
    store, root = filesystem(url, ConfigError)
    is_glob = glob.has_magic(root)
    found = patiently(url, lambda: store.glob(root) if is_glob else store.find(root), ConfigError)
    named = root.rstrip("/").count("/") + 1 if not is_glob else root[: re.search(r"[*?[]", root).start()].count("/")  # type: ignore[union-attr]
    hidden = (any(part.startswith(".") for part in name.split("/")[named:]) for name in found)
    files = sorted(name for name, skip in zip(found, hidden, strict=True) if name.endswith(wanted) and not skip)
    if not files:
        endings = ", ".join(chain.from_iterable(ENDINGS.values()))
        raise ConfigError(f"{url}: no object matches; files of documents end in {endings}")
    return [store.unstrip_protocol(name) for name in files]


def size_and_mark(file: str) -> tuple[int, int | str]:
    """Return the size of a file or an object in bytes, and what changes with its content."""
    if not is_url(file):
        stat = Path(file).stat()
        return stat.st_size, stat.st_mtime_ns
    store, name = filesystem(file, ConfigError)
    info = patiently(file, lambda: store.info(name), ConfigError)
    return info["size"], mark_of(info)


def sizes_and_marks(files: list[str]) -> list[tuple[int, int | str]]:
    """Return :func:`size_and_mark` of each; stores are asked for several at a time, since a source may have thousands."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(size_and_mark, files))


def _in_a_loop(file: str, named: int) -> bool:
    """Whether a folder in the path of a file, beyond the first ``named`` parts, is a link to a folder that it lies in."""
    links = [folder for folder in Path(file).parents if len(folder.parts) > named and folder.is_symlink()]
    return any(folder.parent.resolve().is_relative_to(folder.resolve()) for folder in links)


def load_files(source: DataSource, kind: str, files: list[str], vocab_size: int = 2**31) -> Dataset | IterableDataset:
    """Load files of one kind (a key of ``ENDINGS``) with the options of ``source``; tokens in JSON have to be below ``vocab_size``,
    which is at most 2**31, since the datasets library writes ``input_ids`` as int32.
    """
    if kind not in ("json", "text"):
        used = _columns(source, kind, files)
        options: dict[str, Any] = {"columns": list(used), "features": used} if kind == "parquet" else {}
        if is_url(files[0]):  # else a changed object is taken from the cache of the datasets library
            options["download_config"] = DownloadConfig(use_etag=True)
        return load_dataset(kind, data_files=files, split="train", streaming=source.streaming, **options)
    # With size and time, or a store's mark, a changed file gets another entry in the cache of the datasets library.
    stamped = [(file, *known) for file, known in zip(files, sizes_and_marks(files), strict=True)]
    arguments = {"files": stamped, "field": source.text_field, "skip": source.skip_unreadable}
    if kind == "json":
        arguments |= {"vocab_size": vocab_size, "form": _FORM_OF_ROWS}
    read = _read_text_files if kind == "text" else _read_json_rows
    return (IterableDataset if source.streaming else Dataset).from_generator(read, gen_kwargs=arguments)


def _columns(source: DataSource, kind: str, files: list[str]) -> Features:
    """The columns of Parquet or Arrow that are used, which all files have to have; they may differ in the others."""
    used: dict[str, pyarrow.Field] = {}
    with ThreadPoolExecutor(16) as pool:  # a source may have thousands of files
        for file, schema in zip(files, pool.map(partial(_schema, kind), files), strict=True):
            names = used_columns(source.path, tuple(schema.names), source.text_field)
            if not names or (used and names[0] not in used):
                needed = f"{next(iter(used))!r}, as {files[0]} has" if used else repr(source.text_field)
                raise ConfigError(f"{file}: no column {needed}, but {', '.join(sorted(schema.names))}")
            if used and set(names) != set(used):
                raise ConfigError(
                    f"{file}: columns {names}, and {files[0]} has {list(used)}; name one of both with a glob"
                )
            # A file may have nothing but null in a column.
            used |= {n: schema.field(n) for n in names if n not in used or pyarrow.types.is_null(used[n].type)}
    return Features.from_arrow_schema(pyarrow.schema(list(used.values())))


def _schema(kind: str, file: str) -> pyarrow.Schema:
    try:
        if kind == "parquet":
            with opened(file, ConfigError) as stream:
                return pyarrow.parquet.read_schema(stream)
        with opened(file, ConfigError) if is_url(file) else pyarrow.memory_map(file) as stream:
            try:
                return pyarrow.ipc.open_stream(stream).schema
            except pyarrow.ArrowInvalid:
                return pyarrow.ipc.open_file(stream).schema
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file}: {str(e).splitlines()[0]}; copy it again") from e


def _read_text_files(files: list[tuple[str, int, int | str]], field: str, skip: bool) -> Iterator[dict[str, Any]]:
    for file, *_ in files:
        try:
            with opened(file, ConfigError) as stream:
                yield {field: io.TextIOWrapper(stream, encoding="utf-8").read()}
        except UnicodeDecodeError as e:
            if not skip:
                raise ConfigError(f"{file}: not UTF-8 (byte {e.start}); mend it, or set skip_unreadable") from e
            logger.warning(f"{file}: skipped, since it is not UTF-8 (byte {e.start})")


_FORM_OF_ROWS = 2  # of _read_json_rows, so that the cache of the datasets library has no rows of another form


def _read_json_rows(
    files: list[tuple[str, int, int | str]], field: str, skip: bool, vocab_size: int, form: int
) -> Iterator[dict[str, Any]]:
    fields: tuple[str, ...] = (field, TOKENS_FIELD)
    for file, *_ in files:
        number, skipped = 0, 0
        with _opened(file) as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    try:
                        row = _json_row(file, line, fields, vocab_size)
                        fields = (next(iter(row)),)  # the one in the first row, since a dataset has it in every row
                        yield row
                    except RowError as e:
                        if not skip:
                            raise ConfigError(f"{file}, line {number}: {e}; mend it, or set skip_unreadable") from e
                        skipped += 1
                    except ConfigError as e:
                        raise ConfigError(f"{file}, line {number}: {e}") from e
            except (OSError, EOFError, zlib.error) as e:
                message = f"{file}, after line {number}: cannot be read on ({e}); the file is cut off or damaged"
                raise ConfigError(message) from e
        if skipped:
            logger.warning(f"{file}: skipped {skipped} unreadable lines")


def _json_row(file: str, line: bytes, fields: tuple[str, ...], vocab_size: int) -> dict[str, Any]:
    """The text or tokens in the first of the fields that a line has; beside ``input_ids``, always, which are learned.

    Raises RowError without any of them, ConfigError for masks and ids that cannot be right.
    """
    try:
        row = json.loads(line)
        field = next((name for name in fields if name in row), fields[0])
        value = row[field]
    except KeyError as e:
        raise RowError(f"no field {fields[0]!r} (text_field), which has {', '.join(sorted(row))}") from e
    except (ValueError, TypeError, RecursionError) as e:
        raise RowError(f"not JSON with a field {fields[0]!r} ({e})") from e
    if len(fields) > 1:  # the first row
        used_columns(file, tuple(row), field)
    tokens, learned = unpadded(row) if field == TOKENS_FIELD else (value, None)
    if isinstance(value := checked(tokens), str):
        return {field: value}
    found = {field: require_in_vocabulary(value, vocab_size).astype(np.int64)}
    if field == TOKENS_FIELD:
        found[LEARNED[0]] = (np.ones(len(value), bool) if learned is None else learned).astype(np.int8)
    return found


def _opened(file: str) -> Any:
    packed = opened(file, ConfigError) if is_url(file) else file
    if file.endswith(".zst"):
        return io.BufferedReader(pyarrow.input_stream(packed, compression="zstd"), 2**20)
    return gzip.open(packed, "rb") if file.endswith(".gz") else opened(file, ConfigError)


def flat_tokens(
    source: DataSource, num_lanes: int, length: int, vocab_size: int, rng_seed: int | None, epochs: int | None
) -> Documents:
    """Open flat files of tokens as documents of ``length`` tokens; ConfigError if they are no flat arrays of ids in the vocabulary."""
    if is_url(source.path):
        raise ConfigError(
            f"{source.path}: flat files of tokens are memory-mapped; copy them to a file system, or store the documents as Parquet "
            "with a column input_ids"
        )
    files = local_files(source.path, "tokens")
    tokens = [_map_tokens(Path(file), source.tokens_dtype, vocab_size) for file in files]
    first = np.cumsum([0, *(-(-len(of_file) // length) for of_file in tokens)])
    count = int(first[-1]) if source.max_samples is None else min(int(first[-1]), source.max_samples)
    if count == 0:
        raise ConfigError(f"{source.path}: no tokens in it")

    def read(index: int) -> Tokens:
        number = int(np.searchsorted(first, index, side="right")) - 1
        begin = (index - int(first[number])) * length
        try:
            return require_in_vocabulary(tokens[number][begin : begin + length].astype(np.int64), vocab_size)
        except ConfigError as e:
            raise ConfigError(f"{files[number]}: {e}") from e

    for begin, end in pairwise(first.tolist()):
        for index in spread(end - begin):
            read(begin + index)
    return IndexedDocuments(source.path, count, read, num_lanes, rng_seed, epochs)


def _map_tokens(file: Path, dtype: str | None, vocab_size: int) -> Any:
    """Memory-map a flat file of tokens, with NumPy's header or, like OLMo's, without; ConfigError if ``dtype`` cannot be right."""
    with file.open("rb") as stream:
        has_header = stream.read(6) == b"\x93NUMPY"
    if has_header:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ConfigError(f"{file}: expected a flat array of integers, found {tokens.dtype} {tokens.shape}")
        return tokens
    if file.stat().st_size == 0:
        return np.empty(0, np.int64)
    if dtype is None:
        raise ConfigError(
            f"{file}: without NumPy's header; set tokens_dtype to the type that it was written with (uint16, uint32, int32, int64)"
        )
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise ConfigError(
            f"{file}: {dtype} (tokens_dtype) cannot hold the ids of the model's vocabulary of {vocab_size}"
        )
    if file.stat().st_size % np.dtype(dtype).itemsize:
        raise ConfigError(f"{file}: its size is no multiple of {dtype} (tokens_dtype)")
    tokens = np.memmap(file, dtype=dtype, mode="r")
    first = np.asarray(tokens[: 2**16 // 4 * 4])
    if len(first) > 8 and first.any() and not (first[::2].any() and first[1::2].any()):
        raise ConfigError(
            f"{file}: read as {dtype} (tokens_dtype), every second number is 0: it was written with a wider type"
        )
    largest = first.max(initial=0)
    if largest >= vocab_size or first.min(initial=0) < 0:
        raise ConfigError(
            f"{file}: read as {dtype} (tokens_dtype), it has the token id {largest}, which is not in the model's vocabulary of "
            f"{vocab_size}: it was written with a narrower type, or another tokenizer made it"
        )
    return tokens


def spread(count: int) -> list[int]:
    """Returns at most 32 evenly spaced numbers from 0 to ``count - 1``: the documents that are checked before step 1."""
    return np.linspace(0, count - 1, min(count, 32)).astype(int).tolist()
