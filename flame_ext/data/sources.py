"""Opens the sources that ``data.sources`` and ``training.dataset`` name. The datasets library reads them in constant memory."""

from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.arrow_writer import SchemaInferenceError
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.tools.logging import logger

from flame_ext.config.sections import DataSource, FlameJobConfig
from flame_ext.data.documents import Documents, IndexedDocuments, StreamedDocuments, Tokens
from flame_ext.data.files import ENDINGS, flat_tokens, load_files, local_files, open_local, sizes_and_marks, spread
from flame_ext.data.python_stdlib import Split, read_stdlib
from flame_ext.data.rows import TOKENS_FIELD, Masked, Places, RowError, checked, unpadded, used_columns
from flame_ext.data.tokenizer import AutoHuggingFaceTokenizer, around_a_document, require_in_vocabulary
from flame_ext.errors import ConfigError
from flame_ext.object_stores import filesystem, is_url, patiently

LOCAL_FORMATS = ("text", "json", "parquet")  # names in torchtitan's registry that stand for local files
_HUB = "hf://"  # before a name of the Hub where a local folder has the owner's name
TextOf = Callable[[dict[str, Any]], Any]  # maps a sample to its text or its tokens, which may be Masked


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


def sources_of(config: FlameJobConfig, section: str = "training") -> list[tuple[str, DataSource]]:
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
            without_effect(
                source, "flat files of tokens", "name", "split", "data_files", "text_field", "skip_unreadable"
            )
            return flat_tokens(source, num_lanes, seq_len + 1, vocab_size, rng_seed, epochs)
        data, text_of_sample, files = _open(source, vocab_size, registered_path)
        if source.max_samples is not None and isinstance(data, Dataset):
            data = data.select(range(min(source.max_samples, len(data))))
        elif source.max_samples is not None:
            data = Dataset.from_list(list(islice(data, source.max_samples)))
        places = Places(source.path, files or ())
        encode = _Encoder(tokenizer, text_of_sample, vocab_size, source.skip_unreadable)
        row = _row_reader(data, text_of_sample) if isinstance(data, Dataset) else None
        if row is None:
            samples = [(sample, partial(places.in_file, 0, 0)) for sample in data.take(1)]
        else:
            samples = [(row(i), partial(places.of_index, i)) for i in spread(len(data))]
        if not samples:
            raise ConfigError(f"{source.path}: no documents in it")
        for sample, place in samples:
            encode.check(sample, place)
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

        def tokens_of(index: int) -> Tokens:
            return encode(row(index), partial(places.of_index, index))

        return IndexedDocuments(source.path, len(data), tokens_of, num_lanes, rng_seed, epochs)

    def encode_row(sample: dict[str, Any], shard: int, number: int) -> Tokens:
        return encode(sample, partial(places.in_file, shard, number))

    nbytes = None if files is None else sum(size for size, _ in sizes_and_marks(files))
    return StreamedDocuments(source.path, data, encode_row, num_lanes, rng_seed, epochs, nbytes)


class _Encoder:
    """Maps a sample to its tokens: text is tokenised between BOS (if there is one) and EOS, token ids are returned unchanged.

    With ``skip``, a sample that is neither has no tokens, and is counted.
    """

    def __init__(self, tokenizer: BaseTokenizer, text_of: TextOf, vocab_size: int, skip: bool) -> None:
        self._tokenizer, self._text_of, self._vocab_size, self._skip = tokenizer, text_of, vocab_size, skip
        self._before, self._after = around_a_document(tokenizer)
        self._skipped = 0

    def __call__(self, sample: dict[str, Any], place: Callable[[], str], encode: bool = True) -> Tokens:
        """Returns the tokens of a sample; raises ConfigError, which begins with its place, if it has none that can be used."""
        try:
            found = self._text_of(sample)
            given, learned = found if isinstance(found, Masked) else (found, None)
            if isinstance(value := checked(given), str):
                return np.asarray(self._encode(value) if encode else (), dtype=np.int64)
            return Masked(require_in_vocabulary(value, self._vocab_size), learned).marked()
        except RowError as e:
            if not self._skip:
                raise ConfigError(f"{place()}: {e}; mend it, or set skip_unreadable") from e
            self._skipped += 1
            if self._skipped & (self._skipped - 1) == 0:  # at powers of two, since a source may have many
                logger.warning(f"{place()}: skipped ({e}); {self._skipped} skipped so far in this process")
            return np.empty(0, dtype=np.int64)
        except ConfigError as e:
            raise ConfigError(f"{place()}: {e}") from e

    def check(self, sample: dict[str, Any], place: Callable[[], str]) -> None:
        """Raises ConfigError as a call does; a text is tokenised only if the tokenizer has ids that the model lacks."""
        self(sample, place, encode=getattr(self._tokenizer, "vocab_limit", None) is not None)

    def _encode(self, text: str) -> list[int]:
        if not isinstance(self._tokenizer, AutoHuggingFaceTokenizer):
            return self._tokenizer.encode(text, add_bos=True, add_eos=True)
        return [*self._before, *self._tokenizer.ids(text), *self._after]


