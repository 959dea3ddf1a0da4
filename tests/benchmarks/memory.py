"""Peak memory of a training process with the objective, against cross-entropy alone: ``python -m tests.benchmarks --only memory``.

On a CPU it is the peak of the resident set, a fresh process for each row: weights, gradients and Adam's moments and what the
step keeps. In float32 OLMo-1B's own shape takes 19 GB for the first three alone, so there its width and vocabulary are kept and its
depth is not; all of it is measured with everything in bfloat16. The device's rows are in ``steps-device``.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Table, quartiles, ratios, spread, verdict
from tests.benchmarks.jobs import PLAIN, Shape, column, one_by_one
from tests.benchmarks.seeding import arguments, cases, launch, make_checkpoint
from tests.benchmarks.steps import CE, FUTURE, JOBS, NATIVE, NO_FUTURE, QUICK, jobs_of

GOAL = 1.15
ON_CPU = Shape(layers=3, hidden=2048, intermediate=8192, heads=16, vocabulary=50304, batch=1, seq_len=512)
OLMO_1B = Shape(layers=16, hidden=2048, intermediate=8192, heads=16, vocabulary=50304, batch=1, seq_len=512)
HEADS = {
    "no head": PLAIN,
    "future predictor": (),
    "+ action layer": ("--action_layer.enable",),
    "summary_method = query": ("--future_encoder.summary_method=query",),
    "summary_method = reverse_lm": (
        "--future_encoder.summary_method=reverse_lm",
        "--future_encoder.reverse_model={backbone}",  # of the same shape
        "--future_encoder.assume_reverse",
    ),
    "mtp, parallel": (*NO_FUTURE, "--mtp.enable"),
    "mtp, sequential": (*NO_FUTURE, "--mtp.enable", "--mtp.kind=sequential"),
    **{name: (*NO_FUTURE, f"--{name}.enable") for name in ("token_order", "future_bag", "next_latent")},
}
IN_BFLOAT16 = ("--training.dtype=bfloat16", "--training.mixed_precision_param=bfloat16")


def measure(quick: bool = False) -> list[Table]:
    """The tables ``memory`` and ``memory-olmo-1b``."""
    shape, rounds = (QUICK, 1) if quick else (ON_CPU, 2)
    wanted = [NATIVE, CE, FUTURE] if quick else [name for name in JOBS if "teacher" not in name]
    with tempfile.TemporaryDirectory() as scratch:
        found = one_by_one(jobs_of(shape, Path(scratch), rows=wanted), steps=1, rounds=rounds, warm_up=2)
    heads = heads_table(quick)
    whole = QUICK if quick else OLMO_1B
    with tempfile.TemporaryDirectory() as scratch:
        in_bfloat16 = one_by_one(jobs_of(whole, Path(scratch), IN_BFLOAT16, (CE, FUTURE)), steps=1, rounds=1, warm_up=1)
    return [
        heads,
        table_of("memory", shape, found, "float32, one process; peak of the resident set over seeding and three steps"),
        table_of(
            "memory-olmo-1b",
            whole,
            in_bfloat16,
            "weights, gradients and moments in bfloat16, one process; peak of the resident set over seeding and two steps",
        ),
    ]


def heads_table(quick: bool = False) -> Table:
    """The table ``memory-heads``: what two ranks need for a dry run of the command with each head."""
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "backbone"
        make_checkpoint(folder, cases(quick)[0].config)
        for head, options in HEADS.items():
            begin = time.perf_counter()
            of_head = (option.format(backbone=folder) for option in options)
            command = *arguments(folder, f"{scratch}/{head}"), *of_head
            peak = launch(2, "-m", "flame_ext.train", *command)
            figures[head] = {"rank_gib": peak.largest_rank / 2**30, "all_gib": peak.total / 2**30}
            sizes = (f"{value:.2f}" for value in figures[head].values())
            rows.append([head, *sizes, f"{time.perf_counter() - begin:.0f}"])
            print(*rows[-1], sep=" | ", flush=True)
    columns = ["", "peak of a rank, GiB", "of both, GiB", "s from start to end"]
    notes = ["`seed.dry_run`, FSDP over two ranks, float32 parameters: build, seed, proofs; proportional set sizes."]
    return Table("memory-heads", columns, rows, notes, figures)


def table_of(name: str, shape: Shape, found: dict[str, list[dict[str, Any]]], what: str) -> Table:
    """Peaks of each row, to that of cross-entropy."""
    base = column(found[CE], "peak_gib")
    rows = []
    for row, taken in found.items():
        peaks = column(taken, "peak_gib")
        rows.append([row, spread(peaks), f"{quartiles(ratios(peaks, base))[1]:.3f}x"])
    ratio = quartiles(ratios(column(found[FUTURE], "peak_gib"), base))[1]
    notes = [
        f"{shape}, {what}, libraries included.",
        verdict("Memory with the future predictor", ratio, GOAL),
    ]
    return Table(name, ["", "peak GiB", "to cross-entropy"], rows, notes, found)
