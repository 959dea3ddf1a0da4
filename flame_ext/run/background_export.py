"""Exports steps while training goes on: another process converts each saved step that is due, and training does not wait."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.run.signals import STOP_SIGNALS


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
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False

    def start(self, step: Path, just_saved: bool) -> None:
        """Exports the step in folder ``step`` if it is due; one that is there already is replaced if the step was ``just_saved``."""
        number = int(step.name.removeprefix("step-"))
        if self.due(number) and (just_saved or not self.exported(step, self.folder / step.name)):
            self._exports[step] = self._executor.submit(self._convert, step)

    def in_use(self) -> set[Path]:
        """Returns the folders of the steps that an export still reads, which must not be deleted."""
        return {step for step, export in list(self._exports.items()) if not export.done()}

    def error(self) -> str | None:
        """Returns the message of an export that has failed."""
        results = (export.result() for export in list(self._exports.values()) if export.done())
        return next((result for result in results if result is not None), None)

    def cancel(self) -> None:
        """Ends the running export and starts no other; the next run makes up for them."""
        self._cancelled = True
        if self._process is not None:
            self._process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _convert(self, step: Path) -> str | None:
        if self._cancelled:
            return None
        command = [
            sys.executable,
            "-m",
            "flame_ext.tools.main",
            "convert",
            str(step),
            str(self.folder / step.name),
            "--to",
            "hf",
        ]
        command += ["--replace", "--end-with", str(os.getpid())]  # else a killed run would leave it behind
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # training needs the rest
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*command, *self.options], env=environment, **pipes) as process:
            self._process = process
            output, errors = process.communicate()
        self._process = None
        if self._cancelled or -process.returncode in STOP_SIGNALS:
            return None  # a cluster signals all processes of a job: this run ends too
        if process.returncode != 0:
            lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
            return f"the export of {step} failed: {lines[-1].removeprefix('error: ')}"
        logger.info(f"Exported {step.name} in the background: {output.strip().splitlines()[-1]}")
        return None


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
