"""``seed_report.json``: what was put into the model, from where, and how it was proved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from flame_ext.files import write_json
from flame_ext.seeding.accounting import Account
from flame_ext.seeding.verify import Verification

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
    verification: Verification

    def write(self, folder: Path) -> None:
        """Write the file atomically."""
        write_json(folder / REPORT_NAME, asdict(self))
