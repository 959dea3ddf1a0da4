"""Sources of documents. A lane's position in a source (:class:`Cursor`) is two integers, whatever the number of ranks and workers."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from datasets import IterableDataset
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

BLOCK = 1024  # documents that are permuted together where there is no random access
BLOCKS_KEPT = 16  # blocks in memory; if more, two for each lane that this process reads
FILES_OPEN = 64  # files kept open; if more, one for each lane that this process reads


READ_ONLY = 2**62
"""Added to a token that is read, but not predicted: it goes through cursors, packing and workers like any other."""


def without_marks(tokens: Any) -> Any:
    """Takes ``READ_ONLY`` off the tokens of an array or tensor that have it."""
    return tokens - READ_ONLY * (tokens >= READ_ONLY)


class Cursor(NamedTuple):
    """The position of a lane's next document in a source; each class of sources defines the meaning of the two integers."""

    a: int
    b: int


class Documents(Protocol):
    """A source of documents, which ``num_lanes`` lanes share without overlap."""

    name: str
    size: int  # number of documents or, if that is unknown, of bytes or files; a resumed run compares it

    def start(self, lane: int) -> Cursor:
        """The position of a lane's first document."""

    def read(self, lane: int, cursor: Cursor) -> tuple[Tokens, Cursor] | None:
        """The document at a lane's position and the position of its next one; None after its last document."""

    def epochs(self, cursor: Cursor, lane: int) -> float:
        """How many epochs the lane has read, with the fraction of the current one (by documents or files)."""


@dataclass
class IndexedDocuments:
    """Documents with random access: lane j of L reads documents j, j + L, j + 2L, … of the concatenated epochs' permutations.

    ``tokens_of`` maps an index in [0, ``size``) to the document's tokens. Without ``rng_seed``, documents are not permuted; without
    ``num_epochs``, they repeat without end.
    """

    name: str
    size: int
    tokens_of: Callable[[int], Tokens]
    num_lanes: int
    rng_seed: int | None
    num_epochs: int | None = None

    def __post_init__(self) -> None:
        self._order = _permutations(self.size, self.rng_seed)

    def start(self, lane: int) -> Cursor:
        return Cursor(lane, 0)

    def read(self, lane: int, cursor: Cursor) -> tuple[Tokens, Cursor] | None:
        epoch, place = divmod(cursor.a, self.size)
        if self.num_epochs is not None and epoch >= self.num_epochs:
            return None
        return self.tokens_of(int(self._order(epoch)[place])), Cursor(cursor.a + self.num_lanes, 0)

    def epochs(self, cursor: Cursor, lane: int) -> float:
        return (cursor.a - lane) / self.size


@dataclass
class StreamedDocuments:
    """Documents in files (the shards of ``data``) that are read sequentially.

    ``encode`` maps a sample, the number of its file and its row in it to its tokens.

    Files are dealt to as many streams as possible, of which each serves the same number of lanes, so that few ranks open a file.
    The q-th of the G lanes of a stream reads documents q, q + G, … Files are permuted, and documents in blocks of 1,024, unless
    ``rng_seed`` is None. ``nbytes`` is the size of all files, if it is known.

    ``Cursor(a, b)`` is document b of the stream's file a, counted over epochs; if b is beyond the file's end, the rest carries
    over to the next file. Resuming reads one file up to the block.
    """

    name: str
    data: IterableDataset
    encode: Callable[[dict[str, Any], int, int], Tokens]
    num_lanes: int
    rng_seed: int | None
    num_epochs: int | None
    nbytes: int | None

    def __post_init__(self) -> None:
        self._files = self.data.num_shards
        self.size = self._files if self.nbytes is None else self.nbytes
        streams = range(min(self.num_lanes, self._files), 0, -1)
        self.streams = next(count for count in streams if self.num_lanes % count == 0)
        self._order = _permutations(self._files, self.rng_seed)
        self._blocks = _Blocks(self.data)

    def start(self, lane: int) -> Cursor:
        return Cursor(0, lane // self.streams)

    def read(self, lane: int, cursor: Cursor) -> tuple[Tokens, Cursor] | None:
        (file, row), stream = cursor, lane % self.streams
        self._blocks.lanes.add(lane)
        files = self._files_of(stream)
        while self.num_epochs is None or file < files * self.num_epochs:
            epoch, place = divmod(file, files)
            shard = int(self._order(epoch)[stream + place * self.streams])
            number, place = divmod(row, BLOCK)
            block = self._blocks.read(shard, number)
            if place < len(block):
                if self.rng_seed is not None:
                    seed = np.random.SeedSequence((self.rng_seed, epoch, shard, number))
                    place = int(np.random.Generator(np.random.PCG64(seed)).permutation(len(block))[place])
                return self.encode(block[place], shard, number * BLOCK + place), Cursor(
                    file, row + self.num_lanes // self.streams
                )
            file, row = file + 1, row - self._blocks.rows[shard]
        return None

    def epochs(self, cursor: Cursor, lane: int) -> float:
        return cursor.a / self._files_of(lane % self.streams)

    def _files_of(self, stream: int) -> int:
        return len(range(stream, self._files, self.streams))


class _Blocks:
    """Reads blocks of the files' samples and keeps the latest ones, since lanes that share a file are near each other in it.

    A block that is evicted too early costs reading its file again from the beginning.
    """

    def __init__(self, data: IterableDataset) -> None:
        self._data = data
        self._kept: OrderedDict[tuple[int, int], list[Any]] = OrderedDict()
        # For each open file, the number of its next block and its samples from there on.
        self._open: OrderedDict[int, tuple[int, Iterator[Any]]] = OrderedDict()
        self.rows: dict[int, int] = {}  # number of samples of each file that has been read to its end
        self.lanes: set[int] = set()  # those that this process reads

    def read(self, shard: int, number: int) -> list[Any]:
        """Returns the samples of a block: fewer at the end of the file, none beyond it."""
        while (shard, number) not in self._kept:
            if shard in self.rows and number * BLOCK >= self.rows[shard]:
                return []
            following, samples = self._open.pop(shard, (number + 1, iter(())))
            skips = following > number
            if skips:
                following, samples = number, self._samples(shard, number * BLOCK)
            block = list(islice(samples, BLOCK))
            if len(block) == BLOCK:
                self._open[shard] = following + 1, samples
            elif block or following == 0 or not skips:
                self.rows[shard] = following * BLOCK + len(block)
            else:  # the block is beyond the file's end, whose place is only known from reading the whole file
                self.rows[shard] = sum(1 for _ in self._samples(shard))
            self._kept[shard, following] = block
            while len(self._kept) > max(BLOCKS_KEPT, 2 * len(self.lanes)):
                self._kept.popitem(last=False)
            while len(self._open) > max(FILES_OPEN, len(self.lanes)):
                self._open.popitem(last=False)
        self._kept.move_to_end((shard, number))
        return self._kept[shard, number]

    def _samples(self, shard: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        file = self._data.shard(num_shards=self._data.num_shards, index=shard).skip(skip)
        # In batches, since plain iteration in a dataloader's worker yields only that worker's share.
        for batch in file.iter(batch_size=64):
            yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


def _permutations(count: int, rng_seed: int | None) -> Callable[[int], NDArray[np.int64]]:
    """Maps an epoch (from 0) to the order of ``count`` documents or files in it; without ``rng_seed``, they are not permuted."""

    @lru_cache(maxsize=2)  # lanes may be in two epochs
    def order(epoch: int) -> NDArray[np.int64]:
        if rng_seed is None:
            return np.arange(count)
        generator = torch.Generator().manual_seed(rng_seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=generator).numpy()

    return order
