"""Exports steps while training goes on: another process converts each saved step that is due, and training does not wait."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.distributed import describe
from flame_ext.run.signals import STOP_SIGNALS

_ATTEMPTS = 3  # at an export that signals end


def _there(_step: Path, export: Path) -> bool:
    return export.exists()


class BackgroundExports:
    """Converts steps to ``folder/step-N`` one after the other, in the order in which they are complete. For one rank.

    Args:
        options: options of ``flame-ext convert`` beside source, destination and layout.
        due: maps the number of a step to whether it is to be exported.
        exported: maps the folders of a step and of an export to whether this is that step's.
    """

    def __init__(
        self,
        folder: Path,
        options: list[str],
        due: Callable[[int], bool],
        exported: Callable[[Path, Path], bool] = _there,
    ) -> None:
        self.folder, self.options, self.due, self.exported = folder, options, due, exported
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._exports: dict[Path, Future[str | None]] = {}
        self._made: set[Path] = set()
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False

    def start(self, step: Path, just_saved: bool) -> None:
        """Exports the step in folder ``step`` if it is due; one that is there already is replaced if the step was ``just_saved``."""
        number = int(step.name.removeprefix("step-"))
        if self.due(number) and (just_saved or not self.exported(step, self.folder / step.name)):
            self._exports[step] = self._executor.submit(self._convert, step)

    def in_use(self) -> set[Path]:
        """Returns the folders of the steps whose export is not made, which must not be deleted: the next run may need them for it."""
        return {*self._exports} - self._made

    def running(self) -> bool:
        """Returns whether an export is being made, or waits for its turn."""
        return not all(export.done() for export in list(self._exports.values()))

    def error(self) -> str | None:
        """Returns the message of an export that has failed."""
        done = (export for export in list(self._exports.values()) if export.done() and not export.cancelled())
        return next((message for export in done if (message := export.result()) is not None), None)

    def cancel(self) -> None:
        """Ends the running export and starts no other; the next run makes them."""
        self._cancelled = True
        if self._process is not None:
            self._process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _convert(self, step: Path) -> str | None:
        """Makes one export; returns why it has failed. Never raises, since only the main rank would."""
        try:
            for _ in range(_ATTEMPTS):
                code, output, errors = (0, "", "") if self._cancelled else self._run(step)
                if self._cancelled:
                    return None
                if -code not in STOP_SIGNALS:
                    break
                # If a cluster signals all processes of a job, this run is about to end, and cancels it.
                logger.warning(f"{signal.Signals(-code).name} has ended the export of {step.name}: it begins again")
            lines = (output if code == 0 else errors).strip().splitlines() or [f"exit code {code}"]
            if code != 0:
                return f"the export of {step} failed: {lines[-1].removeprefix('error: ')}"
            logger.info(f"Exported {step.name} in the background: {lines[-1]}")
            self._made.add(step)
            return None
        except Exception as e:
            return f"the export of {step} failed: {describe(e)}"

    def _run(self, step: Path) -> tuple[int, str, str]:
        """Runs ``flame-ext convert`` on a step; returns its exit code, stdout and stderr."""
        command = [sys.executable, "-m", "flame_ext.tools.main", "convert", str(step), str(self.folder / step.name)]
        # Without the process to end with, one of a killed run would be left behind.
        command += ["--to", "hf", "--replace", "--end-with", str(os.getpid()), *self.options]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # training needs the rest
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            self._process = process
            if self._cancelled:  # since before there was a process to end
                process.terminate()
            output, errors = process.communicate()
        self._process = None
        return process.returncode, output, errors


def background_exports(
    config: FlameJobConfig, finishing: Callable[[], bool], exported: Callable[[Path, Path], bool] = _there
) -> BackgroundExports:
    """Returns the exports that ``export.interval`` asks for; ``finishing`` tells whether the step being saved is the last one."""

    def due(step: int) -> bool:
        # The ranks themselves export the last step.
        ends = config.checkpoint.last_save_in_hf and (finishing() or step >= config.training.steps)
        return config.export.interval > 0 and step % config.export.interval == 0 and not ends

    options = ["--assets", config.model.hf_assets_path, "--dtype", config.checkpoint.export_dtype]
    options += ["--max-shard-size", config.export.max_shard_size]
    options += ["--import", config.experimental.custom_import] if config.experimental.custom_import else []
    options += ["--follow-links"] if config.seed.follow_links else []
    options += ["--trust-remote-code"] if config.seed.trust_remote_code else []
    return BackgroundExports(Path(config.job.dump_folder) / "hf", options, due, exported)
