"""Exports while training goes on: another process converts a step that has been saved. Training waits for none of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torchtitan.tools.logging import logger

from flame_ext.run.signals import STOP_SIGNALS


class BackgroundExports:
    """One after the other, in the order in which steps are complete. For one rank.

    Args:
        folder: ``hf``; a step's export is ``step-N`` in it.
        options: of ``flame-ext convert``, beside source, destination and layout.
        due: whether a step is to be exported.
    """

    def __init__(self, folder: Path, options: list[str], due: Callable[[int], bool]) -> None:
        self.folder, self.options, self.due = folder, options, due
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._exports: dict[Path, Future[str | None]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False

    def start(self, step: Path, just_saved: bool) -> None:
        """Export ``step-N``, a complete step, if it is due.

        Args:
            step: its folder.
            just_saved: an export that is there is of an earlier step of that number, and is replaced; else it is kept.
        """
        number = int(step.name.removeprefix("step-"))
        if self.due(number) and (just_saved or not (self.folder / step.name).exists()):
            self._exports[step] = self._executor.submit(self._convert, step)

    def in_use(self) -> set[Path]:
        """Steps that are still to be read, and must not be deleted."""
        return {step for step, export in list(self._exports.items()) if not export.done()}

    def error(self) -> str | None:
        """What went wrong in an export that has ended."""
        results = (export.result() for export in list(self._exports.values()) if export.done())
        return next((result for result in results if result is not None), None)

    def cancel(self) -> None:
        """End the one that goes on, and start no other. The next run makes up for them."""
        self._cancelled = True
        if self._process is not None:
            self._process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _convert(self, step: Path) -> str | None:
        if self._cancelled:
            return None
        destination = self.folder / step.name
        if destination.is_dir():
            shutil.rmtree(destination)
        command = [sys.executable, "-m", "flame_ext.tools.main", "convert", str(step), str(destination), "--to", "hf"]
        # Away from the accelerators, and from the cores that training needs.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [*command, *self.options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            self._process = process
            output, errors = process.communicate()
        self._process = None
        if self._cancelled or -process.returncode in (*STOP_SIGNALS, signal.SIGINT):
            return None  # a cluster's signal goes to all processes of a job: this run ends, too, and the next makes up for it
        if process.returncode != 0:
            lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
            return f"the export of {step} failed: {lines[-1].removeprefix('error: ')}"
        logger.info(f"Exported {step.name} in the background: {output.strip().splitlines()[-1]}")
        return None
