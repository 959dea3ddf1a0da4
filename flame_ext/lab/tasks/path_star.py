"""Paths from the centre of a star (Bachmann & Nagarajan 2024, https://arxiv.org/abs/2403.06963)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from flame_ext.errors import ConfigError
from flame_ext.lab.tasks.task import FIRST_WORD, Example, Task

if TYPE_CHECKING:
    import numpy as np


@dataclass
class PathStar(Task):
    """G(d, l): d paths of l nodes from one start; the edges in random order, start and goal, then the path to the goal.

    ``a b | c d | … / start goal = start n_2 … goal``. The node after the start is the only decision: whoever is told it finds the
    others in the list of edges, and a guess is right once in d times.
    """

    degree: int = 2
    """d, the number of paths."""

    path_length: int = 5
    """l, the number of nodes of a path, the start included."""

    nodes: int = 50
    """Nodes have random numbers below this one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require({"degree": 1, "path_length": 2})
        if self.nodes < self._used:
            raise ConfigError(
                f"PathStar: nodes must be >= {self._used}, the nodes of G({self.degree}, {self.path_length}), got {self.nodes}"
            )

    @property
    def _used(self) -> int:
        return 1 + self.degree * (self.path_length - 1)

    def words(self) -> list[str]:
        return [*(str(node) for node in range(self.nodes)), "|", "/", "="]

    @property
    def prompt(self) -> int:
        return 3 * self.degree * (self.path_length - 1) + 3

    @property
    def length(self) -> int:
        return self.prompt + self.path_length + 1

    def examples(self, rng: np.random.Generator) -> Iterator[Example]:
        bar, slash, equals = (FIRST_WORD + self.nodes + mark for mark in range(3))
        while True:
            start, *others = (FIRST_WORD + rng.permutation(self.nodes)[: self._used]).tolist()
            steps = self.path_length - 1
            paths = [[start, *others[first : first + steps]] for first in range(0, len(others), steps)]
            edges = [edge for path in paths for edge in pairwise(path)]
            goal = paths[0][-1]
            shuffled = [edges[i] for i in rng.permutation(len(edges))]
            listed = [token for edge in shuffled for token in (*edge, bar)]
            yield Example((frozenset(edges), goal), [*listed[:-1], slash, start, goal, equals, *paths[0]])
