"""Local files of documents. Parquet and Arrow are read by the datasets library, JSON lines here: an error names file and line."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, IterableDataset, load_dataset
from torchtitan.tools.logging import logger

from flame_ext.config.sections import DataSource
from flame_ext.data.documents import Documents, IndexedDocuments, Tokens
from flame_ext.data.tokenizer import require_in_vocabulary
from flame_ext.errors import ConfigError

TOKENS_FIELD = "input_ids"
ENDINGS = {
    "json": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    "text": (".txt",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "tokens": (".npy",),
}


def open_local(source: DataSource) -> tuple[Dataset | IterableDataset, int]:
    """Open the files of a source. Also returns their size in bytes. ConfigError if there are none, several kinds or flat tokens."""
    files = local_files(source.path, *ENDINGS)
    counts = {kind: sum(file.endswith(endings) for file in files) for kind, endings in ENDINGS.items()}
    kind, *others = (kind for kind, count in counts.items() if count)
    if others:
        words = ", ".join(f"{count} of {kind}" for kind, count in counts.items() if count)
        raise ConfigError(f"{source.path}: files of several kinds ({words}); name those that are meant with a glob")
    if kind == "tokens":
        raise ConfigError(f"{source.path}: flat files of tokens; name them with a glob that ends in .npy")
    return load_files(source, kind, files), sum(Path(file).stat().st_size for file in files)


def local_files(path: str, *kinds: str) -> list[str]:
    """Returns the sorted files of some ``ENDINGS`` at a path: a file, a folder or a glob; ConfigError if there are none."""
    place = Path(path)
    if place.is_file():
        found = iter([place])
    elif place.is_dir():
        found = place.rglob("*")
    else:
        found = Path(place.anchor or ".").glob(str(place.relative_to(place.anchor)))
    wanted = tuple(chain.from_iterable(ENDINGS[kind] for kind in kinds))
    if not (files := sorted(str(file) for file in found if file.name.endswith(wanted))):
        endings = ", ".join(chain.from_iterable(ENDINGS.values()))
        raise ConfigError(f"{path!r}: no file matches; files of documents end in {endings}")
    return files


def load_files(source: DataSource, kind: str, files: list[str]) -> Dataset | IterableDataset:
    """Load files of one kind (a key of ``ENDINGS``) with the options of ``source``."""
    if kind not in ("json", "text"):
        return load_dataset(kind, data_files=files, split="train", streaming=source.streaming)
    # With size and time, a changed file gets another entry in the cache of the datasets library.
    stamped = [(file, (stat := Path(file).stat()).st_size, stat.st_mtime_ns) for file in files]
    arguments = {"files": stamped, "field": source.text_field, "skip": source.skip_unreadable}
    read = _read_texts if kind == "text" else _read_json_lines
    return (IterableDataset if source.streaming else Dataset).from_generator(read, gen_kwargs=arguments)


def _read_texts(files: list[tuple[str, int, int]], field: str, skip: bool) -> Iterator[dict[str, Any]]:
    for file, *_ in files:
        try:
            yield {field: Path(file).read_text(encoding="utf-8", errors="replace" if skip else "strict")}
        except UnicodeDecodeError as e:
            raise ConfigError(f"{file}: not UTF-8 (byte {e.start})") from e


def _read_json_lines(files: list[tuple[str, int, int]], field: str, skip: bool) -> Iterator[dict[str, Any]]:
    for file, *_ in files:
        number, skipped = 0, 0
        with _opened(file) as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    try:
                        sample = json.loads(line)
                        found = field if field in sample or TOKENS_FIELD not in sample else TOKENS_FIELD
                        yield {found: sample[found]}
                    except (ValueError, KeyError, TypeError) as e:
                        if not skip:
                            reason = f"not JSON with a field {field!r} ({e})"
                            if isinstance(e, KeyError):
                                reason = f"no field {field!r} (text_field), which has {', '.join(sorted(sample))}"
                            raise ConfigError(
                                f"{file}, line {number}: {reason}; mend it, or set skip_unreadable"
                            ) from e
                        skipped += 1
            except (OSError, EOFError, zlib.error) as e:
                message = f"{file}, after line {number}: cannot be read on ({e}); the file is cut off or damaged"
                raise ConfigError(message) from e
        if skipped:
            logger.warning(f"{file}: skipped {skipped} unreadable lines")


def _opened(file: str) -> Any:
    if file.endswith(".zst"):
        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), 2**20)
    return gzip.open(file, "rb") if file.endswith(".gz") else Path(file).open("rb")


def flat_tokens(
    source: DataSource, num_lanes: int, length: int, vocab_size: int, rng_seed: int | None, epochs: int | None
) -> Documents:
    """Open flat files of tokens as documents of ``length`` tokens; ConfigError if they are no flat arrays of ids in the vocabulary."""
    files = local_files(source.path, "tokens")
    tokens = [_map_tokens(Path(file), source.tokens_dtype) for file in files]
    first = np.cumsum([0, *(-(-len(of_file) // length) for of_file in tokens)])
    count = int(first[-1]) if source.max_samples is None else min(int(first[-1]), source.max_samples)
    if count == 0:
        raise ConfigError(f"{source.path}: no tokens in it")

    def read(index: int) -> Tokens:
        number = int(np.searchsorted(first, index, side="right")) - 1
        begin = (index - int(first[number])) * length
        return require_in_vocabulary(tokens[number][begin : begin + length].astype(np.int64), vocab_size, files[number])

    for begin, end in pairwise(first.tolist()):
        for index in spread(end - begin):
            read(begin + index)
    return IndexedDocuments(source.path, count, read, num_lanes, rng_seed, epochs)


def _map_tokens(file: Path, dtype: str) -> Any:
    """Memory-map a flat file of tokens, with NumPy's header or, like OLMo's, without."""
    with file.open("rb") as stream:
        has_header = stream.read(6) == b"\x93NUMPY"
    if has_header:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ConfigError(f"{file}: expected a flat array of integers, found {tokens.dtype} {tokens.shape}")
        return tokens
    if file.stat().st_size % np.dtype(dtype).itemsize:
        raise ConfigError(f"{file}: its size is no multiple of {dtype} (tokens_dtype)")
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)


def spread(count: int) -> list[int]:
    """Returns at most 32 evenly spaced numbers from 0 to ``count - 1``: the documents that are checked before step 1."""
    return np.linspace(0, count - 1, min(count, 32)).astype(int).tolist()
