"""Local text as entries of the host's dataset registry, so that ``training.dataset`` and ``validation.dataset`` name it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from flame_ext.data.python_stdlib import Split, read_stdlib
from flame_ext.errors import ConfigError

# Builder of the datasets library to the endings that it reads in a folder.
LOCAL_FORMATS = {"text": ("*.txt",), "json": ("*.jsonl", "*.json", "*.jsonl.gz"), "parquet": ("*.parquet",)}


def register_local_sources() -> None:
    """Add ``text``, ``json``, ``parquet`` (with ``training.dataset_path`` a file, glob or folder) and ``python_stdlib``."""
    for builder in LOCAL_FORMATS:
        DATASETS.setdefault(builder, DatasetConfig("", partial(load_local, builder), text_of))
    splits: dict[str, Split] = {"python_stdlib": "train", "python_stdlib_validation": "validation"}
    for name, split in splits.items():
        DATASETS.setdefault(name, DatasetConfig("", partial(_load_stdlib, split), text_of))


def load_local(builder: str, path: str) -> Dataset:
    """Read local files; one sample is a line of JSON, a row, or a whole text file.

    Raises:
        ConfigError: no file matches.
    """
    if not path:
        raise ConfigError(f"training.dataset = {builder!r} needs training.dataset_path: a file, a glob or a folder")
    place = Path(path)
    if place.is_dir():
        files = sorted(str(p) for pattern in LOCAL_FORMATS[builder] for p in place.rglob(pattern))
    elif place.is_file():
        files = [str(place)]
    else:
        files = sorted(str(p) for p in Path(place.anchor or ".").glob(str(place.relative_to(place.anchor))))
    if not files:
        raise ConfigError(
            f"training.dataset_path {path!r}: no file matches ({', '.join(LOCAL_FORMATS[builder])} for {builder!r})"
        )
    options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    return load_dataset(builder, data_files=files, split="train", **options)


def text_of(sample: dict[str, Any], text_field: str = "text") -> str:
    """The text of a sample.

    Raises:
        ConfigError: the field is not there, with those that are.
    """
    if text_field not in sample:
        raise ConfigError(f"data.text_field {text_field!r} is not in the data, which has {', '.join(sorted(sample))}")
    return sample[text_field]


def _load_stdlib(split: Split, path: str) -> Dataset:
    return Dataset.from_dict({"text": read_stdlib(split)})
