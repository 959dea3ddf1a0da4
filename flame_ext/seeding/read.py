"""Read each rank's own part out of the files, straight into the parameters, and know that nothing was left out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.boxes import Box, inside, intersection, local_part, tiles_exactly, volume
from flame_ext.seeding.sources.source import Chunk, ReadBox, Source, TensorEntry


@dataclass(frozen=True)
class _Piece:
    """What one chunk of the source holds of one local tensor."""

    key: str
    entry: TensorEntry
    chunk: Chunk
    box: Box
    """Of the full tensor."""
    local: Tensor
    """Just that part of the parameter."""

    @property
    def nbytes(self) -> int:
        return volume(self.box) * self.entry.dtype.itemsize


@torch.no_grad()
def read_weights(
    source: Source,
    state: Mapping[str, Tensor],
    tied: Mapping[str, str],
    check_finite: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Fill the tensors of ``state`` that the source holds, file by file in the order of the bytes.

    Files are memory-mapped and sliced, so beside the parameters there is one slice in memory at a time. Where the
    source holds a tied parameter under several names, all have to be equal.

    Args:
        source: the checked description of the files, under the model's names.
        state: key to parameter or buffer, DTensor or plain, to be written in place.
        tied: other name to key in ``state``.
        check_finite: whether NaN and infinities are refused. An overflow in the cast always is.
        progress: called with the bytes read so far and in all, of this rank.

    Returns:
        Bytes of the source that this rank has read.

    Raises:
        SeedError: naming file and key: a slice of another shape than the parameter's, a value that is not finite (in
            the file, or after the cast), two different values for one tied parameter, an element that was not written
            exactly once.
    """
    first: list[_Piece] = []
    again: list[_Piece] = []
    for key, tensor in state.items():
        held = [
            name for name in (key, *sorted(n for n, owner in tied.items() if owner == key)) if name in source.entries
        ]
        for name in held:
            pieces = list(_pieces(key, source.entries[name], tensor))
            (first if name == held[0] else again).extend(pieces)
    total, done = sum(piece.nbytes for piece in [*first, *again]), 0
    written: dict[str, list[Box]] = defaultdict(list)
    for piece, values in _read(source, first):
        piece.local.copy_(values)
        written[piece.key].append(piece.box)
        _require_finite(piece, values, check_finite)
        done += piece.nbytes
        progress(done, total)
    for piece, values in _read(source, again):
        if not torch.equal(piece.local, values.to(device=piece.local.device, dtype=piece.local.dtype)):
            raise SeedError(
                f"{piece.chunk.file}: {piece.entry.key!r} differs from {piece.key!r}, but the model ties them "
                "(tie_word_embeddings); set tie_word_embeddings = false in config.json, or remove the one that is not meant"
            )
        done += piece.nbytes
        progress(done, total)
    _require_complete(source, state, tied, written)
    return done


def _pieces(key: str, entry: TensorEntry, tensor: Tensor) -> Iterator[_Piece]:
    local, box = local_part(tensor)
    for chunk in entry.chunks:
        common = intersection(chunk.box, box)
        if common is not None:
            yield _Piece(key, entry, chunk, common, local[inside(common, box)])


def _read(source: Source, pieces: list[_Piece]) -> Iterator[tuple[_Piece, Tensor]]:
    by_file: dict[Path, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        by_file[piece.chunk.file].append(piece)
    for file in sorted(by_file):
        with source.open(file) as read_box:
            for piece in sorted(by_file[file], key=lambda p: p.chunk.position):
                values = _values(piece, read_box)
                yield piece, values
                del values  # a view would keep the whole file mapped


def _values(piece: _Piece, read_box: ReadBox) -> Tensor:
    values = read_box(piece.entry, piece.chunk, piece.box)
    if values.shape != piece.local.shape or values.dtype != piece.entry.dtype:
        raise SeedError(
            f"{piece.chunk.file}: {piece.entry.key!r}: got {list(values.shape)} {values.dtype}, expected "
            f"{list(piece.local.shape)} {piece.entry.dtype}: the file has changed"
        )
    return values


def _require_finite(piece: _Piece, values: Tensor, check_finite: bool) -> None:
    local = piece.local
    if not (local.is_floating_point() and values.is_floating_point()):
        return
    if not check_finite and torch.finfo(values.dtype).max <= torch.finfo(local.dtype).max:
        return
    # One cheap pass over good weights: a sum is finite only if every element is.
    if math.isfinite(local.sum(dtype=torch.float32).item()) or bool(torch.isfinite(local).all()):
        return
    if bool(torch.isfinite(values).all()):
        raise SeedError(
            f"{piece.chunk.file}: {piece.entry.key!r} ({values.dtype}) overflows {local.dtype}; set training.dtype to a "
            "wider type"
        )
    if check_finite:
        raise SeedError(
            f"{piece.chunk.file}: {piece.entry.key!r} holds NaN or infinity; the file is damaged or its training had diverged"
        )


def _require_complete(
    source: Source, state: Mapping[str, Tensor], tied: Mapping[str, str], written: Mapping[str, list[Box]]
) -> None:
    """Every element of this rank's part of every loaded tensor was written exactly once."""
    loaded = {tied.get(name, name) for name in source.entries} & state.keys()
    for key in sorted(loaded):
        _, box = local_part(state[key])
        if volume(box) > 0 and not tiles_exactly(box, written[key]):
            raise SeedError(
                f"{source.path}: {key!r}: elements {box} were to be written exactly once, written were {written[key]}; the "
                "source is not what its headers describe"
            )
