"""Opens the sources that ``data.sources`` and ``training.dataset`` name. The datasets library reads them in constant memory."""

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

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

from flame_ext.config.sections import DataSource
from flame_ext.data.documents import Documents, IndexedDocuments, StreamedDocuments, Tokens
from flame_ext.data.files import ENDINGS, TOKENS_FIELD, flat_tokens, load_files, local_files, open_local, spread
from flame_ext.data.python_stdlib import Split, read_stdlib
from flame_ext.data.tokenizer import around_a_document, require_in_vocabulary
from flame_ext.errors import ConfigError

LOCAL_FORMATS = ("text", "json", "parquet")  # names in torchtitan's registry that stand for local files
TextOf = Callable[[dict[str, Any]], Any]  # maps a sample to its text or its tokens


def register_local_sources() -> None:
    """Register ``text``, ``json``, ``parquet`` (files at ``training.dataset_path``) and ``python_stdlib`` with torchtitan."""
    for name in LOCAL_FORMATS:
        DATASETS.setdefault(name, DatasetConfig("", partial(_load_local, name), text_of))
    splits: dict[str, Split] = {"python_stdlib": "train", "python_stdlib_validation": "validation"}
    for name, split in splits.items():
        DATASETS.setdefault(name, DatasetConfig("", partial(_load_stdlib, split), text_of))


def _load_local(kind: str, path: str) -> Dataset | IterableDataset:
    return load_files(DataSource(path=path), kind, local_files(_require_path(kind, path), kind))


def _load_stdlib(split: Split, _path: str) -> Dataset:
    return Dataset.from_dict({"text": read_stdlib(split)})


def _require_path(kind: str, path: str | None, section: str = "training") -> str:
    if not path:
        raise ConfigError(f"{section}.dataset = {kind!r} needs {section}.dataset_path: a file, a glob or a folder")
    return path


def sources_of(config: JobConfig, section: str = "training") -> list[tuple[str, DataSource]]:
    """Returns each source of ``training`` or ``validation`` with the name of the option that names it."""
    of_sources = "data" if section == "training" else section
    if sources := getattr(config, of_sources).sources:
        return [(f"{of_sources}.sources[{i}]", source) for i, source in enumerate(sources)]
    options = getattr(config, section)
    name = options.dataset.lower()
    path = _require_path(name, options.dataset_path, section) if name in LOCAL_FORMATS else name
    if name not in DATASETS:
        raise ConfigError(
            f"{section}.dataset {options.dataset!r} is unknown; known: {', '.join(sorted(DATASETS))}; or list {of_sources}.sources"
        )
    return [(f"{section}.dataset", DataSource(path=path, text_field=config.data.text_field))]


def open_documents(
    where: str,
    source: DataSource,
    *,
    tokenizer: BaseTokenizer,
    num_lanes: int,
    seq_len: int,
    vocab_size: int,
    rng_seed: int | None,
    epochs: int | None,
    registered_path: str | None = None,
) -> Documents:
    """Open a source and check its first document, or up to 32 documents throughout it where there is random access.

    ``where`` is the option that names the source, for messages. Flat files of tokens are cut into documents of ``seq_len + 1``.
    Without ``rng_seed``, documents keep the order of the files; without ``epochs``, they repeat without end. ``registered_path``
    replaces the path of a dataset in torchtitan's registry.

    Raises:
        ConfigError: the source cannot be read, is empty, or its samples are neither text nor valid token ids.
    """
    try:
        if source.path.endswith(ENDINGS["tokens"]):
            return flat_tokens(source, num_lanes, seq_len + 1, vocab_size, rng_seed, epochs)
        data, text_of_sample, nbytes = _open(source, registered_path)
        if source.max_samples is not None and isinstance(data, Dataset):
            data = data.select(range(min(source.max_samples, len(data))))
        elif source.max_samples is not None:
            data = Dataset.from_list(list(islice(data, source.max_samples)))
        encode = _Encoder(source.path, tokenizer, text_of_sample, vocab_size)
        row = _row_reader(data, text_of_sample) if isinstance(data, Dataset) else None
        samples = list(data.take(1)) if row is None else [row(i) for i in spread(len(data))]
        if not samples:
            raise ConfigError(f"{source.path}: no documents in it")
        for sample in samples:
            encode.value_of(sample)
    except (ConfigError, OSError, ValueError, DatasetsError) as e:
        # The message of the first cause says whether the source is absent, gated, out of reach or malformed.
        cause: BaseException = e
        while cause.__cause__ is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        message = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        if isinstance(cause, SchemaInferenceError):
            message = "no documents in it"
        raise ConfigError(f"{where}: {'' if isinstance(cause, ConfigError) else f'{source.path}: '}{message}") from e
    if row is not None:
        return IndexedDocuments(source.path, len(data), lambda index: encode(row(index)), num_lanes, rng_seed, epochs)
    return StreamedDocuments(source.path, data, encode, num_lanes, rng_seed, epochs, nbytes)


