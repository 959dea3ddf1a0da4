"""Packs documents into sequences, in an order that does not depend on how many ranks or workers read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flame_ext.data.documents import Cursor, Documents, Tokens, without_marks
from flame_ext.errors import CheckpointError, ConfigError

IGNORED = -100  # the label of a position without one, which torch's cross-entropy ignores
PADDING = 2**30  # positions after a lane's end have document numbers from here on, each another one
MAX_EMPTY = 100_000  # consecutive documents without a token; more are a mistake and would take forever


@dataclass
class Lane:
    """A position in the data, as it is saved."""

    offset: int  # index of the next token in the current document; 0 between two documents
    taken: list[int]  # number of documents of each source that have been read to their end
    cursors: list[Cursor]  # position of the next document of each source: of the current one, if offset is not 0

    def numbers(self) -> list[int]:
        """All fields in one list: offset, then taken and cursor of each source."""
        return [self.offset, *(n for t, c in zip(self.taken, self.cursors, strict=True) for n in (t, *c))]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Lane:
        """The inverse of :meth:`numbers`."""
        sources = [numbers[i : i + 3] for i in range(1, len(numbers), 3)]
        return cls(numbers[0], [s[0] for s in sources], [Cursor(s[1], s[2]) for s in sources])


Packed = tuple[Tensor, list[int], bool]  # an item of PackedDocuments.sequences()


@dataclass(eq=False)
class PackedDocuments(IterableDataset[list[Packed]]):
    """Sequences of ``seq_len + 1`` tokens from the lanes ``of_rank``, in turn.

    The sequences of a global batch come from ``num_lanes`` *lanes*, one from each. A lane concatenates the documents of its share
    of each source, and reads the sources in proportion to their weights. A rank reads every ``dp_world_size``-th lane, and a worker
    every n-th of those. So the global batch is the same on any number of ranks, each process tokenises only its own documents, and
    the position in the data is a few integers for each lane. A lane whose sources have all ended yields empty sequences.
    """

    sources: Sequence[Documents]
    seq_len: int
    of_rank: InitVar[range]
    num_lanes: int
    _: KW_ONLY
    weights: Sequence[float] = ()  # positive, one for each source; empty = equal
    rng_seed: int = 0  # determines with which sources a lane begins
    eos_id: int | None = None  # also ends a document, since flat files of tokens hold many documents in one
    reverse: bool = False  # whether sequences are read from their last token to their first
    pad: bool = False  # whether a dataloader continues when its lanes have ended, since other ranks' may not have

    def __post_init__(self, of_rank: range) -> None:
        self.together = 1  # number of sequences in an item of an iteration
        self.weights = self.weights or [1.0] * len(self.sources)
        # The positions from which the next iteration starts, in the order of the lanes' turns. move() changes them; an iteration
        # does not, since workers read ahead of the training.
        self.lanes = {n: Lane(0, [0] * len(self.sources), [s.start(n) for s in self.sources]) for n in of_rank}

    def move(self, lane: int, numbers: Sequence[int]) -> None:
        """Set a lane's position (:meth:`Lane.numbers`) and make it the last in turn."""
        self.lanes.pop(lane)
        self.lanes[lane] = Lane.of(numbers)

    def __iter__(self) -> Iterator[list[Packed]]:
        """Yields lists of ``together`` items of :meth:`sequences`."""
        sequences = self.sequences()
        while True:
            yield list(islice(sequences, self.together))

    def sequences(self) -> Iterator[Packed]:
        """Yields without end a sequence of the next lane, the lane's number and position after it, and whether it has ended.

        A sequence is (2, T + 1): tokens, with their marks (``READ_ONLY``), which are ``IGNORED`` after the lane's end, and document
        numbers from 0. With ``reverse`` it is the same tokens backwards: a document begins with its EOS, and what is after the
        lane's end stays last. A worker reads every n-th lane, so that all workers, asked in turn, yield the same as one process.
        Raises CheckpointError if a lane's position is beyond the end of its document.
        """
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        readers = [_LaneReader(self, number, lane) for number, lane in [*self.lanes.items()][first::step]]
        for reader in cycle(readers):
            yield reader.sequence(), [reader.number, *reader.lane.numbers()], reader.finished()

    def steps(self) -> int:
        """Number of sequences that the longest of these lanes has left."""
        readers = [_LaneReader(self, number, lane) for number, lane in self.lanes.items()]
        steps = 0
        while readers := [reader for reader in readers if not reader.finished()]:
            for reader in readers:
                reader.sequence()
            steps += 1
        return steps


class _LaneReader:
    def __init__(self, data: PackedDocuments, number: int, lane: Lane) -> None:
        self.number, self.lane = number, Lane.of(lane.numbers())
        self._data = data
        # When the first document of each source is due (_document).
        self._phases = np.random.default_rng((data.rng_seed, number)).random(len(data.sources)).tolist()
        # The current document: its source, its tokens, and the position of the next one.
        self._open: tuple[int, Tokens, Cursor] | None = None

    def sequence(self) -> Tensor:
        """Returns the tokens and document numbers of the next sequence (:meth:`PackedDocuments.sequences`)."""
        lane, length = self.lane, self._data.seq_len + 1
        result, starts = np.full((2, length), IGNORED, dtype=np.int64), np.zeros(length, dtype=bool)
        tokens, doc_ids = result
        filled = 0
        while filled < length and (current := self._document()) is not None:
            source, document, following = current
            if lane.offset > len(document):
                raise CheckpointError(
                    f"the data position is token {lane.offset} of a document of {self._data.sources[source].name} that has "
                    f"{len(document)}: the step was saved with other data, data.rng_seed or tokenizer"
                )
            part = document[lane.offset : lane.offset + length - filled]
            tokens[filled : filled + len(part)] = part
            starts[filled] = True
            filled, lane.offset = filled + len(part), lane.offset + len(part)
            if lane.offset == len(document):
                lane.offset, lane.cursors[source], self._open = 0, following, None
                lane.taken[source] += 1
        starts[1:] |= without_marks(tokens[:-1]) == self._data.eos_id
        np.cumsum(starts, out=doc_ids)
        doc_ids -= 1
        if self._data.reverse and filled:
            tokens[:filled] = tokens[:filled][::-1]
            doc_ids[:filled] = doc_ids[filled - 1] - doc_ids[:filled][::-1]
        doc_ids[filled:] = PADDING + np.arange(length - filled)  # each its own document, so no token follows another
        return torch.from_numpy(result)

    def finished(self) -> bool:
        """Returns whether there is no token left."""
        return self._document() is None

    def _document(self) -> tuple[int, Tokens, Cursor] | None:
        """Returns the current document or, between two documents, the next one; None if all sources have ended."""
        lane, sources, empty = self.lane, self._data.sources, 0
        while self._open is None:
            # Documents of a source are due at equal distances, the first at a random phase. So the shares are in proportion to
            # the weights at any time, and lanes do not all begin with the same source.
            due = [(t + p) / w for t, p, w in zip(lane.taken, self._phases, self._data.weights, strict=True)]
            for source in sorted(range(len(sources)), key=due.__getitem__):
                if (found := sources[source].read(self.number, lane.cursors[source])) is not None:
                    break
            else:
                return None
            document, following = found
            if len(document):
                self._open = (source, document, following)
            else:
                lane.taken[source], lane.cursors[source], empty = lane.taken[source] + 1, following, empty + 1
                if empty > MAX_EMPTY:
                    raise ConfigError(f"{sources[source].name}: {empty} documents one after the other have no token")
        return self._open
