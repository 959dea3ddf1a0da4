"""The evaluation, of models whose answers are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flame_ext.lab.data import TaskFolder, vocabulary_size
from flame_ext.lab.evaluate import forced, generated
from flame_ext.lab.tasks.creativity import Siblings
from flame_ext.lab.tasks.path_star import PathStar
from flame_ext.lab.tasks.task import Task


class Clever:
    """Says of each position the token that ``next_token`` makes of all before it, with the probability ``sure``."""

    device = torch.device("cpu")

    def __init__(self, task: Task, next_token: Any, sure: float = 0.9) -> None:
        self.vocab_size, self.next_token, self.sure = vocabulary_size(task), next_token, sure

    def __call__(self, tokens: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        probabilities = torch.full((*tokens.shape, self.vocab_size), (1 - self.sure) / (self.vocab_size - 1))
        for row, of_row in zip(tokens.tolist(), probabilities, strict=True):
            for t in range(len(row)):
                of_row[t, self.next_token(row[: t + 1])] = self.sure
        return SimpleNamespace(logits=probabilities.log())


def test_the_clever_hans_cheat_is_seen() -> None:
    """Whoever copies edges is right wherever the way has no fork, and at a fork once in d times."""
    task = PathStar(train=50, test=300, degree=2, path_length=4, nodes=12)

    def follow(before: list[int]) -> int:
        if len(before) <= task.prompt:
            return before[-3] if len(before) == task.prompt else 0
        edges = [(before[i], before[i + 1]) for i in range(0, task.prompt - 3, 3)]
        return next((b for a, b in edges if a == before[-1]), 0)  # at a fork the one that is listed first

    rows = TaskFolder(task, *task.rows())
    under_forcing = forced(Clever(task, follow), rows)
    fork = under_forcing["accuracy_by_position"][1]
    assert under_forcing["accuracy_by_position"] == [1, pytest.approx(0.5, abs=0.1), 1, 1, 1]
    assert under_forcing["accuracy_forced"] == pytest.approx((4 + fork) / 5)
    wrong = (1 - fork) * 300
    mean = -(math.log(0.9) * (1500 - wrong) + math.log(0.1 / (vocabulary_size(task) - 1)) * wrong) / 1500
    assert under_forcing["loss_answer"] == pytest.approx(mean, rel=1e-5)
    assert generated(Clever(task, follow), rows, 1000, 1.0, 0) == {"exact": fork}
    assert generated(Clever(task, follow), rows, 1, 1.0, 0)["exact"] in (0.0, 1.0)


def test_who_knows_the_way_is_right() -> None:
    task = PathStar(train=5, test=40, degree=3, path_length=3, nodes=12)
    rows = TaskFolder(task, *task.rows())
    known = {tuple(row[:t].tolist()): int(row[t]) for row in rows.test for t in range(1, task.length)}
    model = Clever(task, lambda before: known.get(tuple(before), 0))
    assert generated(model, rows, 40, 1.0, 0) == {"exact": 1.0} and forced(model, rows)["accuracy_forced"] == 1.0


def test_creative_generations_are_drawn_and_counted() -> None:
    task = Siblings(train=3, test=1, parents=1, children=4)
    rows = TaskFolder(task, *task.rows())

    class Uniform(Clever):
        """Draws two children, whichever, and says their parent."""

        def __call__(self, tokens: torch.Tensor, use_cache: bool) -> Any:
            logits = torch.full((*tokens.shape, self.vocab_size), -torch.inf)
            place = tokens.shape[1] - 1
            logits[:, -1, {0: slice(3, 7), 1: slice(3, 7), 2: slice(2, 3), 3: slice(0, 1)}[place]] = 0.0
            return SimpleNamespace(logits=logits)

    found = generated(Uniform(task, None), rows, 600, 1.0, 0)
    assert found["coherent"] == pytest.approx(3 / 4, abs=0.06) and found["new"] == pytest.approx(3 / 8, abs=0.06)
    assert found["creative"] == 3 / 600, "of six pairs three are trained on"
    assert (
        generated(Uniform(task, None), rows, 600, 1.0, 0) == found != generated(Uniform(task, None), rows, 600, 1.0, 1)
    )
    assert np.array_equal(rows.train[:, 0], np.full(3, task.prompts(1, np.random.default_rng(0))[0, 0]))
