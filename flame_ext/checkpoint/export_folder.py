"""Writes a folder that one process at a time may write, under a name of its own until it is complete; an export also records its step."""

import errno
import hashlib
import json
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torchtitan.tools.logging import logger

from flame_ext.checkpoint.steps import MANIFEST_NAME, put_in_place, temporary_path
from flame_ext.errors import CheckpointError, UserError
from flame_ext.files import write_json
from flame_ext.seeding.sources.safe_files import read_json

RECORD_NAME = "export.json"
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_SAID_AFTER = 2.0  # seconds of waiting for another process

Origin = dict[str, Any]
"""The step of which an export is: run, number, and a digest of the sizes and SHA-256 of its files."""


class ExportFolder:
    """Writes ``final``. For one rank; call :meth:`close` in any case.

    Args:
        replace: whether an older folder is replaced, once the new one is complete.
    """

    def __init__(self, final: Path, replace: bool) -> None:
        self.final, self.replace = final, replace
        self._lock: FileLock | None = None
        self._temporary: Path | None = None

    def open(self) -> Path:
        """Waits for other processes that write the same folder; returns an empty one. What killed ones have left is removed."""
        self.final.parent.mkdir(parents=True, exist_ok=True)
        prefix = temporary_path(self.final)
        lock = FileLock(prefix.with_name(f"{prefix.name}.lock"), fallback_to_soft=False)
        try:
            try:
                lock.acquire(timeout=_SAID_AFTER)
            except Timeout:
                logger.warning(f"Waiting for another process that writes {self.final}")
                lock.acquire()
            self._lock = lock
        except OSError as e:
            if e.errno not in NO_FLOCK:
                raise
            Path(lock.lock_file).unlink(missing_ok=True)
        if not self.replace and (self.final.exists() or self.final.is_symlink()):
            raise CheckpointError(
                f"{self.final}: is there already and is not overwritten; name another folder or remove it"
            )
        own = re.compile(re.escape(prefix.name) + "(-[0-9a-f]{8})?")
        for left in prefix.parent.iterdir() if self._lock is not None else []:
            if own.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        self._temporary = prefix.with_name(f"{prefix.name}-{uuid.uuid4().hex[:8]}")
        self._temporary.mkdir()
        return self._temporary

    def publish(self, origin: Origin | None) -> None:
        """Gives the folder its name, with a record of its files if it is an export of a step, and looks whether they are there."""
        assert self._temporary is not None
        files = _sizes(self._temporary)
        if origin is not None:
            write_json(self._temporary / RECORD_NAME, {**origin, "files": files})
        put_in_place(self.final, self._temporary)
        found = _sizes(self.final)
        if found != files:
            raise CheckpointError(
                f"{self.final}: holds {sorted(found)} after it was written, expected {sorted(files)}; did another process "
                "write there? Remove it and start again"
            )

    def close(self) -> None:
        """Removes what has not been published, and lets others write."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if self._lock is not None:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()
        self._temporary = self._lock = None


def origin_of(step: Path) -> Origin | None:
    """Returns what the export of the step in a folder records of it; None without a manifest."""
    if not (step / MANIFEST_NAME).is_file():
        return None
    manifest = read_json(step / MANIFEST_NAME, "file")
    files = json.dumps(manifest.get("files"), sort_keys=True)
    return {
        "run": manifest.get("run"),
        "step": manifest.get("step"),
        "files_sha256": hashlib.sha256(files.encode()).hexdigest(),
    }


def why_not_exported(step: Path, export: Path) -> str | None:
    """Returns why a folder is not the complete export of the step in another; None if it is one, as far as names and sizes tell."""
    try:
        if not (export / RECORD_NAME).is_file():
            if not export.is_dir():
                return f"{export} is not there"
            has_lineage = "lineage" in read_json(step / MANIFEST_NAME, "file")
            return f"{export} has no {RECORD_NAME}" if has_lineage else None  # older versions wrote neither
        record, origin = read_json(export / RECORD_NAME, "file"), origin_of(step)
        if origin is None or any(record.get(name) != value for name, value in origin.items()):
            return f"{export} is the export of another step"
        # Its card and configuration may be edited, and other files be added.
        found = _sizes(export)
        for name, size in record["files"].items():
            if name not in found or (found[name] != size and name.endswith(".safetensors")):
                return f"{export} does not hold {name} as its {RECORD_NAME} lists it"
    except (OSError, KeyError, TypeError, AttributeError, UserError) as e:
        return f"{export} cannot be read ({e})"
    return None


def exports_of(folder: Path, steps: Path, run: str | None, last: int) -> list[Path]:
    """Returns the exports in a folder that are of a run's steps up to ``last``, by number; of a step that is still there, only its own."""
    found: dict[int, Path] = {}
    for export in folder.glob("step-*"):
        with suppress(UserError, OSError, ValueError):  # of an older version, or not an export
            record = read_json(export / RECORD_NAME, "file")
            number, step = int(str(record.get("step"))), steps / export.name
            other = step.is_dir() and why_not_exported(step, export)
            if export.name == f"step-{number}" and number <= last and record.get("run") == run and not other:
                found[number] = export
    return [found[number] for number in sorted(found)]


def recorded(export: Path) -> dict[str, Any]:
    """Returns what an export records: its run, step and files. Raises a CheckpointError if it records none of a step."""
    try:
        record = read_json(export / RECORD_NAME, "file")
        if (
            f"step-{record['step']}" == export.name
            and record["run"]
            and all((export / name).is_file() for name in record["files"])
            # One that others have made may name any file of this machine.
            and not any(".." in Path(name).parts or Path(name).is_absolute() for name in record["files"])
        ):
            return record
        problem = "does not fit the folder's name or files"
    except (OSError, KeyError, TypeError, UserError) as e:
        problem = f"cannot be read ({e})"
    raise CheckpointError(
        f"{export}: its {RECORD_NAME} {problem}, so that it is no export of a step; export the step again"
    )


def export_identity(export: Path) -> str:
    """Returns a digest of what an export records: its step, and the sizes of its files; empty where older versions recorded nothing."""
    record = export / RECORD_NAME
    return hashlib.sha256(record.read_bytes()).hexdigest() if record.is_file() else ""


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the size of each file (bytes) by its path in the folder, without the record."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.stat().st_size for p in files if p != folder / RECORD_NAME}
