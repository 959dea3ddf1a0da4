"""One source of documents, as a lane reads it: from where it is to the next document and to where that ends.

A position (:class:`Cursor`) is two integers, whatever the number of ranks and workers, so it can be saved as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from datasets import IterableDataset
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Encode = Callable[[Any], Tokens]
"""A sample to its tokens."""

BLOCK = 1024  # documents that are permuted together where there is no random access
BLOCKS_KEPT = 16  # at least: two for each lane that this process reads
FILES_OPEN = 64  # likewise: one for each lane
READ_AT_ONCE = 64


class Cursor(NamedTuple):
    """Where a lane's next document of a source is; what the two mean is the source's own matter."""

    a: int
    b: int


class Documents(Protocol):
    """A source of documents for ``num_lanes`` lanes, which share them without overlap."""

    name: str
    size: int
    """What tells that the source is another one: documents or, where these are not counted, bytes or number of files."""

    def start(self, lane: int) -> Cursor:
        """Where a lane begins."""
        ...

    def read(self, lane: int, cursor: Cursor) -> tuple[Tokens, Cursor] | None:
        """A lane's next document and where the one after it is; None: the lane has had all its documents."""
        ...

    def epochs(self, cursor: Cursor, lane: int) -> float:
        """How often the lane has had all its documents, the fraction of the present time by documents or files."""
        ...


class IndexedDocuments:
    """Random access: lane j takes documents j, j + L, j + 2L, … of each epoch's permutation, counted on over epochs.

    Args:
        name: for messages and metrics.
        count: documents of an epoch.
        tokens_of: document index in [0, count) to its tokens.
        num_lanes: L.
        rng_seed: determines each epoch's permutation; None = as they come.
        epochs: after which it ends; None = never.
    """

    def __init__(
        self,
        name: str,
        count: int,
        tokens_of: Callable[[int], Tokens],
        num_lanes: int,
        rng_seed: int | None,
        epochs: int | None = None,
    ) -> None:
        self.name, self.size, self.num_lanes = name, count, num_lanes
        self.tokens_of, self._epochs = tokens_of, epochs
        self._order = lru_cache(maxsize=2)(partial(permutation, count, rng_seed))  # lanes may stand in two epochs

    def start(self, lane: int) -> Cursor:
        return Cursor(lane, 0)

    def index(self, cursor: Cursor) -> int | None:
        """The document at a position; None at the end."""
        epoch, place = divmod(cursor.a, self.size)
        return None if self._epochs is not None and epoch >= self._epochs else int(self._order(epoch)[place])

    def read(self, lane: int, cursor: Cursor) -> tuple[Tokens, Cursor] | None:
        index = self.index(cursor)
        return None if index is None else (self.tokens_of(index), Cursor(cursor.a + self.num_lanes, 0))

    def epochs(self, cursor: Cursor, lane: int) -> float:
        return (cursor.a - lane) / self.size


