"""What ``[data].sources`` and ``training.dataset`` name, opened: files, Hub datasets and registered ones as :class:`Documents`.

All of it is read by the datasets library, in constant memory: files become Arrow files in its cache, which are mapped, or are
streamed. JSON lines alone are read here, for an error to name file and line.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.arrow_writer import SchemaInferenceError
from datasets.exceptions import DatasetsError
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.tools.logging import logger

from flame_ext.config.sections import DataSource
from flame_ext.data.documents import Documents, IndexedDocuments, StreamedDocuments, Tokens
from flame_ext.data.python_stdlib import Split, read_stdlib
from flame_ext.data.tokenizer import around_a_document
from flame_ext.errors import ConfigError

TOKENS_FIELD = "input_ids"
_ENDINGS = {
    "json": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    "text": (".txt",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "tokens": (".npy",),
}
LOOKED_AT = 32  # documents, before step 1
LOCAL_FORMATS = ("text", "json", "parquet")
"""Names in the host's registry that stand for local files (``training.dataset_path``)."""


class OpenedData(NamedTuple):
    """A source before it is tokenised."""

    data: Dataset | IterableDataset
    text_of: Callable[[dict[str, Any]], Any]
    """A sample to its text, or to its tokens."""
    nbytes: int | None = None
    """Of the files, where these are local."""


def register_local_sources() -> None:
    """Add ``text``, ``json``, ``parquet`` (with ``training.dataset_path`` a file, glob or folder) and ``python_stdlib``."""
    for name in LOCAL_FORMATS:
        DATASETS.setdefault(name, DatasetConfig("", partial(load_local, name), text_of))
    splits: dict[str, Split] = {"python_stdlib": "train", "python_stdlib_validation": "validation"}
    for name, split in splits.items():
        DATASETS.setdefault(name, DatasetConfig("", partial(_load_stdlib, split), text_of))


def load_local(kind: str, path: str) -> Dataset:
    """Local files as the host's validator wants them.

    Raises:
        ConfigError: no file matches.
    """
    if not path:
        raise ConfigError(f"training.dataset = {kind!r} needs training.dataset_path: a file, a glob or a folder")
    data = _load_files(DataSource(path=path), kind, local_files(path, kind))
    assert isinstance(data, Dataset)
    return data


def sources_of(config: JobConfig) -> list[tuple[str, DataSource]]:
    """Each source of a job and the name of the option that says so."""
    data, training = config.data, config.training
    if data.sources:
        return [(f"data.sources[{i}]", source) for i, source in enumerate(data.sources)]
    name = training.dataset.lower()
    path = training.dataset_path if name in LOCAL_FORMATS else name
    if name in LOCAL_FORMATS and not path:
        raise ConfigError(f"training.dataset = {name!r} needs training.dataset_path: a file, a glob or a folder")
    if name not in DATASETS:
        raise ConfigError(
            f"training.dataset {training.dataset!r} is unknown; known: {', '.join(sorted(DATASETS))}; or list data.sources"
        )
    return [("training.dataset", DataSource(path=path or "", text_field=data.text_field))]


def open_documents(
    where: str,
    source: DataSource,
    tokenizer: BaseTokenizer,
    *,
    num_lanes: int,
    seq_len: int,
    vocab_size: int,
    rng_seed: int | None,
    epochs: int | None,
    registered_path: str | None = None,
) -> Documents:
    """Open a source and look at its first document, or at some throughout where there is random access.

    Args:
        where: the option, for messages.
        source: what is asked for.
        tokenizer: of the model.
        num_lanes: that share its documents.
        seq_len: T; flat files of tokens are dealt in pieces of T + 1.
        vocab_size: of the model; an id beyond it is an error.
        rng_seed: determines the order; None = as they come.
        epochs: after which it ends; None = never.
        registered_path: another path for a dataset of the host's registry.

    Raises:
        ConfigError: naming the option, what was found and what was expected.
    """
    try:
        if source.path.endswith(_ENDINGS["tokens"]):
            return _flat_tokens(source, num_lanes, seq_len + 1, vocab_size, rng_seed, epochs)
        data, text_of_sample, nbytes = _open(source, registered_path)
        if source.max_samples is not None:
            data = _first(data, source.max_samples)
        encode = _Encoder(source.path, tokenizer, text_of_sample, vocab_size)
        row = _row_reader(data, text_of_sample) if isinstance(data, Dataset) else None
        samples = list(data.take(1)) if row is None else [row(i) for i in _spread(len(data))]
        if not samples:
            raise ConfigError(f"{source.path}: no documents in it")
        for sample in samples:
            encode.value_of(sample)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from e
    except (OSError, ValueError, DatasetsError) as e:
        # Absent, gated, out of reach, malformed: the libraries' words say which.
        cause = _innermost(e)
        if isinstance(cause, SchemaInferenceError):
            raise ConfigError(f"{where}: {source.path}: no documents in it") from e
        message = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        named = message if isinstance(cause, ConfigError) else f"{source.path}: {message}"
        raise ConfigError(f"{where}: {named}") from e
    if row is not None:
        return IndexedDocuments(source.path, len(data), lambda index: encode(row(index)), num_lanes, rng_seed, epochs)
    return StreamedDocuments(source.path, data, encode, num_lanes, rng_seed, epochs, nbytes)


