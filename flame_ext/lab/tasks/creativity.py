"""Siblings and triangles of a hidden graph: generations have to be coherent, new and distinct (https://arxiv.org/abs/2504.15266)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, Literal

from flame_ext.errors import ConfigError
from flame_ext.lab.tasks.task import FIRST_WORD, Array, Example, Task

if TYPE_CHECKING:
    import numpy as np

_DIGITS = 10  # words of a seed


@dataclass
class Creative(Task):
    """Base of tasks whose answers are creative if they are coherent, not in the training set, and said once."""

    evaluation: ClassVar[Literal["exact", "creative", "none"]] = "creative"

    seed_tokens: int = 0
    """Random digits that each row begins with, as noise to condition on (seed-conditioning). 0 = none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require({"seed_tokens": 0})

    @property
    def prompt(self) -> int:
        return 1 + self.seed_tokens

    @abstractmethod
    def known(self, answer: Sequence[int]) -> Hashable | None:
        """What the tokens between prompt and EOS say, however it is said; None if it is not coherent."""

    def prompts(self, count: int, rng: np.random.Generator) -> Array:
        """(count, prompt) beginnings of rows."""
        import numpy as np

        begin = FIRST_WORD + len(self.words()) - 1 - _DIGITS
        digits = begin + 1 + rng.integers(_DIGITS, size=(count, self.seed_tokens))
        return np.concatenate([np.full((count, 1), begin), digits], axis=1)

    def judged(self, rows: Array, train: Array) -> dict[str, float]:
        """Shares of (N, length) generated rows: ``coherent``, and of them ``new`` ones; ``creative`` also counts each but once."""
        seen = {self.known(row[self.prompt : -1].tolist()) for row in train}
        said = [self.known(row[self.prompt : -1].tolist()) if row[-1] == 0 else None for row in rows]
        coherent = [answer for answer in said if answer is not None]
        new = [answer for answer in coherent if answer not in seen]
        return {
            name: len(found) / len(rows)
            for name, found in (("coherent", coherent), ("new", new), ("creative", set(new)))
        }

    def _marks(self) -> list[str]:
        return [":", *(f"s{digit}" for digit in range(_DIGITS))]

    def _example(self, key: Hashable, answer: Iterable[int], rng: np.random.Generator) -> Example:
        return Example(key, [*self.prompts(1, rng)[0].tolist(), *answer])


@dataclass
class Siblings(Creative):
    """Two children of one parent, and then the parent: ``: child child parent``, which has to be chosen first."""

    parents: int = 20
    """Number of parents."""

    children: int = 50
    """Number of each parent's children."""

    train: int = 5_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require({"parents": 1, "children": 2})

    def words(self) -> list[str]:
        kinds = (("p", self.parents), ("c", self.parents * self.children))
        return [*(f"{kind}{i}" for kind, count in kinds for i in range(count)), *self._marks()]

    @property
    def length(self) -> int:
        return self.prompt + 4

    def examples(self, rng: np.random.Generator) -> Iterator[Example]:
        import numpy as np

        first = FIRST_WORD + self.parents
        pairs = np.array(list(combinations(range(self.children), 2)))
        parent_of, pair_of = np.divmod(rng.permutation(self.parents * len(pairs)), len(pairs))
        for parent, pair in zip(parent_of.tolist(), pairs[pair_of], strict=True):
            one, other = (first + parent * self.children + rng.permutation(pair)).tolist()
            yield self._example(frozenset((one, other)), (one, other, FIRST_WORD + parent), rng)

    def known(self, answer: Sequence[int]) -> Hashable | None:
        one, other, parent = answer
        first = FIRST_WORD + self.parents
        within = all(0 <= child - first < self.parents * self.children for child in (one, other)) and one != other
        of_parent = all((child - first) // self.children == parent - FIRST_WORD for child in (one, other))
        return frozenset((one, other)) if within and of_parent else None


@dataclass
class Triangles(Creative):
    """The three edges of a triangle of a random graph: ``: a b b c c a``. Every edge is a row to train on, too, said three times.

    ``train`` and ``test`` count triangles.
    """

    nodes: int = 100
    """Nodes of the graph."""

    neighbours: int = 30
    """The mean number of a node's neighbours."""

    train: int = 2_000

    def __post_init__(self) -> None:
        import numpy as np

        super().__post_init__()
        self.require({"nodes": 3, "neighbours": 1})
        if self.neighbours >= self.nodes:
            raise ConfigError(f"Triangles: neighbours must be < nodes = {self.nodes}, got {self.neighbours}")
        linked = np.random.default_rng((self.seed, 1)).random((self.nodes, self.nodes)) < self.neighbours / (
            self.nodes - 1
        )
        self._linked = np.triu(linked, 1) | np.triu(linked, 1).T

    def words(self) -> list[str]:
        return [*(str(node) for node in range(self.nodes)), *self._marks()]

    @property
    def length(self) -> int:
        return self.prompt + 7

    def rows(self) -> tuple[Array, Array]:
        import numpy as np

        train, test = super().rows()
        rng = np.random.default_rng((self.seed, 2))
        edges = FIRST_WORD + rng.permuted(np.argwhere(np.triu(self._linked)), axis=1)
        ends = np.zeros((len(edges), 1), np.int64)
        return np.concatenate(
            [train, np.concatenate([self.prompts(len(edges), rng), *[edges] * 3, ends], axis=1)]
        ), test

    def examples(self, rng: np.random.Generator) -> Iterator[Example]:
        import numpy as np

        found = [
            (a, b, c)
            for a, b in np.argwhere(np.triu(self._linked))
            for c in np.flatnonzero(self._linked[a] & self._linked[b])
            if c > b
        ]
        for i in rng.permutation(len(found)):
            a, b, c = (FIRST_WORD + rng.permutation(found[i])).tolist()
            yield self._example(frozenset((a, b, c)), (a, b, b, c, c, a), rng)

    def known(self, answer: Sequence[int]) -> Hashable | None:
        a, b, b_again, c, c_again, a_again = (token - FIRST_WORD for token in answer)
        closed = (a, b, c) == (a_again, b_again, c_again) and all(0 <= node < self.nodes for node in (a, b, c))
        linked = closed and all(self._linked[pair] for pair in ((a, b), (b, c), (c, a)))
        return frozenset(answer) if linked else None
