"""``evaluations.jsonl``: one line for each export and its tasks, written beside training, and read for the trackers as it grows."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from flame_ext.errors import UserError

logger = logging.getLogger()  # torchtitan's: importing torchtitan for it would take seconds

EVALUATIONS_NAME = "evaluations.jsonl"


def read_evaluations(file: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file, none if it is not there. Raises UserError if it cannot be read."""
    where, lines = str(file), []
    try:
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], start=1):
            where = f"{file}, line {number}"
            lines.append(json.loads(text))
            if not isinstance(lines[-1]["step"], int):
                raise TypeError(f"step {lines[-1]['step']!r} is no number")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise UserError(f"{where}: cannot be read: {type(e).__name__}: {e}; move the file away") from e
    return lines


def record_evaluation(file: Path, line: dict[str, Any]) -> None:
    """Adds a line in the order of steps, and puts the file in place whole.

    An older line of the same step and tasks, and of the same run or path, goes: it was of an export that has been replaced, or is
    evaluated again.
    """
    with FileLock(file.with_name(f".{file.name}.lock")):
        others = [other for other in read_evaluations(file) if not _replaces(line, other)]
        lines = sorted([*others, line], key=lambda each: each["step"])
        temporary = file.with_name(f".{file.name}.tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(each, allow_nan=False) + "\n" for each in lines)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)


def figures_in(line: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of a line by name."""
    return {name: float(value) for name, value in line.items() if "/" in name and isinstance(value, int | float)}


def _replaces(line: dict[str, Any], other: dict[str, Any]) -> bool:
    if (line["step"], line.get("tasks")) != (other["step"], other.get("tasks")):
        return False
    exports = [each.get("export", {}) for each in (line, other)]
    (run, other_run), (path, other_path) = ([export.get(key) for export in exports] for key in ("run", "path"))
    return path == other_path or (run is not None and run == other_run)


class NewEvaluations:
    """The lines of a file that were not there before."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed: int | None = None
        self._known: list[str] = []
        self.take()

    def take(self) -> list[dict[str, Any]]:
        """Returns the lines that have come since the last call. What cannot be read is said."""
        changed = self._time()
        if changed == self._changed:
            return []
        self._changed = changed
        try:
            lines = read_evaluations(self._file)
        except UserError as e:
            logger.warning(str(e))
            return []
        known, self._known = self._known, [json.dumps(line) for line in lines]
        return [line for line, text in zip(lines, self._known, strict=True) if text not in known]

    def _time(self) -> int | None:
        try:
            return self._file.stat().st_mtime_ns
        except OSError:  # it is not there yet
            return None
