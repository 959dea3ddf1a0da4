"""Stop signals, and the agreement of all ranks on them before each step, without which some would wait in a collective for ever."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from flame_ext.distributed import any_rank

EXIT_PREEMPTED = 75
"""The exit code of a run that a signal has stopped and that has saved: start it again. EX_TEMPFAIL of sysexits.h."""
EXIT_FILE_VARIABLE = "FLAME_EXT_EXIT_FILE"
"""Names a file for the exit code, since torchrun exits with 1 after every failure of its workers."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # torchrun, Slurm and Ctrl-C send them before they kill


class StopSignals:
    """Remembers a stop signal instead of ending the process, from :meth:`install` to :meth:`restore`."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        """What has stopped the run, for messages."""
        return "a signal to another rank" if self.received is None else self.received.name

    def install(self) -> None:
        """Sets the handlers, and lets signals in that were held back; Python allows it in the main thread only."""
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def ignore(self) -> None:
        """Ignores them from now on, without a moment in which one could end the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Sets the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


class Circumstances(NamedTuple):
    """The state in which a step begins. True on any rank counts for all ranks."""

    stop: bool = False  # a stop signal has come: this step is the last one of this process
    data_ended: bool = False  # there is not enough data for this step
    data_failed: bool = False  # the data of this step cannot be read
    save_failed: bool = False  # a file cannot be written: a save in the background, metrics; or the folder is gone
    labelled: bool = False  # a position of this step has a label


def agree(circumstances: Circumstances) -> Circumstances:
    """Combines the circumstances of all ranks. Collective."""
    return Circumstances(*any_rank(circumstances))


def note_exit_code(code: int) -> None:
    """Writes the exit code to the file that ``FLAME_EXT_EXIT_FILE`` names, if the launching script has set it. Never changes it."""
    if file := os.environ.get(EXIT_FILE_VARIABLE):
        try:
            Path(file).write_text(f"{code}\n")
        except OSError as e:
            print(
                f"warning: the exit code {code} cannot be written ({EXIT_FILE_VARIABLE}): {e}",
                file=sys.stderr,
                flush=True,
            )
