"""The line that is logged while weights are read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from flame_ext.seeding.progress import ReadProgress
from tests.ranks import run_ranks

MIB = 2**20


def test_a_line_at_most_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    progress = ReadProgress(interval=5.0, clock=lambda: now[0])
    with caplog.at_level(logging.INFO):
        for seconds in range(1, 13):
            now[0] = float(seconds)
            progress(seconds * 10 * MIB, 120 * MIB)
    assert [r.getMessage() for r in caplog.records] == [
        "Reading weights: 50 of 120 MiB on this rank, 10 MiB/s",
        "Reading weights: 100 of 120 MiB on this rank, 10 MiB/s",
    ]


def report_in_rank() -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    progress = ReadProgress(interval=0.0)
    progress((3 - dist.get_rank()) * MIB, 4 * MIB)
    dist.barrier()
    line = progress.line(3 * MIB, 4 * MIB, 1.5)
    dist.barrier()
    dist.destroy_process_group()
    return line


def test_the_slowest_rank_is_named(tmp_path: Path) -> None:
    first = run_ranks(report_in_rank, 3, folder=tmp_path)[0]
    assert first.value == "Reading weights: 3 of 4 MiB on this rank, 2 MiB/s; slowest is rank 2 at 25%", first.output
