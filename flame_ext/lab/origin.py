"""What a result was made from, beside its plan: rows, initial weights and versions, which another machine may make otherwise."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flame_ext.lab.data import FLAT

WEIGHTS = "model.safetensors"


def origin_of(rows: str, model: Path) -> dict[str, Any]:
    """Returns :func:`digest_of_rows`, the SHA-256 of the initial weights in the folder ``model``, and the versions in use."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
    return {"rows": rows, "weights": _sha256(model / WEIGHTS), "versions": versions}


def digest_of_rows(task: Path) -> str:
    """The SHA-256 of the rows in a task's folder."""
    return _sha256(*(task / name for name in FLAT))


def other_origin(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Returns in words what a result was made from that is not there now; None if it is all the same, or not said. Versions may differ."""
    for key, name in (("rows", "rows"), ("weights", "initial weights")):
        if key in was and was[key] != now[key]:
            return f"other {name} than those that are there now (made with {as_words(was)}; here {as_words(now)})"
    return None


def as_words(origin: dict[str, Any]) -> str:
    """The versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in origin.get("versions", {}).items()) or "unknown versions"


def _sha256(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