def _flat_tokens(
    source: DataSource, num_lanes: int, length: int, vocab_size: int, rng_seed: int | None, epochs: int | None
) -> Documents:
    """Pieces of ``length`` tokens as documents."""
    files = [_TokenFile(Path(f), source.tokens_dtype, length, vocab_size) for f in local_files(source.path, "tokens")]
    first = np.cumsum([0, *(file.pieces for file in files)])
    count = int(first[-1]) if source.max_samples is None else min(int(first[-1]), source.max_samples)
    if count == 0:
        raise ConfigError(f"{source.path}: no tokens in it")
    for file in files:
        for piece in _spread(file.pieces):
            file.read(piece)

    def read(index: int) -> Tokens:
        number = int(np.searchsorted(first, index, side="right")) - 1
        return files[number].read(index - int(first[number]))

    return IndexedDocuments(source.path, count, read, num_lanes, rng_seed, epochs)


class _Encoder:
    """A sample to its tokens: text by the tokenizer, between BOS (if it has one) and EOS; ids as they are."""

    def __init__(
        self, name: str, tokenizer: BaseTokenizer, text_of: Callable[[dict[str, Any]], Any], vocab_size: int
    ) -> None:
        self._name, self._tokenizer, self._text_of = name, tokenizer, text_of
        self._vocab_size = vocab_size
        self._before, self._after = around_a_document(tokenizer)

    def __call__(self, sample: dict[str, Any]) -> Tokens:
        value = self.value_of(sample)
        return np.asarray(self._encode(value), dtype=np.int64) if isinstance(value, str) else value

    def value_of(self, sample: dict[str, Any]) -> str | Tokens:
        """Its text or its tokens.

        Raises:
            ConfigError: it has neither, or tokens beyond the model's vocabulary.
        """
        value = self._text_of(sample)
        if isinstance(value, str):
            return value
        try:
            tokens = np.asarray(value)
        except ValueError:  # lists of several lengths
            tokens = np.empty((0, 0))
        if tokens.ndim != 1 or not (tokens.dtype.kind in "iu" or len(tokens) == 0):
            raise ConfigError(f"{self._name}: a sample is neither text nor a list of token ids: {value!r:.80}")
        return require_in_vocabulary(tokens.astype(np.int64, copy=False), self._vocab_size, f"{self._name}")

    def _encode(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            return tokenizer.encode(text, add_bos=True, add_eos=True)
        # As its encode() does, without working out where in the text each token lies.
        ids: list[int] = tokenizer.tokenizer.encode_batch_fast([text])[0].ids
        return [*self._before, *ids, *self._after]


def require_in_vocabulary(tokens: Tokens, vocab_size: int, where: str) -> Tokens:
    """The tokens.

    Raises:
        ConfigError: an id is beyond the model's vocabulary.
    """
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        wrong = int(tokens.max()) if tokens.max() >= vocab_size else int(tokens.min())
        raise ConfigError(
            f"{where}: token id {wrong} is not in the model's vocabulary of {vocab_size}: another tokenizer made it"
        )
    return tokens


class _TokenFile:
    """A flat file of tokens, mapped: with NumPy's header, or without, as OLMo's are."""

    def __init__(self, file: Path, dtype: str, length: int, vocab_size: int) -> None:
        with file.open("rb") as stream:
            header = stream.read(6) == b"\x93NUMPY"
        if header:
            self._tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        elif file.stat().st_size % np.dtype(dtype).itemsize:
            raise ConfigError(f"{file}: its size is no multiple of {dtype} (tokens_dtype)")
        else:
            self._tokens = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
        if self._tokens.ndim != 1 or self._tokens.dtype.kind not in "iu":
            raise ConfigError(
                f"{file}: expected a flat array of integers, found {self._tokens.dtype} {self._tokens.shape}"
            )
        self._file, self._length, self._vocab_size = file, length, vocab_size
        self.pieces = -(-len(self._tokens) // length)

    def read(self, piece: int) -> Tokens:
        tokens = self._tokens[piece * self._length : (piece + 1) * self._length].astype(np.int64)
        return require_in_vocabulary(tokens, self._vocab_size, str(self._file))


def _open(source: DataSource, registered_path: str | None) -> OpenedData:
    registered = None if source.path in LOCAL_FORMATS else DATASETS.get(source.path.lower())
    if registered is not None and not Path(source.path).exists():
        data = registered.loader(registered_path or registered.path)
        if registered.sample_processor is text_of:
            return OpenedData(data, partial(text_of, text_field=source.text_field))
        return OpenedData(data, registered.sample_processor)
    data, nbytes = _open_unregistered(source)
    field = next((name for name in (source.text_field, TOKENS_FIELD) if name in (data.column_names or ())), None)
    if field is not None:
        data = data.select_columns([field])
    return OpenedData(data, partial(text_of, text_field=source.text_field, where=source.path), nbytes)


def _open_unregistered(source: DataSource) -> tuple[Dataset | IterableDataset, int | None]:
    """With the bytes of its files, where these are local."""
    place = Path(source.path)
    if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        data = load_from_disk(source.path)
        if isinstance(data, datasets.DatasetDict):
            if source.split not in data:
                raise ConfigError(f"{source.path}: no split {source.split!r}, which has {', '.join(data)}")
            data = data[source.split]
        return (data.to_iterable_dataset() if source.streaming else data), None
    if place.exists() or place.is_absolute() or any(c in source.path for c in "*?["):
        found = {kind: files for kind in _ENDINGS if (files := local_files(source.path, kind, strict=False))}
        if len(found) > 1:
            kinds = ", ".join(f"{len(files)} of {kind}" for kind, files in found.items())
            raise ConfigError(f"{source.path}: files of several kinds ({kinds}); name those that are meant with a glob")
        if not found:
            local_files(source.path, "json")  # raises
        ((kind, files),) = found.items()
        if kind == "tokens":
            raise ConfigError(f"{source.path}: flat files of tokens; name them with a glob that ends in .npy")
        return _load_files(source, kind, files), sum(Path(file).stat().st_size for file in files)
    options = {"name": source.name or None, "data_files": source.data_files or None}
    return load_dataset(source.path, split=source.split, streaming=source.streaming, **options), None


def local_files(path: str, kind: str, strict: bool = True) -> list[str]:
    """The files of a kind (a key of ``_ENDINGS``) at a path: itself, those of a folder, or those of a glob. Sorted.

    Raises:
        ConfigError: there are none, and ``strict``.
    """
    place = Path(path)
    if place.is_dir():
        files = [str(p) for p in place.rglob("*") if p.name.endswith(_ENDINGS[kind])]
    elif place.is_file():
        files = [path] if path.endswith(_ENDINGS[kind]) else []
    else:
        found = Path(place.anchor or ".").glob(str(place.relative_to(place.anchor)))
        files = [str(p) for p in found if p.name.endswith(_ENDINGS[kind])]
    if not files and strict:
        endings = ", ".join(ending for endings in _ENDINGS.values() for ending in endings)
        raise ConfigError(f"{path!r}: no file matches; files of documents end in {endings}")
    return sorted(files)


def _load_files(source: DataSource, kind: str, files: list[str]) -> Dataset | IterableDataset:
    field = source.text_field
    if kind in ("json", "text"):
        # Size and time make another cache entry of a file that has changed.
        stats = [Path(file).stat() for file in files]
        stamped = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]
        read = _read_texts if kind == "text" else _read_json_lines
        arguments = {"files": stamped, "field": field, "skip": source.skip_unreadable}
        if source.streaming:
            return IterableDataset.from_generator(read, gen_kwargs=arguments)
        return Dataset.from_generator(read, gen_kwargs=arguments)
    return load_dataset(kind, data_files=files, split="train", streaming=source.streaming)


def _read_texts(files: list[tuple[str, int, int]], field: str, skip: bool) -> Iterator[dict[str, Any]]:
    for file, *_ in files:
        try:
            yield {field: Path(file).read_text(encoding="utf-8", errors="replace" if skip else "strict")}
        except UnicodeDecodeError as e:
            raise ConfigError(f"{file}: not UTF-8 (byte {e.start})") from e


def _read_json_lines(files: list[tuple[str, int, int]], field: str, skip: bool) -> Iterator[dict[str, Any]]:
    for file, *_ in files:
        skipped = 0
        with _opened(file) as lines:
            for number, line in enumerate(_whole(file, lines), start=1):
                if not line.strip():
                    continue
                try:
                    sample = json.loads(line)
                    found = field if field in sample or TOKENS_FIELD not in sample else TOKENS_FIELD
                    yield {found: sample[found]}
                except (ValueError, KeyError, TypeError) as e:
                    if not skip:
                        raise ConfigError(f"{file}, line {number}: {_what(e, line, field)}") from e
                    skipped += 1
        if skipped:
            logger.warning(f"{file}: skipped {skipped} unreadable lines")


def _whole(file: str, lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, to the end of the file.

    Raises:
        ConfigError: its compression ends before.
    """
    number = 0
    try:
        for number, line in enumerate(lines, start=1):  # noqa: B007
            yield line
    except (OSError, EOFError, zlib.error) as e:
        raise ConfigError(
            f"{file}, after line {number}: can not be read on ({e}); the file is cut off or damaged"
        ) from e


def _what(error: Exception, line: bytes, field: str) -> str:
    remedy = "; mend it, or set skip_unreadable"
    if not isinstance(error, KeyError):
        return f"not JSON with a field {field!r} ({error}){remedy}"
    return f"no field {field!r} (text_field), which has {', '.join(sorted(json.loads(line)))}{remedy}"


def _opened(file: str) -> Any:
    if file.endswith(".zst"):
        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), 2**20)
    return gzip.open(file, "rb") if file.endswith(".gz") else Path(file).open("rb")


def _spread(count: int) -> list[int]:
    """At most ``LOOKED_AT`` numbers below ``count``, from the first to the last."""
    return np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int).tolist()


def _row_reader(data: Dataset, text_of_sample: Callable[[dict[str, Any]], Any]) -> Callable[[int], dict[str, Any]]:
    """Number of a row to its sample, tokens as an array: several times as fast as the library's way over Python's lists."""
    if not (isinstance(text_of_sample, partial) and text_of_sample.func is text_of):
        return data.__getitem__  # a registered dataset's own function, which expects what the library gives
    rows = data.with_format("arrow")

    def row(index: int) -> dict[str, Any]:
        table = rows[index]
        return {name: _value(table.column(name)[0]) for name in table.column_names}

    return row


def _value(scalar: pyarrow.Scalar) -> Any:
    if isinstance(scalar, pyarrow.ListScalar) and scalar.is_valid:
        return scalar.values.to_numpy(zero_copy_only=False)
    return scalar.as_py()


def _first(data: Dataset | IterableDataset, count: int) -> Dataset:
    if isinstance(data, Dataset):
        return data.select(range(min(count, len(data))))
    return Dataset.from_list(list(itertools.islice(data, count)))


def _innermost(error: BaseException) -> BaseException:
    """The error of the library that knows."""
    while error.__cause__ is not None and not isinstance(error, ConfigError):
        error = error.__cause__
    return error


def text_of(sample: dict[str, Any], text_field: str = "text", where: str = "data.text_field") -> Any:
    """The text of a sample, or its tokens: ``input_ids``, if there is no such field.

    Raises:
        ConfigError: neither is there, with the fields that are.
    """
    for field in (text_field, TOKENS_FIELD):
        if field in sample:
            return sample[field]
    raise ConfigError(f"{where}: {text_field!r} is not in the data, which has {', '.join(sorted(sample))}")


def _load_stdlib(split: Split, path: str) -> Dataset:
    return Dataset.from_dict({"text": read_stdlib(split)})
