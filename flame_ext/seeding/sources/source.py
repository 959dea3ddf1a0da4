"""Describes weights at a path from headers alone: keys, shapes, dtypes, and where the pieces of each tensor lie."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from flame_ext.seeding.sources.boxes import Box, full_box, inside, intersection
from flame_ext.seeding.sources.traced import Part, TracedTensor

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
    """Offset in bytes, for .bin the place in the file's order of tensors; orders the reads of one file."""
    nbytes: int = 0  # Size of the piece in the file; 0 for .bin
    stored: tuple[Chunk, Part[TensorEntry]] | None = None
    """Of a tensor that is made of others: the chunk of another tensor to read, and the part that says where it belongs."""

    def stored_tensor(self, entry: TensorEntry) -> TensorEntry:
        """Return the tensor in the files that this piece of ``entry`` is stored in."""
        return entry if self.stored is None else self.stored[0].stored_tensor(self.stored[1].of)


@dataclass(frozen=True)
class TensorEntry:
    key: str  # As the files spell it; "FIRST and N more" for a tensor that is made of several
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]  # They tile the tensor exactly

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks_in(self, box: Box) -> list[Chunk]:
        """Return the chunks that have elements in a box."""
        begin, end = box[0] if box else (0, 1)
        begins, thickest, ordered = self._by_first_axis
        near = ordered[bisect_left(begins, begin - thickest + 1) : bisect_left(begins, end)]
        return [chunk for chunk in near if intersection(chunk.box, box) is not None]

    @cached_property
    def _by_first_axis(self) -> tuple[list[int], int, list[Chunk]]:
        """Where the chunks begin along the first axis, in order, the length of the longest, and the chunks in that order."""
        ordered = sorted(self.chunks, key=lambda chunk: chunk.box[:1])
        axes = [chunk.box[0] if chunk.box else (0, 1) for chunk in ordered]
        return [begin for begin, _ in axes], max((end - begin for begin, end in axes), default=1), ordered

    @property
    def stored_tensors(self) -> list[TensorEntry]:
        """The tensors in the files that this one is made of; itself, if it is one of them."""
        return list({(tensor := chunk.stored_tensor(self)).key: tensor for chunk in self.chunks}.values())

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
    follow_links: bool = False  # Whether its files may be links out of the folder

    def for_model(self, *is_models: Callable[[str], bool]) -> Source:
        """Return the model's part of the source, under keys without nesting; raise SeedError if only some are nested.

        ``is_models`` test whether a file's key is the model's; the first that any key passes counts.
        """
        return self

    def model_part(self) -> Source:
        """Return the model's part as the writer of the files noted it."""
        return self

    @property
    def is_stock(self) -> bool:
        """Whether ``from_pretrained`` reads the folder."""
        return False

    @property
    def bytes_ahead(self) -> int:
        """Bytes of slices that are worth reading ahead: 0, where files are mapped."""
        return 0

    @abstractmethod
    def independent_state(self, stored: Collection[TensorEntry]) -> dict[str, Tensor]:
        """Read whole tensors, by the files' keys, as the library that wrote them does: without boxes. Views, where it maps files."""

    @abstractmethod
    def open(self, file: Path) -> AbstractContextManager[ReadBox]:
        """Open a file, memory-mapped, to read boxes of it: views, until they are copied. Raises SeedError."""


def read_piece(read_box: ReadBox, entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
    """Read a box that lies inside a chunk, in the file's dtype, on CPU."""
    if chunk.stored is None:
        return read_box(entry, chunk, box)
    stored, whole = chunk.stored
    part = whole.within(box)
    assert part is not None
    return part.arranged(read_piece(read_box, part.of, stored, part.box_of))


def traced(entry: TensorEntry) -> TracedTensor:
    """Return a stand-in for a tensor that transformers may rearrange; :func:`rearranged` describes the result."""
    return TracedTensor.whole(entry.shape, entry.dtype, entry)


def rearranged(tensor: TracedTensor) -> TensorEntry:
    """Describe a tensor that is made of those in the files."""
    parts = tensor.parts
    first: TensorEntry = parts[0].of
    if len(parts) == 1 and parts[0] == traced(first).parts[0]:
        return first
    chunks = [
        Chunk(part.placed(common), chunk.file, chunk.position, chunk.nbytes, (chunk, part))
        for part in parts
        for chunk in part.of.chunks_in(part.box_of)
        if (common := intersection(chunk.box, part.box_of)) is not None
    ]
    others = len({part.of.key for part in parts}) - 1
    key = first.key + (f" and {others} more" if others else "")
    return TensorEntry(key, tuple(tensor.shape), tensor.dtype, tuple(chunks))


def read_tensor(source: Source, name: str) -> Tensor:
    """Read a tensor in its file's dtype, on CPU: a view of the mapped file if it lies in one piece. May raise SeedError."""
    entry = source.entries[name]
    whole = torch.empty(entry.shape if len(entry.chunks) != 1 else 0, dtype=entry.dtype)
    for file, chunks in groupby(sorted(entry.chunks, key=lambda c: (c.file, c.position)), key=lambda c: c.file):
        with source.open(file) as read_box:
            for chunk in chunks:
                values = read_piece(read_box, entry, chunk, chunk.box)
                if len(entry.chunks) == 1:
                    return values
                whole[inside(chunk.box, full_box(entry.shape))].copy_(values)
    return whole


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have one shape, dtype and bits: 0.0 is not -0.0, and NaN equals itself."""
    # Views of mapped files can be strided.
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(one, other)
