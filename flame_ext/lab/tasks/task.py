"""What a task is: rows of tokens of one length, each a prompt and an answer, and what makes an answer right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

from flame_ext.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

EOS, UNKNOWN = "<eos>", "<unk>"
FIRST_WORD = 2  # the id of a task's first word; those before are EOS and UNKNOWN
_PATIENCE = 10_000  # draws in a row that were there before, after which a task is said to have no more examples

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


class Example(NamedTuple):
    """A row before its EOS, and what it is the same example as another by."""

    key: Hashable
    tokens: Sequence[int]


@dataclass
class Task(ABC):
    """Parameters of a task. Every row has ``length`` tokens, of which the first ``prompt`` are given and the last one is EOS."""

    evaluation: ClassVar[Literal["exact", "creative", "none"]] = "exact"
    """What is made of generations: the share of right ones, the share of coherent, new and distinct ones, or nothing."""

    train: int = 10_000
    """Rows to train on."""

    test: int = 500
    """Rows that are held out."""

    seed: int = 0
    """Determines the rows."""

    def __post_init__(self) -> None:
        self.require({"train": 1, "test": 1, "seed": 0})

    @abstractmethod
    def words(self) -> list[str]:
        """The vocabulary, from the id :data:`FIRST_WORD` on."""

    @property
    @abstractmethod
    def prompt(self) -> int:
        """The number of tokens that a generation begins with."""

    @property
    @abstractmethod
    def length(self) -> int:
        """The number of tokens of a row, its EOS included."""

    def examples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Yields examples at random, without end unless there are no more. For :meth:`rows`."""
        raise NotImplementedError

    def rows(self) -> tuple[Array, Array]:
        """Returns the rows to train on and those held out, (N, length), all different by their keys; ConfigError if there are too few."""
        import numpy as np  # not before there is something to write: every command declares the tasks

        found: dict[Hashable, Sequence[int]] = {}
        wanted, repeated = self.train + self.test, 0
        for key, tokens in self.examples(np.random.default_rng(self.seed)):
            repeated = repeated + 1 if key in found else 0
            found.setdefault(key, tokens)
            if len(found) == wanted or repeated == _PATIENCE:
                break
        if len(found) < wanted:
            raise ConfigError(
                f"{type(self).__name__}: train + test = {wanted}, but with these parameters only {len(found)} different examples "
                "were found; ask for fewer, or make the task larger"
            )
        rows = np.zeros((wanted, self.length), np.int64)  # EOS is 0
        rows[:, :-1] = list(found.values())
        return rows[self.test :], rows[: self.test]

    def right(self, rows: Array, expected: Array) -> list[bool]:
        """Whether each of (N, length) generated rows answers its prompt, which has the answer ``expected``, (N, length)."""
        return [bool(same) for same in (rows == expected).all(axis=1)]

    def require(self, least: dict[str, int]) -> None:
        """Raises a ConfigError if a parameter is below its least value."""
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{type(self).__name__}: {name} must be >= {value}, got {getattr(self, name)}")
