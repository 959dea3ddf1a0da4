"""Runs a command of ``flame-ext`` beside training: one process at a time, that leaves devices and cores to it and ends with the run."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torchtitan.tools.logging import logger

from flame_ext.run.signals import STOP_SIGNALS

PROGRAM = ("-m", "flame_ext.tools.main")
_ATTEMPTS = 3  # at a command that signals end
_BESIDE_TRAINING = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # training needs the rest


class Outcome(NamedTuple):
    """What a process has left."""

    code: int
    output: str
    errors: str

    @property
    def last_line(self) -> str:
        """The last line of its output, or, if it has failed, the error that it has said, or else the last line of its errors."""
        lines = (self.output if self.code == 0 else self.errors).strip().splitlines()
        said = [line for line in lines if line.startswith("error: ")]  # a library may say more after it
        return (said or lines or [f"exit code {self.code}"])[-1].removeprefix("error: ")


class Child:
    """Runs commands, one after the other, of one thread; :meth:`cancel` may be called by another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False

    def run(
        self, arguments: list[str], what: str, environment: Mapping[str, str] = MappingProxyType({})
    ) -> Outcome | None:
        """Runs ``flame-ext`` with ``arguments`` and ``--end-with``; returns None if it was cancelled.

        Args:
            what: says what it does, for messages.
            environment: variables beside, or instead of, those that leave devices and cores to training.
        """
        # Without the process to end with, one of a killed run would be left behind.
        command = [sys.executable, *PROGRAM, *arguments, "--end-with", str(os.getpid())]
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        pipes |= {"env": {**os.environ, **_BESIDE_TRAINING, **environment}}
        for _ in range(_ATTEMPTS):
            if self._cancelled:
                return None
            with subprocess.Popen(command, **pipes) as process:
                self._process = process
                if self._cancelled:  # since before there was a process to end
                    process.terminate()
                output, errors = process.communicate()
            self._process = None
            if self._cancelled:
                return None
            if -process.returncode not in STOP_SIGNALS:
                break
            # If a cluster signals all processes of a job, this run is about to end, and cancels it.
            logger.warning(f"{signal.Signals(-process.returncode).name} has ended {what}: it begins again")
        return Outcome(process.returncode, output, errors)

    def cancel(self) -> None:
        """Ends the running process and starts no other."""
        self._cancelled = True
        if self._process is not None:
            self._process.terminate()