class _Encoder:
    """Maps a sample to its tokens: text is tokenised between BOS (if there is one) and EOS, token ids are returned unchanged."""

    def __init__(self, name: str, tokenizer: BaseTokenizer, text_of: TextOf, vocab_size: int) -> None:
        self._name, self._tokenizer, self._text_of, self._vocab_size = name, tokenizer, text_of, vocab_size
        self._before, self._after = around_a_document(tokenizer)

    def __call__(self, sample: dict[str, Any]) -> Tokens:
        value = self.value_of(sample)
        return np.asarray(self._encode(value), dtype=np.int64) if isinstance(value, str) else value

    def value_of(self, sample: dict[str, Any]) -> str | Tokens:
        """Returns the sample's text or tokens; raises ConfigError for neither, or for tokens beyond the vocabulary."""
        value = self._text_of(sample)
        if isinstance(value, str):
            return value
        try:
            tokens = np.asarray(value)
        except ValueError:  # lists of different lengths
            tokens = np.empty((0, 0))
        if tokens.ndim != 1 or not (tokens.dtype.kind in "iu" or len(tokens) == 0):
            raise ConfigError(f"{self._name}: a sample is neither text nor a list of token ids: {value!r:.80}")
        return require_in_vocabulary(tokens.astype(np.int64, copy=False), self._vocab_size, self._name)

    def _encode(self, text: str) -> list[int]:
        if not isinstance(self._tokenizer, HuggingFaceTokenizer):
            return self._tokenizer.encode(text, add_bos=True, add_eos=True)
        # The same as encode(), but without the offset of each token in the text, which takes time.
        return [*self._before, *self._tokenizer.tokenizer.encode_batch_fast([text])[0].ids, *self._after]


def _open(source: DataSource, registered_path: str | None) -> tuple[Dataset | IterableDataset, TextOf, int | None]:
    """Returns the samples, the function that maps one to its text or tokens, and the size of the files if they are local."""
    place, nbytes = Path(source.path), None
    registered = None if source.path in LOCAL_FORMATS else DATASETS.get(source.path.lower())
    if registered is not None and not place.exists():
        data = registered.loader(registered_path or registered.path)
        processor = registered.sample_processor
        return data, partial(text_of, text_field=source.text_field) if processor is text_of else processor, None
    if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        data = load_from_disk(source.path)
        if isinstance(data, datasets.DatasetDict):
            if source.split not in data:
                raise ConfigError(f"{source.path}: no split {source.split!r}, which has {', '.join(data)}")
            data = data[source.split]
        data = data.to_iterable_dataset() if source.streaming else data
    elif place.exists() or place.is_absolute() or any(c in source.path for c in "*?["):
        data, nbytes = open_local(source)
    else:
        options = {"name": source.name or None, "data_files": source.data_files or None}
        data = load_dataset(source.path, split=source.split, streaming=source.streaming, **options)
    field = next((name for name in (source.text_field, TOKENS_FIELD) if name in (data.column_names or ())), None)
    if field is not None:
        data = data.select_columns([field])
    return data, partial(text_of, text_field=source.text_field, where=source.path), nbytes


def _row_reader(data: Dataset, text_of_sample: TextOf) -> Callable[[int], dict[str, Any]]:
    """Maps a row number to its sample. Tokens are an array, several times as fast as Python lists, the library's default."""
    if not (isinstance(text_of_sample, partial) and text_of_sample.func is text_of):
        return data.__getitem__  # a registered dataset's own function expects the library's default types
    rows = data.with_format("arrow")

    def value(scalar: pyarrow.Scalar) -> Any:
        is_list = isinstance(scalar, pyarrow.ListScalar) and scalar.is_valid
        return scalar.values.to_numpy(zero_copy_only=False) if is_list else scalar.as_py()

    def row(index: int) -> dict[str, Any]:
        table = rows[index]
        return {name: value(table.column(name)[0]) for name in table.column_names}

    return row


def text_of(sample: dict[str, Any], text_field: str = "text", where: str = "data.text_field") -> Any:
    """Returns the text of a sample or, where ``text_field`` is absent, its tokens (``input_ids``); ConfigError without either."""
    for field in (text_field, TOKENS_FIELD):
        if field in sample:
            return sample[field]
    raise ConfigError(f"{where}: {text_field!r} is not in the data, which has {', '.join(sorted(sample))}")
