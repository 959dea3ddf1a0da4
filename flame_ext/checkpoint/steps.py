"""A step exists completely or not at all: it is written under a temporary name and renamed once its manifest is in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame_ext.errors import CheckpointError
from flame_ext.files import write_json

MANIFEST_NAME = "manifest.json"
_STEP_NAME = re.compile(r"step-(\d+)")
_REPLACED = ".replaced-"  # an old step or export, for the moment between two renames


@dataclass(frozen=True)
class CompleteStep:
    """A folder ``step-N`` whose manifest names exactly the files that lie in it."""

    step: int
    path: Path
    manifest: dict[str, Any]


def find_steps(folder: Path) -> tuple[list[CompleteStep], list[str]]:
    """The complete steps in a checkpoint folder, oldest first, and one line for each ``step-N`` that was passed over."""
    steps, passed_over = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _STEP_NAME.fullmatch(path.name)
        if match is None:
            continue
        try:
            steps.append(CompleteStep(int(match[1]), path, read_manifest(path)))
        except CheckpointError as e:
            passed_over.append(f"{path.name}: {e}")
    return sorted(steps, key=lambda s: s.step), passed_over


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a step.

    Raises:
        CheckpointError: if it is absent or unreadable, or if a file that it lists is absent or of another size.
    """
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_bytes())
        files = dict(manifest["files"])
    except FileNotFoundError as e:
        raise CheckpointError(
            f"no {MANIFEST_NAME}: the save did not finish, or it is not a step of this trainer"
        ) from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"unreadable {MANIFEST_NAME} ({e})") from e
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "absent"
            raise CheckpointError(f"{name} is {found}, its manifest says {size} bytes")
    return manifest


def recover_replaced(folder: Path) -> None:
    """Give a step its name back if its run was killed between moving it aside and naming the new one. For one rank."""
    for path in folder.glob(f"{_REPLACED}step-*") if folder.is_dir() else []:
        final = folder / path.name.removeprefix(_REPLACED)
        if not final.exists():
            path.rename(final)


def temporary_path(final: Path) -> Path:
    """Where a step or an export is written before it is complete: beside its place, under a name that no reader takes."""
    return final.with_name(f".incomplete-{final.name}")


def start(final: Path) -> Path:
    """Clear and return the temporary folder of ``final``. For one rank."""
    temporary = temporary_path(final)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def complete_step(final: Path, step: int, facts: dict[str, Any]) -> None:
    """Write the manifest into the temporary folder of ``final`` and give it its name. For one rank, after all have written.

    A step that is there already is replaced only now, when the new one is complete.
    """
    temporary = temporary_path(final)
    files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir()) if p.is_file()}
    write_json(temporary / MANIFEST_NAME, {"step": step, **facts, "files": files})
    put_in_place(final)


def put_in_place(final: Path) -> None:
    """Rename the temporary folder of ``final`` to ``final``, replacing what is there. For one rank."""
    temporary = temporary_path(final)
    replaced = final.with_name(_REPLACED + final.name)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