class _Opened(NamedTuple):
    data: Dataset | IterableDataset
    text_of: TextOf
    files: list[str] | None  # if they are local


def _open(source: DataSource, vocab_size: int, registered_path: str | None) -> _Opened:
    """Returns the samples, the function that maps one to its text or tokens, and the files if they are local."""
    place, files = Path(source.path), None
    registered = None if source.path in LOCAL_FORMATS else DATASETS.get(source.path.lower())
    if registered is not None and not place.exists():
        unused = () if registered.sample_processor is text_of else ("text_field",)
        without_effect(source, "a registered dataset", "name", "split", "data_files", "tokens_dtype", *unused)
        data = registered.loader(registered_path or registered.path)
        processor = registered.sample_processor
        return _Opened(
            data, partial(text_of, text_field=source.text_field) if processor is text_of else processor, None
        )
    if _is_saved_dataset(source.path):
        data = load_from_disk(source.path)
        split = () if isinstance(data, datasets.DatasetDict) else ("split",)
        without_effect(source, "a saved dataset", "name", "data_files", "tokens_dtype", *split)
        if isinstance(data, datasets.DatasetDict):
            if source.split not in data:
                raise ConfigError(f"{source.path}: no split {source.split!r}, which has {', '.join(data)}")
            data = data[source.split]
        # Without the format that it was saved with, such as tensors of torch.
        data = data.with_format(None).to_iterable_dataset() if source.streaming else data
    elif place.exists() or _looks_local(source.path):
        without_effect(source, "local files", "name", "split", "data_files", "tokens_dtype")
        data, files = open_local(source, vocab_size)
    else:
        without_effect(source, "a dataset on the Hub", "tokens_dtype")
        options = {"name": source.name or None, "data_files": source.data_files or None}
        name = source.path.removeprefix(_HUB)
        data = load_dataset(name, split=source.split, streaming=source.streaming, **options)
    if used := used_columns(source.path, tuple(data.column_names or ()), source.text_field):
        data = data.select_columns(used)
    return _Opened(data, partial(text_of, text_field=source.text_field, where=source.path), files)


def _is_saved_dataset(path: str) -> bool:
    """Whether ``save_to_disk`` wrote a folder; ``load_from_disk`` reads one in an object store as well."""
    marks = ("dataset_info.json", "dataset_dict.json")
    if not is_url(path):
        return any((Path(path) / name).is_file() for name in marks)
    store, root = filesystem(path, ConfigError)
    return any(patiently(path, partial(store.isfile, f"{root.rstrip('/')}/{name}"), ConfigError) for name in marks)


def _looks_local(path: str) -> bool:
    """Whether a path where nothing is cannot have been meant as the name of a dataset on the Hub."""
    if path.startswith(_HUB):
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return True
    return path.endswith(tuple(chain.from_iterable(ENDINGS.values()))) or ("/" in path and Path(path).parent.is_dir())


def without_effect(source: DataSource, what: str, *names: str) -> None:
    """Raises ConfigError if one of the options is set that mean nothing for a source of this kind."""
    for name in names:
        if (value := getattr(source, name)) != getattr(DataSource(), name):
            raise ConfigError(f"{source.path}: {name} = {value!r} has no effect on {what}; leave it out")


def _row_reader(data: Dataset, text_of_sample: TextOf) -> Callable[[int], dict[str, Any]]:
    """Maps a row number to its sample. Tokens are an array, several times as fast as Python lists, the library's default."""
    if not (isinstance(text_of_sample, partial) and text_of_sample.func is text_of):
        return data.__getitem__  # a registered dataset's own function expects the library's default types
    rows = data.with_format("arrow")

    def value(scalar: pyarrow.Scalar) -> Any:
        is_list = isinstance(scalar, pyarrow.ListScalar) and scalar.is_valid
        try:
            return scalar.values.to_numpy(zero_copy_only=False) if is_list else scalar.as_py()
        except UnicodeDecodeError:
            return scalar.as_buffer().to_pybytes()  # neither text nor tokens

    def row(index: int) -> dict[str, Any]:
        table = rows[index]
        return {name: value(table.column(name)[0]) for name in table.column_names}

    return row


def text_of(sample: dict[str, Any], text_field: str = "text", where: str = "data.text_field") -> Any:
    """Returns the text of a sample or, where ``text_field`` is absent or ``input_ids``, its tokens (:func:`unpadded`).

    Raises ConfigError without either, or for masks that cannot be followed (:func:`unpadded`).
    """
    if text_field in sample and text_field != TOKENS_FIELD:
        return sample[text_field]
    if TOKENS_FIELD in sample:
        return unpadded(sample)
    raise ConfigError(f"{where}: {text_field!r} is not in the data, which has {', '.join(sorted(sample))}")
