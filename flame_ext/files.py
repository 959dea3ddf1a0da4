"""Writes small files atomically, parses sizes and names files that several packages use."""

import json
import os
import re
from pathlib import Path
from typing import Any

from flame_ext.errors import ConfigError

METRICS_NAME = "metrics.jsonl"  # in a run's dump folder: one JSON object per step


def write_json(file: Path, value: Any) -> None:
    """Write JSON to a temporary name, flush it to disk and rename it, so that the file is complete or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def expanded(path: str, name: str) -> str:
    """Return a path without ``~`` and variables; ConfigError if there is no such user or variable, nor a file of that name."""
    found = os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for an unknown user
    if re.search(r"^~|\$(\w|\{)", found) and not Path(found).exists():
        raise ConfigError(f"{name} = {path!r}: no such user or variable; write the path out")
    return found


def parse_size(text: str, option: str) -> int:
    """Convert "5GB" or "1.5MB" (powers of 1000, as in ``save_pretrained``) to bytes; a ConfigError names ``option``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT])B\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{option} {text!r}: expected a number and KB, MB, GB or TB, such as 5GB")
    return int(float(match[1]) * 1000 ** ("KMGT".index(match[2].upper()) + 1))