class StreamedDocuments:
    """Files that are read from their beginning. They are dealt to as many streams as there are files for, and each stream
    serves the same number of lanes: a file is opened by the ranks whose lanes need it, and by no other if there are enough
    files. Of a stream with G lanes the q-th takes documents q, q + G, …

    ``Cursor(a, b)``: the b-th document of the stream's a-th file, counted on over epochs; b may lie beyond the file's end
    and is then carried over. Documents are permuted in blocks of 1,024, files as a whole, so going on means reading one
    file up to the block.

    Args:
        name: for messages and metrics.
        data: its shards are the files.
        encode: a sample to its tokens.
        num_lanes: L.
        rng_seed: determines each epoch's permutations; None = as they come.
        epochs: after which it ends; None = never.
        nbytes: of all files, if that is known.
    """

    def __init__(
        self,
        name: str,
        data: IterableDataset,
        encode: Encode,
        num_lanes: int,
        rng_seed: int | None,
        epochs: int | None = None,
        nbytes: int | None = None,
    ) -> None:
        self.name, self.num_lanes, self._files = name, num_lanes, data.num_shards
        self.size = self._files if nbytes is None else nbytes
        self._data, self._encode, self._rng_seed, self._epochs = data, encode, rng_seed, epochs
        self.streams = next(n for n in range(min(num_lanes, self._files), 0, -1) if num_lanes % n == 0)
        self._lanes_each = num_lanes // self.streams
        self._order = lru_cache(maxsize=2)(partial(permutation, self._files, rng_seed))
        self._blocks = _Blocks(data)

    def start(self, lane: int) -> Cursor:
        return Cursor(0, lane // self.streams)

    def read(self, lane: int, cursor: Cursor) -> tuple[Tokens, Cursor] | None:
        (file, row), stream = cursor, lane % self.streams
        self._blocks.lanes.add(lane)
        files = self._files_of(stream)
        while self._epochs is None or file < files * self._epochs:
            epoch, place = divmod(file, files)
            shard = int(self._order(epoch)[stream + place * self.streams])
            number, place = divmod(row, BLOCK)
            block = self._blocks.read(shard, number)
            if place < len(block):
                if self._rng_seed is not None:
                    seed = np.random.SeedSequence((self._rng_seed, epoch, shard, number))
                    place = int(np.random.Generator(np.random.PCG64(seed)).permutation(len(block))[place])
                return self._encode(block[place]), Cursor(file, row + self._lanes_each)
            file, row = file + 1, row - self._blocks.rows[shard]
        return None

    def epochs(self, cursor: Cursor, lane: int) -> float:
        return cursor.a / self._files_of(lane % self.streams)

    def _files_of(self, stream: int) -> int:
        return len(range(stream, self._files, self.streams))


class _Blocks:
    """Blocks of the files' samples, the latest kept: each lane goes through its own, lanes that share a file are near each
    other. A block that is evicted too early costs reading its file again from the beginning.
    """

    def __init__(self, data: IterableDataset) -> None:
        self._data = data
        self._kept: OrderedDict[tuple[int, int], list[Any]] = OrderedDict()
        self._open: OrderedDict[int, tuple[int, Iterator[Any]]] = OrderedDict()  # file to its next block, and the rest
        self.rows: dict[int, int] = {}
        """Samples of each file that has been read to its end."""
        self.lanes: set[int] = set()
        """That this process reads."""

    def read(self, shard: int, number: int) -> list[Any]:
        """The samples of a block; fewer at the end of the file, none beyond it."""
        while (shard, number) not in self._kept:
            if shard in self.rows and number * BLOCK >= self.rows[shard]:
                return []
            following, samples = self._open.pop(shard, (0, None))
            skips = samples is None or following > number
            if samples is None or skips:
                file = self._data.shard(num_shards=self._data.num_shards, index=shard)
                following, samples = number, _samples(file.skip(number * BLOCK))
            block = list(islice(samples, BLOCK))
            if len(block) == BLOCK:
                self._open[shard] = following + 1, samples
            elif block or following == 0 or not skips:
                self.rows[shard] = following * BLOCK + len(block)
            else:  # skipped to a place beyond the end: how far beyond is only known from reading it all
                self.rows[shard] = sum(
                    1 for _ in _samples(self._data.shard(num_shards=self._data.num_shards, index=shard))
                )
            self._keep(shard, following, block)
        self._kept.move_to_end((shard, number))
        return self._kept[shard, number]

    def _keep(self, shard: int, number: int, block: list[Any]) -> None:
        self._kept[shard, number] = block
        while len(self._kept) > max(BLOCKS_KEPT, 2 * len(self.lanes)):
            self._kept.popitem(last=False)
        while len(self._open) > max(FILES_OPEN, len(self.lanes)):
            self._open.popitem(last=False)


def _samples(data: IterableDataset) -> Iterator[dict[str, Any]]:
    """All of them. In batches, since iterating over a dataset in a dataloader's worker gives that worker's share alone."""
    for batch in data.iter(batch_size=READ_AT_ONCE):
        columns = list(batch)
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*batch.values(), strict=True))


def permutation(count: int, rng_seed: int | None, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch.

    Args:
        count: of documents, or files.
        rng_seed: None = as they come.
        epoch: from 0.
    """
    if rng_seed is None:
        return np.arange(count)
    generator = torch.Generator().manual_seed(rng_seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).numpy()
