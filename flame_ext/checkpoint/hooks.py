"""The protocol between the checkpoint manager and the run: everything that the manager asks of it."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from flame_ext.run.background_export import BackgroundExports
from flame_ext.run.followers import Followers


class CheckpointHooks(Protocol):
    """The run as its checkpoint manager sees it. The manager calls, in the order of a run's life:

    :meth:`seed` or :meth:`resumed` once, while loading; then, for each step that is due, :meth:`admit`, :meth:`facts` and,
    after the last one, :meth:`export`. Methods are called on all ranks at the same point unless they say otherwise, and
    raise a :class:`flame_ext.errors.UserError` on all ranks alike.
    """

    exports: BackgroundExports
    """Exports of complete steps while training goes on; the manager starts them on the main rank."""

    followers: Followers
    """What follows each export, wherever it is made; on the main rank."""

    def seed(self, path: str) -> None:
        """Put the weights of ``checkpoint.initial_load_path`` into the model. Collective.

        Raises:
            SeedError: they do not fit, or the proof fails.
        """

    def resumed(self, manifest: dict[str, Any], step: Path) -> Callable[[], None]:
        """Check a step before anything of it is loaded; the result is called after it was.

        Args:
            manifest: of the step.
            step: its folder.

        Raises:
            ConfigError: the step is of a run with other numbers.
            CheckpointError: its position in the data does not fit.
        """

    def read_rest(self, manifest: dict[str, Any], path: str) -> None:
        """Read from the source what steps do not hold, after a step is loaded: the weights beside adapters. Collective.

        Args:
            manifest: of the step.
            path: ``checkpoint.initial_load_path``.

        Raises:
            SeedError: the source is not that of the step's run.
        """

    def admit(self, step: int) -> bool:
        """Whether a step may be saved: its numbers are finite on every rank. Collective."""

    def facts(self) -> dict[str, Any]:
        """Returns the entries of a step's manifest beside step and files. Not collective."""

    def stopped(self) -> bool:
        """Whether this rank has got a stop signal. Not collective."""

    def is_exported(self, step: int) -> bool:
        """Whether the export of a step is there and can be read, by its headers. Collective."""

    def follow_exports(self, last: int, complete: bool, given_up: Collection[str]) -> None:
        """Follow those of this run's exports up to step ``last`` that are there and not followed yet, without those of the steps that
        the run has gone back behind, by name; ``complete`` tells whether the run ends with step ``last``. Collective.
        """

    def export(self, step: int) -> None:
        """Write the model as the Hugging Face folder ``hf/step-N``, and have it followed. Collective.

        Raises:
            CheckpointError: a file cannot be written.
        """
