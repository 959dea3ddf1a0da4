"""Describes weights at a path from headers alone: keys, shapes, dtypes, and where the pieces of each tensor lie."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flame_ext.seeding.sources.boxes import Box, full_box, inside

HEADS_FOLDER = "future_heads"  # the folder of an export that holds the heads beside the backbone (checkpoint/export.py)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor that lies in one piece in a file."""

    box: Box
    file: Path
    position: int
    """Offset in bytes for DCP, place in the file's order of tensors otherwise; orders the reads of one file."""
    nbytes: int = 0  # Size of the piece in the file, for DCP


@dataclass(frozen=True)
class TensorEntry:
    key: str  # As the files spell it
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]  # They tile the tensor exactly

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def place(self) -> str:
        """Name of its file in the source's folder, for messages."""
        file = self.chunks[0].file
        name = f"{HEADS_FOLDER}/{file.name}" if file.parent.name == HEADS_FOLDER else file.name
        return name + (", …" if len({chunk.file for chunk in self.chunks}) > 1 else "")


# Reads the box, which lies inside the chunk, in the file's dtype, on CPU.
ReadBox = Callable[[TensorEntry, Chunk, Box], Tensor]


@dataclass(frozen=True)
class Source(ABC):
    """A folder of weights to seed from; each layout has a subclass, which only this package knows."""

    path: Path
    entries: Mapping[str, TensorEntry]
    """By the files' names at first, by the model's after :func:`names.in_model_names`."""
    digest: str  # SHA-256 over the index and the names, sizes and headers of the files
    passed_over: tuple[str, ...] = ()  # A phrase for each thing that is not read
    objects: Mapping[str, Path] = field(default_factory=dict)  # Key of each object that is no tensor to its file
    layout: str = ""
    ignored: tuple[str, ...] = ()  # Keys in the files that from_pretrained ignores
    wrappers: tuple[str, ...] = ()  # Parts of the files' keys that are names of wrapping modules, and left out
    nesting: str = ""  # Prefix of every key of the model in the files

    def for_model(self, *is_models: Callable[[str], bool]) -> Source:
        """Return the model's part of the source, under keys without nesting; raise SeedError if only some are nested.

        ``is_models`` test whether a file's key is the model's; the first that any key passes counts.
        """
        return self

    def model_part(self) -> Source:
        """Return the model's part as the writer of the files noted it."""
        return self

    def independent_state(self, names: Collection[str]) -> dict[str, Tensor] | None:
        """Read the tensors ``names`` by other code than :meth:`open`'s, by the files' keys; None = ``from_pretrained`` can."""
        return None

    @abstractmethod
    def open(self, file: Path) -> AbstractContextManager[ReadBox]:
        """Open a file, memory-mapped, to read boxes of it: views, until they are copied. Raises SeedError."""


def read_tensor(source: Source, name: str) -> Tensor:
    """Read a tensor in its file's dtype, on CPU: a view of the mapped file if it lies in one piece. May raise SeedError."""
    entry = source.entries[name]
    whole = torch.empty(entry.shape if len(entry.chunks) != 1 else 0, dtype=entry.dtype)
    for chunk in entry.chunks:
        with source.open(chunk.file) as read_box:
            values = read_box(entry, chunk, chunk.box)
        if len(entry.chunks) == 1:
            return values
        whole[inside(chunk.box, full_box(entry.shape))].copy_(values)
    return whole


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Convert a floating-point tensor; leave others, or all for None, as they are."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have one shape, dtype and bits: 0.0 is not -0.0, and NaN equals itself."""
    # Views of mapped files can be strided.
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(one, other)
