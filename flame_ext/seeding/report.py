"""``seed_report.json``: what was put into the model, from where, and how it was proved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flame_ext.files import write_json
from flame_ext.seeding.accounting import Account
from flame_ext.seeding.proof.parity import Verification

REPORT_NAME = "seed_report.json"


@dataclass(frozen=True)
class SeedReport:
    """The fields of the file, in its order."""

    source: str
    layout: str
    keys: Account
    bytes_read: int
    """Over all ranks."""
    seconds: float
    """Of the slowest rank, from the first header to the last weight; the proof is not counted."""
    world_size: int
    source_digest: str
    """Of the files' names, sizes and headers."""
    verification: Verification
    revision: str | None
    """The Hub's commit, for a source on the Hub."""
    weights_digest: str
    """Of the loaded values as they are in the model; does not depend on the number of ranks or the parallelism."""

    @property
    def identity(self) -> dict[str, Any]:
        """What later steps remember of where they come from."""
        return {
            "source": self.source,
            "revision": self.revision,
            "source_digest": self.source_digest,
            "weights_digest": self.weights_digest,
        }

    def write(self, folder: Path) -> None:
        """Write the file atomically."""
        write_json(folder / REPORT_NAME, asdict(self))
