"""A long sequence on 1, 2 and 4 ranks: peak memory of a rank and time of a step: ``python -m tests.benchmarks --only context``.

All ranks share this machine's cores, so the time says what the exchange costs, not what more machines would bring.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Table, spread
from tests.benchmarks.jobs import PLAIN, Job, Shape, column, running, save_backbone
from tests.benchmarks.steps import LINEAR, QUICK
from tests.ranks import free_port

LONG = Shape(layers=2, hidden=256, intermediate=688, heads=4, vocabulary=8192, batch=1, seq_len=8192)
JOBS = {"cross-entropy": Job("ours", tuple(PLAIN)), "+ future predictor": Job("ours", (LINEAR,))}
RANKS = (1, 2, 4)


def measure(quick: bool = False) -> list[Table]:
    """The table ``context``."""
    shape, steps = (QUICK, 1) if quick else (LONG, 1)
    found: dict[str, list[dict[str, Any]]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        backbone = save_backbone(Path(scratch) / "backbone", shape)
        for name, job in JOBS.items():
            for ranks in RANKS:
                options = (*job.options, f"--parallelism.context_parallel_degree={ranks}")
                taken = on_ranks(Job("ours", options), shape, str(backbone), f"{scratch}/{len(rows)}", ranks, steps)
                found[f"{name}, {ranks}"] = taken
                peak = max(column(taken, "peak_gib"))
                rows.append([name, str(ranks), f"{peak:.2f}", spread(column(taken, "wall"))])
    notes = [
        f"{shape}, float32; the largest peak of a rank's resident set, libraries included; slowest rank's seconds."
    ]
    return [Table("context", ["", "ranks", "peak GiB of a rank", "s a step"], rows, notes, found)]


def on_ranks(job: Job, shape: Shape, backbone: str, folder: str, ranks: int, steps: int) -> list[dict[str, Any]]:
    """Of each step after the first, the slowest rank's time and the largest peak so far."""
    port, found = free_port(), []
    jobs = {str(rank): (job, shape, backbone, None, folder, rank, ranks, port) for rank in range(ranks)}
    with running(jobs) as pipes:
        for step in range(1 + steps):
            for pipe in pipes.values():
                pipe.send(True)
            taken = [pipe.recv() for pipe in pipes.values()]
            if step:
                found.append({name: max(column(taken, name)) for name in ("wall", "peak_gib")})
    return found
