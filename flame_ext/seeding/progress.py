"""A line now and then while weights are read: bytes, rate, and the slowest rank."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist
from torchtitan.tools.logging import logger

_MIB = 2**20


class ReadProgress:
    """Called with each piece that was read; the main rank logs at most every ``interval`` seconds.

    Ranks read at their own pace, so they can not meet in collectives. Each leaves its count in the store that the
    process group was made with, and the main rank looks it up.

    Args:
        interval: seconds between two lines.
        clock: for tests.
    """

    def __init__(self, interval: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = interval, clock
        self._begin = self._last = clock()
        self._rank, self._world_size, self._store = 0, 1, None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("flame_ext/seeding", store)
            self._store.set(str(self._rank), "0/1")

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if now - self._last < self._interval and done < total:
            return
        self._last = now
        if self._store is not None:
            self._store.set(str(self._rank), f"{done}/{total}")
        if self._rank == 0 and done < total:
            logger.info(self.line(done, total, now - self._begin))

    def line(self, done: int, total: int, seconds: float) -> str:
        """What is logged."""
        line = f"Reading weights: {done / _MIB:,.0f} of {total / _MIB:,.0f} MiB on this rank"
        line += f", {done / _MIB / max(seconds, 1e-9):,.0f} MiB/s"
        slowest = self._slowest()
        return line if slowest is None else f"{line}; slowest is rank {slowest[0]} at {slowest[1]:.0%}"

    def _slowest(self) -> tuple[int, float] | None:
        if self._store is None:
            return None
        keys = [str(rank) for rank in range(self._world_size)]
        if not self._store.check(keys):
            return None
        counts = [value.decode().split("/") for value in self._store.multi_get(keys)]
        shares = [int(done) / max(1, int(total)) for done, total in counts]
        slowest = min(range(len(shares)), key=shares.__getitem__)
        return slowest, shares[slowest]
