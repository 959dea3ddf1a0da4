"""A late token that is a function of early ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flame_ext.lab.tasks.task import FIRST_WORD, Example, Task

if TYPE_CHECKING:
    import numpy as np


@dataclass
class GlobalConstraint(Task):
    """``early`` random numbers, ``gap`` random numbers that mean nothing, then the sum of the early ones modulo ``modulus``.

    A guess is right once in ``modulus`` times. No early numbers are in two rows, so those of held-out rows are in none to train on:
    there are at most ``modulus ** early`` rows.
    """

    early: int = 6
    """The numbers that count."""

    gap: int = 8
    """The numbers between them and the answer."""

    modulus: int = 5
    """Numbers are below this one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require({"early": 1, "gap": 0, "modulus": 2})

    def words(self) -> list[str]:
        return [*(str(number) for number in range(self.modulus)), "="]

    @property
    def prompt(self) -> int:
        return self.early + self.gap + 1

    @property
    def length(self) -> int:
        return self.prompt + 2

    def examples(self, rng: np.random.Generator) -> Iterator[Example]:
        while True:
            numbers = rng.integers(self.modulus, size=self.early + self.gap).tolist()
            counting = tuple(numbers[: self.early])
            answer = sum(counting) % self.modulus
            tokens = [FIRST_WORD + number for number in numbers]
            yield Example(counting, [*tokens, FIRST_WORD + self.modulus, FIRST_WORD + answer])
