"""Countdown: reach a target from numbers by arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flame_ext.errors import ConfigError
from flame_ext.lab.tasks.task import FIRST_WORD, Array, Example, Task

if TYPE_CHECKING:
    import numpy as np

_OPERATORS = ("+", "-", "*", "/")
_MARKS = (*_OPERATORS, "=", ",", ":")


@dataclass
class Countdown(Task):
    """``n_1 … n_k : target ,`` and then k - 1 equations, ``a + b = c ,``, each of which uses two of the numbers that are left.

    Results are whole, at least 0 and at most ``largest``. An answer is right if its equations hold, use each number once and end
    in the target: there may be several. Two examples are the same if they have the same numbers and the same target.
    """

    numbers: int = 3
    """k, how many numbers there are."""

    operand: int = 20
    """Numbers are between 1 and this one."""

    largest: int = 100
    """The greatest result and target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require({"numbers": 2, "operand": 1})
        if self.largest < self.operand:
            raise ConfigError(f"Countdown: largest must be >= operand = {self.operand}, got {self.largest}")

    def words(self) -> list[str]:
        return [*(str(number) for number in range(self.largest + 1)), *_MARKS]

    @property
    def prompt(self) -> int:
        return self.numbers + 3

    @property
    def length(self) -> int:
        return self.prompt + 6 * (self.numbers - 1) + 1

    def examples(self, rng: np.random.Generator) -> Iterator[Example]:
        ids = {word: FIRST_WORD + number for number, word in enumerate(self.words())}
        while True:
            numbers = rng.integers(1, self.operand + 1, size=self.numbers).tolist()
            if (found := self._solved(numbers, rng)) is not None:
                target, equations = found
                words = [*map(str, numbers), ":", str(target), ",", *equations]
                yield Example((tuple(sorted(numbers)), target), [ids[word] for word in words])

    def right(self, rows: Array, expected: Array) -> list[bool]:
        words = ["", "", *self.words()]
        return [row[-1] == 0 and self._holds([words[token] for token in row[:-1]]) for row in rows]

    def _solved(self, numbers: Sequence[int], rng: np.random.Generator) -> tuple[int, list[str]] | None:
        """A target and the words of equations that lead to it; None if a random choice has no result."""
        left, words = list(numbers), list[str]()
        while len(left) > 1:
            a, b = (left.pop(rng.integers(len(left))) for _ in range(2))
            operator = _OPERATORS[rng.integers(len(_OPERATORS))]
            if (result := self._result(a, operator, b)) is None:
                return None
            left.append(result)
            words += [str(a), operator, str(b), "=", str(result), ","]
        return left[0], words

    def _result(self, a: int, operator: str, b: int) -> int | None:
        if operator == "/":
            return a // b if b and a % b == 0 else None
        result = a + b if operator == "+" else a - b if operator == "-" else a * b
        return result if 0 <= result <= self.largest else None

    def _holds(self, words: Sequence[str]) -> bool:
        left, target = Counter(map(int, words[: self.numbers])), words[self.numbers + 1]
        equations = words[self.prompt :]
        result = ""
        for first in range(0, len(equations), 6):
            a, operator, b, equals, result, comma = equations[first : first + 6]
            if not (a.isdigit() and b.isdigit() and operator in _OPERATORS and (equals, comma) == ("=", ",")):
                return False
            used = Counter((int(a), int(b)))
            if not used <= left or str(self._result(int(a), operator, int(b))) != result:
                return False
            left = left - used + Counter((int(result),))
        return result == target
