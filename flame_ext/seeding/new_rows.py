"""Fills the rows that a vocabulary has gained, with the same bits on any number of ranks, under any sharding and on any device.

Old rows are read from the source, a block at a time, and added in float64, element by element in an order that depends on rows
alone. ``resize_token_embeddings`` of transformers draws new rows around their mean instead.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from flame_ext.model.initialisation import ParameterInit, Uniform
from flame_ext.seeding.copying import Copies
from flame_ext.seeding.new_parameters import uniform_blocks
from flame_ext.seeding.sources.boxes import Box, inside, intersection, local_part, volume
from flame_ext.seeding.sources.source import ReadBox, Source, TensorEntry, read_piece
from flame_ext.seeding.vocabulary import Growth

_BLOCK_ELEMENTS = 1 << 18  # of whole rows; changing it may change the last bit of a mean


@torch.no_grad()
def fill_new_rows(
    source: Source,
    state: Mapping[str, Tensor],
    tied: Mapping[str, str],
    growth: Growth,
    inits: Mapping[str, ParameterInit],
    initializer_range: float,
    rng_seed: int,
) -> None:
    """Fill, in place, this rank's part of the new rows of each tensor of ``state`` that grows.

    A tensor of one dimension (the bias of an output embedding) gets means, by "random" as well: an output of the mean row and the
    mean bias is the mean of all outputs, and never the largest.

    Args:
        source: under the model's names.
        tied: other name to key in ``state``.
        inits: of the parameters of heads.
        initializer_range: standard deviation of the backbone's random rows.
    """
    for key in sorted(growth.shapes.keys() & state.keys()):
        local, box = local_part(state[key])
        if volume(box) == 0 or box[0][1] <= growth.loaded:
            continue
        begin, end = max(box[0][0], growth.loaded), box[0][1]
        tokens_end = max(begin, min(end, growth.tokens))
        entry = next(
            source.entries[name] for name in (key, *tied) if tied.get(name, key) == key and name in source.entries
        )
        with ExitStack() as stack:
            rows = _OldRows(source, entry, box[1:], stack)
            new = local[begin - box[0][0] :]
            drawn = tokens_end - begin if growth.new_rows == "random" and local.ndim > 1 else 0
            if drawn:
                init = inits.get(key, Uniform(math.sqrt(3) * initializer_range))
                _draw(new[:drawn], ((begin, tokens_end), *box[1:]), tuple(state[key].shape), init, rng_seed, key)
            absent = [number - begin for number in growth.absent if begin <= number < tokens_end]
            if drawn < len(new) or absent:
                mean = rows.mean().to(local.dtype).to(local.device)
                new[drawn:] = mean
                for row in absent:
                    new[row] = mean
            for number in range(begin, tokens_end):
                if number in growth.pieces:
                    new[number - begin] = rows.mean_of(growth.pieces[number]).to(local.dtype).to(local.device)


class _OldRows:
    """Reads the ``columns`` of a source's tensor; files stay open until ``stack`` is closed."""

    def __init__(self, source: Source, entry: TensorEntry, columns: Box, stack: ExitStack) -> None:
        self._source, self._entry, self._columns, self._stack = source, entry, columns, stack
        self._open: dict[Path, ReadBox] = {}

    def mean(self) -> Tensor:
        """Return the float64 mean of all rows; one block of them is in memory."""
        count, width = self._entry.shape[0], math.prod(self._entry.shape[1:])
        size = 1 << max(0, (_BLOCK_ELEMENTS // max(1, width)).bit_length() - 1)
        total = self._zeros(1)[0]
        for first in range(0, count, size):
            block = self._zeros(size)
            last = min(first + size, count)
            self._read(first, block[: last - first])
            while len(block) > 1:  # halves, since the order in which torch sums depends on columns and threads
                block = block[: len(block) // 2] + block[len(block) // 2 :]
            total += block[0]
        return total / count

    def mean_of(self, numbers: Sequence[int]) -> Tensor:
        """Return the float64 mean of some rows."""
        total, row = self._zeros(1), self._zeros(1)
        for number in numbers:
            self._read(number, row)
            total += row
        return total[0] / len(numbers)

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, *(end - begin for begin, end in self._columns), dtype=torch.float64)

    def _read(self, first: int, into: Tensor) -> None:
        box = ((first, first + len(into)), *self._columns)
        for chunk in self._entry.chunks_in(box):
            common = intersection(chunk.box, box)
            assert common is not None
            if chunk.file not in self._open:
                self._open[chunk.file] = self._stack.enter_context(self._source.open(chunk.file))
            into[inside(common, box)] = read_piece(self._open[chunk.file], self._entry, chunk, common)


def _draw(local: Tensor, box: Box, shape: tuple[int, ...], init: ParameterInit, rng_seed: int, key: str) -> None:
    if not isinstance(init, Uniform):
        local.fill_(init.value)
        return
    with Copies() as copies:
        for make, rows in uniform_blocks(local, box, shape, init.bound, rng_seed, key):
            copies.fill(make, rows)
        copies.finish()
