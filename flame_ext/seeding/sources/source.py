"""What lies at a path, from headers alone: keys, shapes, dtypes, and where each piece of each tensor lies. No weight is read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from flame_ext.seeding.sources.boxes import Box

HEADS_FOLDER = "future_heads"  # of an export: the heads beside the backbone (checkpoint/export.py)


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor that lies in one piece in one file."""

    box: Box
    """The part."""
    file: Path
    position: int
    """Of its first byte, in whatever the layout counts from: the order in which to read."""
    nbytes: int = 0
    """Of the piece in the file; only for layouts that have to know."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the files describe it."""

    key: str
    """As the files spell it."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    """They tile the tensor exactly."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def place(self) -> str:
        """Its file in the source's folder, for messages."""
        file = self.chunks[0].file
        name = f"{HEADS_FOLDER}/{file.name}" if file.parent.name == HEADS_FOLDER else file.name
        return name + (", …" if len({chunk.file for chunk in self.chunks}) > 1 else "")


# Values of a box inside one chunk: reads just these elements, in the file's dtype, on CPU.
ReadBox = Callable[[TensorEntry, Chunk, Box], Tensor]


@dataclass(frozen=True)
class Source(ABC):
    """A folder of weights that can be seeded from; one subclass for each way of storing tensors."""

    path: Path
    entries: Mapping[str, TensorEntry]
    """Name to tensor: the files' own names here, the model's after :func:`key_names.in_model_names`."""
    digest: str
    """SHA-256 over names, sizes and headers of its files and the index: identifies the source without reading weights."""
    passed_over: tuple[str, ...] = ()
    """What lies there and is not read, a phrase each."""
    objects: Mapping[str, Path] = field(default_factory=dict)
    """Keys among the model's that hold something else than a tensor, with their file."""

    layout: ClassVar[str]
    """As in the report."""

    @abstractmethod
    def open(self, file: Path) -> AbstractContextManager[ReadBox]:
        """Open one file of the source.

        Errors of the file, on opening or reading, are raised as :class:`SeedError`.
        """
