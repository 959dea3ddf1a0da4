"""Documents packed into sequences, in an order that does not depend on how many ranks or workers read them.

The global batch is a fixed number of *lanes*: lane j packs its documents end to end and gives one sequence to each step. Of
each source it has its own share, and it takes them in proportion to the sources' weights. A rank reads every
``dp_world_size``-th lane and a worker every n-th of those, so a step's global batch is the same set of sequences on one
rank and on sixty-four, each process tokenises only its own documents, and the position in the data is a few integers for
each lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flame_ext.data.documents import Cursor, Documents, Tokens
from flame_ext.errors import CheckpointError, ConfigError

IGNORED = -100
"""The label of a position that has none, as cross-entropies have it."""

PADDING = 2**30
"""Document numbers from here on are of positions after a lane's end, each a document of its own."""

MAX_EMPTY = 100_000  # documents without a token, one after the other: more are a mistake, and would be a hang


@dataclass
class Lane:
    """A position in the data, as it is saved."""

    offset: int
    """Of the next token in the document that is being read; 0 between two documents."""
    taken: list[int]
    """How many documents of each source have been read to their end."""
    cursors: list[Cursor]
    """Where the next document of each source is: the one that is being read, if ``offset`` is not 0."""

    def numbers(self) -> list[int]:
        """All of it, flat: offset, then taken and cursor of each source."""
        return [self.offset, *(n for t, c in zip(self.taken, self.cursors, strict=True) for n in (t, *c))]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Lane:
        """From :meth:`numbers`."""
        sources = [numbers[i : i + 3] for i in range(1, len(numbers), 3)]
        return cls(numbers[0], [s[0] for s in sources], [Cursor(s[1], s[2]) for s in sources])


Packed = tuple[Tensor, list[int], bool]
"""A sequence, see :meth:`PackedDocuments.sequences`."""


class PackedDocuments(IterableDataset[list[Packed]]):
    """Sequences of ``seq_len + 1`` tokens from this rank's lanes, in turn.

    A lane ends when its sources have; from then on its sequences are empty, and the others go on.

    Args:
        sources: of documents, each for ``num_lanes`` lanes.
        weights: of the sources, positive: shares of documents.
        seq_len: T.
        lanes: this rank's lanes.
        num_lanes: of all ranks together: sequences in a global batch.
        rng_seed: determines how lanes begin to mix.
        eos_id: a document ends after it, too: flat files of tokens hold many in one; None = there is none.
        pad: whether a dataloader goes on when all its lanes have ended: others' have not.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        seq_len: int,
        lanes: range,
        num_lanes: int,
        *,
        weights: Sequence[float] | None = None,
        rng_seed: int | None = None,
        eos_id: int | None = None,
        pad: bool = False,
    ) -> None:
        self.sources, self.seq_len, self.eos_id, self.pad = sources, seq_len, eos_id, pad
        self.num_lanes = num_lanes
        self.together = 1
        """How many sequences an iteration yields at once."""
        self.weights = [1.0] * len(sources) if weights is None else list(weights)
        self._rng_seed = rng_seed or 0
        self.lanes = {n: Lane(0, [0] * len(sources), [source.start(n) for source in sources]) for n in lanes}
        """Where the next iteration begins, in the order of the lanes' turns. Iterating does not move it: a dataloader's
        workers read ahead, and only what reaches the training counts (:meth:`move`)."""

    def move(self, lane: int, numbers: Sequence[int]) -> None:
        """Put a lane to a position (:meth:`Lane.numbers`) and make its turn the last."""
        self.lanes.pop(lane)
        self.lanes[lane] = Lane.of(numbers)

    def __iter__(self) -> Iterator[list[Packed]]:
        """:meth:`sequences`, several at once."""
        sequences = self.sequences()
        while True:
            yield list(islice(sequences, self.together))

    def sequences(self) -> Iterator[Packed]:
        """Yields without end a sequence, (2, T + 1): tokens, ``IGNORED`` after a lane's end, and document numbers from 0; the
        number of its lane with that one's position after it; and whether the lane has ended. A worker yields those of every
        n-th lane, so that all of them together, asked in turn, yield the same as one process.

        Raises:
            CheckpointError: a lane was put (:meth:`move`) beyond the end of a document.
        """
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        readers = [_LaneReader(self, number, lane) for number, lane in [*self.lanes.items()][first::step]]
        for reader in cycle(readers):
            yield reader.sequence(), [reader.number, *reader.lane.numbers()], reader.finished()

    def steps(self, limit: int | None = None) -> int:
        """How many sequences the longest of these lanes has, from where they are, at most ``limit``."""
        longest = 0
        for number, lane in self.lanes.items():
            reader = _LaneReader(self, number, lane)
            count = 0
            while count != limit and not reader.finished():
                reader.sequence()
                count += 1
            longest = max(longest, count)
        return longest

    def phases(self, lane: int) -> list[float]:
        """Where in its period of each source a lane begins, in [0, 1)."""
        return np.random.default_rng((self._rng_seed, lane)).random(len(self.sources)).tolist()


class _LaneReader:
    def __init__(self, data: PackedDocuments, number: int, lane: Lane) -> None:
        self.number, self.lane = number, Lane.of(lane.numbers())
        self._data, self._phases = data, data.phases(number)
        self._open: tuple[int, Tokens, Cursor] | None = (
            None  # the document: its source, its tokens, where the next one is
        )

    def sequence(self) -> Tensor:
        """See :meth:`PackedDocuments.sequences`."""
        length = self._data.seq_len + 1
        result, starts = np.full((2, length), IGNORED, dtype=np.int64), np.zeros(length, dtype=bool)
        tokens, doc_ids = result
        filled = 0
        while filled < length:
            current = self._document()
            if current is None:
                break
            source, document, following = current
            lane = self.lane
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
        starts[1:] |= tokens[:-1] == self._data.eos_id
        np.cumsum(starts, out=doc_ids)
        doc_ids -= 1
        doc_ids[filled:] = PADDING + np.arange(length - filled)  # nothing follows anything there
        return torch.from_numpy(result)

    def finished(self) -> bool:
        """Whether there is no token left."""
        return self._document() is None

    def _document(self) -> tuple[int, Tokens, Cursor] | None:
        """The document that is being read, or the next one; None: all sources have ended."""
        lane, sources = self.lane, self._data.sources
        empty = 0
        while self._open is None:
            # Each source's documents are due at equal distances, the first at a random place: shares are as asked at
            # any time, and lanes do not all begin with the same source.
            due = [(t + p) / w for t, p, w in zip(lane.taken, self._phases, self._data.weights, strict=True)]
            for source in sorted(range(len(sources)), key=due.__getitem__):
                found = sources[source].read(self.number, lane.cursors[source])
                if found is not None:
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
