"""``seed_report.json``: what was put into the model, from where, and how it was proved."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def write_json(file: Path, value: Any) -> None:
    """Write JSON to a temporary name, flush it to disk and rename it: the file is complete or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
