"""How long parts of a step take on the device, without making it wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Measures named parts of a step; a part that runs several times (accumulation) adds up.

    Args:
        device: on an accelerator, time is taken by events on its stream and read by :meth:`seconds` only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def restart(self) -> None:
        """Forget what was measured: a new step begins."""
        self._laps.clear()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._laps[name].append((begin, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since :meth:`restart`. Waits for the device."""
        if self._device.type == "cpu":
            return {name: sum(end - begin for begin, end in laps) for name, laps in self._laps.items()}
        torch.accelerator.synchronize()
        return {name: sum(b.elapsed_time(e) for b, e in laps) / 1e3 for name, laps in self._laps.items()}

    def _now(self) -> float | torch.Event:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event
