"""DCP's writer, whose errors say what the system said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class StepWriter(FileSystemWriter):
    """Writes into one folder and syncs every file.

    A write that fails inside ``torch.save`` surfaces as a RuntimeError about positions in an archive, which has the
    system's error as its context only; and contexts do not travel between ranks.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As the base class's; raises OSError with errno and the folder."""
        with self._errors_of_the_system():
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """As the base class's; raises OSError with errno and the folder."""
        with self._errors_of_the_system():
            super().finish(metadata, results)

    @contextmanager
    def _errors_of_the_system(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            error: Any = e
            while error is not None and not isinstance(error, OSError):
                error = error.__cause__ or error.__context__
            if error is None:
                raise
            raise OSError(error.errno, error.strerror, str(self.path)) from e
