"""Exports steps while training goes on: another process converts each saved step that is due, and training does not wait."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.distributed import describe
from flame_ext.run.child import Child


def _there(_step: Path, export: Path) -> bool:
    return export.exists()


def _nothing(_export: Path) -> None:
    pass


class BackgroundExports:
    """Converts steps to ``folder/step-N`` one after the other, in the order in which they are complete. For one rank.

    Args:
        options: options of ``flame-ext convert`` beside source, destination and layout.
        due: maps the number of a step to whether it is to be exported.
        exported: maps the folders of a step and of an export to whether this is that step's.
        follow: gets the folder of each export that is made, on a thread of the main rank.
    """

    def __init__(
        self,
        folder: Path,
        options: list[str],
        due: Callable[[int], bool],
        exported: Callable[[Path, Path], bool] = _there,
        follow: Callable[[Path], None] = _nothing,
    ) -> None:
        self.folder, self.options, self.due, self.exported, self.follow = folder, options, due, exported, follow
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._exports: dict[Path, Future[str | None]] = {}
        self._made: set[Path] = set()
        self._child = Child()

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
        self._child.cancel()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _convert(self, step: Path) -> str | None:
        """Makes one export; returns why it has failed. Never raises, since only the main rank would."""
        command = ["convert", str(step), str(self.folder / step.name), "--to", "hf", "--replace", *self.options]
        try:
            outcome = self._child.run(command, f"the export of {step.name}")
            if outcome is None:
                return None
            if outcome.code != 0:
                return f"the export of {step} failed: {outcome.last_line}"
            logger.info(f"Exported {step.name} in the background: {outcome.last_line}")
            self._made.add(step)
            self.follow(self.folder / step.name)
            return None
        except Exception as e:
            return f"the export of {step} failed: {describe(e)}"


def background_exports(
    config: FlameJobConfig,
    finishing: Callable[[], bool],
    exported: Callable[[Path, Path], bool] = _there,
    follow: Callable[[Path], None] = _nothing,
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
    return BackgroundExports(Path(config.job.dump_folder) / "hf", options, due, exported, follow)
