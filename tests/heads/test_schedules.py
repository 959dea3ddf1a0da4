"""The weight at the corners of its schedule."""

from __future__ import annotations

import pytest

from flame_ext.heads.future_encoder import scheduled_weight


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [
        (0, 0, [2, 2, 2, 2, 2, 2, 2, 2]),
        (4, 0, [0.5, 1, 1.5, 2, 2, 2, 2, 2]),
        (1, 0, [2, 2, 2, 2, 2, 2, 2, 2]),
        (0, 4, [2, 2, 2, 2, 1.5, 1, 0.5, 0]),
        (0, 1, [2, 2, 2, 2, 2, 2, 2, 0]),
        (4, 4, [0.5, 1, 1.5, 2, 1.5, 1, 0.5, 0]),
        (8, 8, [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]),  # they meet below the full weight
        (16, 0, [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]),  # longer than the run
        (0, 16, [0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
    ],
)
def test_weight_of_each_step(warmup: int, decay: int, expected: list[float]) -> None:
    assert [scheduled_weight(2.0, step, 8, warmup, decay) for step in range(1, 9)] == expected


def test_outside_of_the_run_it_stays_in_its_range() -> None:
    assert scheduled_weight(2.0, 0, 8, 4, 4) == 0
    assert scheduled_weight(2.0, 100, 8, 0, 4) == 0 and scheduled_weight(2.0, 100, 8, 4, 0) == 2
    assert scheduled_weight(0.0, 3, 8, 4, 4) == 0
