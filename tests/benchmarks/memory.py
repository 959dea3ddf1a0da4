"""Peak memory of a training process with the objective, against cross-entropy alone: ``python -m tests.benchmarks --only memory``.

On a CPU it is the peak of the resident set, a fresh process for each row, after three steps: weights, gradients and Adam's
moments in float32 and what the step keeps. OLMo-1B's own shape takes 19 GB for the first three alone, so its width and
vocabulary are kept and its depth is not; what the objective adds (heads, the last hidden states, keys) does not grow with depth,
and what it is compared with does: the ratio of the full depth is the smaller one. The device's rows are in ``steps-device``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Table, quartiles, ratios, spread, verdict
from tests.benchmarks.jobs import Shape, column, one_by_one
from tests.benchmarks.steps import CE, FUTURE, JOBS, NATIVE, QUICK, jobs_of

GOAL = 1.15
ON_CPU = Shape(layers=3, hidden=2048, intermediate=8192, heads=16, vocabulary=50304, batch=1, seq_len=512)


def measure(quick: bool = False) -> list[Table]:
    """The table ``memory``."""
    shape, rounds = (QUICK, 1) if quick else (ON_CPU, 2)
    wanted = [NATIVE, CE, FUTURE] if quick else [name for name in JOBS if "teacher" not in name]
    with tempfile.TemporaryDirectory() as scratch:
        jobs = jobs_of(shape, Path(scratch))
        found = one_by_one({name: jobs[name] for name in wanted}, steps=1, rounds=rounds, warm_up=2)
    return [table_of(shape, found)]


def table_of(shape: Shape, found: dict[str, list[dict[str, Any]]]) -> Table:
    base = column(found[CE], "peak_gib")
    rows = []
    for name, taken in found.items():
        peaks = column(taken, "peak_gib")
        rows.append([name, spread(peaks), f"{quartiles(ratios(peaks, base))[1]:.3f}x"])
    ratio = quartiles(ratios(column(found[FUTURE], "peak_gib"), base))[1]
    notes = [
        f"{shape}, float32, one process; peak of the resident set over seeding and three steps, libraries included.",
        verdict("Memory with the future predictor", ratio, GOAL),
    ]
    return Table("memory", ["", "peak GiB", "to cross-entropy"], rows, notes, found)
