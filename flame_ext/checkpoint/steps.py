"""Writes a step under a temporary name until its manifest is written, so it is complete or absent; finds and checks steps."""

import hashlib
import os
import re
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from flame_ext.errors import CheckpointError, SeedError
from flame_ext.fault_injection import fault_point
from flame_ext.files import write_json
from flame_ext.seeding.sources.dcp_metadata import METADATA_NAME
from flame_ext.seeding.sources.safe_files import find_file, is_plain_name, read_json

MANIFEST_NAME = "manifest.json"
_READ_BYTES = 2**22
_HASHING_THREADS = 4
_STEP_NAME = re.compile(r"step-(\d+)")
# Types of what other code takes from a manifest; null and absent are one.
_FIELDS: dict[str, type] = {
    **dict.fromkeys(("step", "world_size", "vocab_size"), int),
    **dict.fromkeys(("config", "seed", "heads", "data", "parallelism", "versions"), dict),
    "files": dict,
    **dict.fromkeys(("model_only", "finished"), bool),
    "run": str,
}
_REPLACED = ".replaced-"  # prefix of an old step or export between two renames
_DELETED = ".deleted-"  # prefix of a step that is being deleted


@dataclass(frozen=True)
class CompleteStep:
    """A folder ``step-N`` that has every file of its manifest, with the size that the manifest says."""

    step: int
    path: Path
    manifest: dict[str, Any]


def find_steps(folder: Path) -> tuple[list[CompleteStep], list[str]]:
    """Returns the complete steps in a folder, oldest first, and one line for each ``step-N`` that is passed over."""
    steps, passed_over = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _STEP_NAME.fullmatch(path.name):
            try:
                steps.append(CompleteStep(int(match[1]), path, read_manifest(path)))
            except CheckpointError as e:
                passed_over.append(f"{path.name}: {e}")
    return sorted(steps, key=lambda s: s.step), passed_over


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a step's manifest; raises if it is unreadable, or a file of it is absent, a link, elsewhere or of another size."""
    manifest = parse_manifest(path)
    try:
        files = {name: (int(file["size"]), str(file["sha256"])) for name, file in manifest["files"].items()}
        if foreign := next((name for name in files if not is_plain_name(name)), None):
            raise ValueError(f"{foreign!r:.300} is no name of a file in the folder")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise CheckpointError(f"unreadable {MANIFEST_NAME} (files: {type(e).__name__}: {e})") from e
    if _STEP_NAME.fullmatch(path.name) and path.name != f"step-{manifest.get('step')}":
        raise CheckpointError(
            f"its {MANIFEST_NAME} is that of step {manifest.get('step')!r}: give the folder its own name back"
        )
    if METADATA_NAME not in files:
        raise CheckpointError(f"its {MANIFEST_NAME} does not list {METADATA_NAME}: it is not complete")
    for name, (size, _) in files.items():
        file = path / name
        found = "not a file" if file.is_symlink() or file.exists() else "absent"
        if file.is_file() and not file.is_symlink():
            found = f"{file.stat().st_size} bytes"
        if found != f"{size} bytes":
            raise CheckpointError(f"{name} is {found}, its manifest says {size} bytes")
    return manifest


def parse_manifest(path: Path) -> dict[str, Any]:
    """Reads a step's manifest and looks at no other file; raises if it is unreadable or a field has another type."""
    try:
        if (file := find_file(path, MANIFEST_NAME)) is None:
            reason = "the save did not finish, or it is not a step of this trainer"
            raise CheckpointError(f"no {MANIFEST_NAME}: {reason}")
        manifest = read_json(file, "manifest")
    except SeedError as e:
        raise CheckpointError(f"unreadable {MANIFEST_NAME} ({e})") from e
    for field, kind in _FIELDS.items():
        if type(value := manifest.get(field)) not in (kind, NoneType):
            raise CheckpointError(f"unreadable {MANIFEST_NAME} ({field} is {value!r:.80}, expected {kind.__name__})")
    return manifest


def describe_files(folder: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Flushes files to disk and returns the size (bytes) and SHA-256 of each, by name."""

    def described(name: str) -> dict[str, Any]:
        digest, size, buffer = hashlib.sha256(), 0, bytearray(_READ_BYTES)
        with (folder / name).open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                size += count
            os.fsync(stream.fileno())
        return {"size": size, "sha256": digest.hexdigest()}

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(described, names), strict=True))


def damaged_files(step: CompleteStep, names: Collection[str]) -> list[str]:
    """Reads these files of a step and returns one line for each that differs from the manifest."""
    found = describe_files(step.path, names)
    return [
        f"{name}: SHA-256 is {found[name]['sha256'][:12]}…, its manifest says {expected['sha256'][:12]}…: damaged file"
        for name in found
        if found[name] != (expected := step.manifest["files"][name])
    ]


def written_files(final: Path) -> list[str]:
    """Returns the sorted names of the files in the temporary folder of ``final``."""
    return sorted(p.name for p in temporary_path(final).iterdir() if p.is_file())


def recover(folder: Path) -> None:
    """Mends what a killed run has left in a folder of steps: gives its name to a step that was between the two renames of
    :func:`put_in_place` (the new one, which is complete then, else the old one), and deletes what was being deleted. For one rank.
    """
    for replaced in folder.glob(f"{_REPLACED}step-*") if folder.is_dir() else []:
        final = folder / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            try:
                read_manifest(temporary_path(final))
                temporary_path(final).rename(final)
            except CheckpointError:
                replaced.rename(final)
                continue
        shutil.rmtree(replaced, ignore_errors=True)
    for deleted in folder.glob(f"{_DELETED}step-*"):
        shutil.rmtree(deleted, ignore_errors=True)


def set_aside(final: Path) -> Path:
    """Renames a step that is to be deleted, so that a kill leaves no part of it under its name; returns the new name."""
    aside = final.with_name(_DELETED + final.name)
    shutil.rmtree(aside, ignore_errors=True)
    return final.rename(aside)


def temporary_path(final: Path) -> Path:
    """Returns the folder beside ``final`` in which a step or an export is written; no reader takes it."""
    return final.with_name(f".incomplete-{final.name}")


def start(final: Path) -> Path:
    """Clears and returns the temporary folder of ``final``. For one rank."""
    temporary = temporary_path(final)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def complete_step(final: Path, step: int, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest and renames the temporary folder to ``final``. For one rank, when all ranks have written ``files``."""
    fault_point("before_manifest")
    write_json(temporary_path(final) / MANIFEST_NAME, {"step": step, **facts, "files": files})
    fault_point("before_rename")
    put_in_place(final)


def put_in_place(final: Path, temporary: Path | None = None) -> None:
    """Flushes the temporary folder of ``final`` to disk and renames it to ``final``, replacing an older one. For one rank."""
    temporary = temporary or temporary_path(final)
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
    """Flushes a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
