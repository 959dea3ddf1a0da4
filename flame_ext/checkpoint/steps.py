"""A step exists completely or not at all: it is written under a temporary name and renamed once its manifest is in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame_ext.errors import CheckpointError
from flame_ext.fault_injection import fault_point
from flame_ext.files import write_json

MANIFEST_NAME = "manifest.json"
_MAX_MANIFEST_BYTES = 2**26
_READ_BYTES = 2**22
_HASHING_THREADS = 4
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
        CheckpointError: if it is absent or unreadable, or if a file that it lists is absent, no file of this folder's own,
            or of another size.
    """
    try:
        with (path / MANIFEST_NAME).open("rb") as stream:
            raw = stream.read(_MAX_MANIFEST_BYTES + 1)
        if len(raw) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"larger than {_MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(raw)
        files = {name: (int(file["size"]), str(file["sha256"])) for name, file in manifest["files"].items()}
        if foreign := next((name for name in files if Path(name).name != name), None):
            raise ValueError(f"{foreign!r} is no name of a file in the folder")
    except FileNotFoundError as e:
        raise CheckpointError(
            f"no {MANIFEST_NAME}: the save did not finish, or it is not a step of this trainer"
        ) from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"unreadable {MANIFEST_NAME} ({e})") from e
    for name, (size, _) in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
            found = "absent"
            if file.is_symlink() or file.exists():
                found = f"{file.stat().st_size} bytes" if file.is_file() and not file.is_symlink() else "not a file"
            raise CheckpointError(f"{name} is {found}, its manifest says {size} bytes")
    return manifest


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, each of which is on disk afterwards."""
    names = list(names)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(_described, (folder / name for name in names)), strict=True))


def _described(file: Path) -> dict[str, Any]:
    digest, size, buffer = hashlib.sha256(), 0, bytearray(_READ_BYTES)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
        os.fsync(stream.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def damaged_files(step: CompleteStep, names: Iterable[str]) -> list[str]:
    """One line for each of these files of a step that is not what its manifest says."""
    found = describe_files(step.path, names)
    return [
        f"{name}: SHA-256 is {found[name]['sha256'][:12]}…, its manifest says {expected['sha256'][:12]}…: damaged file"
        for name in found
        if found[name] != (expected := step.manifest["files"][name])
    ]


def written_files(final: Path) -> list[str]:
    """Names of the files in the temporary folder of ``final``."""
    return sorted(p.name for p in temporary_path(final).iterdir() if p.is_file())


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


def complete_step(final: Path, step: int, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest into the temporary folder of ``final`` and give it its name. For one rank, after all have written.

    A step that is there already is replaced only now, when the new one is complete.

    Args:
        final: ``step-N``.
        step: N.
        facts: what the manifest says beside them.
        files: of :func:`written_files`, as :func:`describe_files` has them.
    """
    fault_point("before_manifest")
    write_json(temporary_path(final) / MANIFEST_NAME, {"step": step, **facts, "files": files})
    fault_point("before_rename")
    put_in_place(final)


def put_in_place(final: Path) -> None:
    """Rename the temporary folder of ``final`` to ``final``, replacing what is there. For one rank."""
    temporary = temporary_path(final)
    replaced = final.with_name(_REPLACED + final.name)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
        fault_point("between_renames")
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have what is written to a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
