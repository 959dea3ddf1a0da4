"""The machine that a part of the accelerator's benchmark runs on, and what a part finds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.jobs import Shape

Results = Iterator[dict[str, Any]]


class Machine:
    """Where a part runs, and how large it is."""

    def __init__(self, scratch: Path, quick: bool) -> None:
        self.scratch, self.quick = scratch, quick
        there = torch.accelerator.is_available()
        self.device = torch.accelerator.current_accelerator() if there else torch.device("cpu")
        assert self.device is not None
        self.cuda = self.device.type == "cuda"
        self.backend = "inductor" if there else "aot_eager"
        self.shape = Shape(2, 64, 176, 4, 512, 2, 128) if quick else Shape(16, 2048, 8192, 16, 50304, 16, 2048)

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def milliseconds(self, action: Callable[[], object], runs: int = 7) -> float:
        """Median of a few runs, after two that do not count."""
        times = []
        for _ in range(2 + (2 if self.quick else runs)):
            self.wait()
            begin = time.perf_counter()
            action()
            self.wait()
            times.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(times[2:])

    def memory_gib(self, action: Callable[[], object]) -> float:
        """What an action needs beside what is there."""
        if not self.cuda:
            return 0.0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def check(name: str, case: str, holds: bool, measured: object = "") -> dict[str, Any]:
    return {"check": name, "case": case, "holds": bool(holds), "measured": str(measured)}
