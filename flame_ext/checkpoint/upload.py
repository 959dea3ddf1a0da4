"""Copies an export into an object store, file by file, so that readers find a model there only when all of it is there."""

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from flame_ext.checkpoint.export_folder import RECORD_NAME, recorded
from flame_ext.errors import CheckpointError
from flame_ext.object_stores import filesystem, patiently
from flame_ext.seeding.sources.hf_safetensors import INDEX_NAME

_LAST = (INDEX_NAME, "config.json")  # without them, nobody takes a folder for a model


def upload(export: Path, url: str) -> str:
    """Copies ``export`` to ``url/step-N`` and returns what was done. Files that an earlier attempt has brought there stay.

    The record of the export goes first: it tells whose files are there. Weights follow, and ``config.json`` comes last. An older
    export of the same step of the same run is replaced.

    Raises:
        CheckpointError: it is no export of a step, the store cannot be reached, or something else is there.
    """
    record = recorded(export)
    place = f"{url.rstrip('/')}/{export.name}"
    fs, path = filesystem(place, CheckpointError)
    if hasattr(fs, "auto_mkdir"):
        fs.auto_mkdir = True  # a local folder
    there = _prepare(fs, path, place, record)
    sent, nbytes = 0, 0
    for name in _in_order([RECORD_NAME, *record["files"]]):
        if name in _LAST and recorded(export) != record:
            raise CheckpointError(f"{export}: was replaced while it was uploaded to {place}; upload it again")
        size = (export / name).stat().st_size
        if there.get(name) != size:
            patiently(place, partial(_put, fs, export / name, f"{path}/{name}", size), CheckpointError, "written")
            sent, nbytes = sent + 1, nbytes + size
    return f"Uploaded {sent} files ({nbytes / 2**20:,.1f} MiB) to {place}; {len(record['files']) + 1 - sent} were there"


def _prepare(fs: Any, path: str, place: str, record: dict[str, Any]) -> dict[str, int]:
    """Returns the sizes of this export's files that are there already; removes those of an older export of the same step."""
    found = patiently(place, lambda: fs.find(path, detail=True), CheckpointError)
    there = {name.removeprefix(f"{path.rstrip('/')}/"): info["size"] for name, info in found.items()}
    if not there:
        return {}
    held: Any = None
    if RECORD_NAME in there:
        raw = patiently(place, lambda: fs.cat_file(f"{path}/{RECORD_NAME}"), CheckpointError)
        with suppress(ValueError):
            held = json.loads(raw)
    is_export = isinstance(held, dict) and isinstance(held.get("files"), dict)
    if not is_export or held.get("run") != record["run"]:
        what = "the export of another run" if is_export else "files that are no export"
        raise CheckpointError(f"{place} holds {what}, which stay as they are; choose another place (export.upload)")
    if held == record:
        return there
    old = [name for name in there if name in {RECORD_NAME, *held["files"], *record["files"]}]
    for name in reversed(_in_order(old)):  # first what makes it a model, last the record
        patiently(place, partial(fs.rm_file, f"{path}/{name}"), CheckpointError)
    return {}


def _in_order(names: list[str]) -> list[str]:
    """Returns names as they are to be written: the record, weights, small files, and those without which it is no model."""

    def rank(name: str) -> tuple[int, bool, str]:
        late = _LAST.index(name) + 1 if name in _LAST else 0
        return (-1 if name == RECORD_NAME else late, not name.endswith(".safetensors"), name)

    return sorted(names, key=rank)


def _put(fs: Any, file: Path, path: str, size: int) -> None:
    fs.put_file(str(file), path)
    if (found := fs.info(path)["size"]) != size:
        raise OSError(f"{path} has {found} bytes after {size} were sent")
