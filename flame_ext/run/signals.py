"""How a run ends before its last step: stop signals, and the one agreement of all ranks that each step begins with.

A signal reaches ranks at different moments, data can end on one of them, and a save in the background can fail on one.
What follows from it has to happen on all ranks at the same step, or the others wait in a collective for ever.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

EXIT_PREEMPTED = 75
"""The exit code of a run that was told to stop, and has saved: start it again. EX_TEMPFAIL of sysexits.h."""

EXIT_FILE_VARIABLE = "FLAME_EXT_EXIT_FILE"
"""Names a file that is to hold the exit code: torchrun answers every failure of its workers with 1."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what torchrun and Slurm send before they kill


class StopSignals:
    """From :meth:`install` to :meth:`restore` a stop signal is remembered instead of ending the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """In the main thread, which is where Python runs handlers."""
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


class Circumstances(NamedTuple):
    """What a step begins with. True on any rank counts for all."""

    stop: bool = False
    """A stop signal has come: this step is the last one of this process."""
    data_ended: bool = False
    """There is not enough data for this step."""
    data_failed: bool = False
    """The data of this step can not be read."""
    save_failed: bool = False
    """A save in the background has failed."""


def agree(circumstances: Circumstances, device: torch.device) -> Circumstances:
    """The circumstances of all ranks. Collective: one all-reduce of four bytes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return circumstances
    flags = torch.tensor(circumstances, dtype=torch.uint8, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return Circumstances(*(bool(flag) for flag in flags.tolist()))


def note_exit_code(code: int) -> None:
    """Leave the exit code where the launching script looks for it, if it does."""
    if file := os.environ.get(EXIT_FILE_VARIABLE):
        Path(file).write_text(f"{code}\n")
