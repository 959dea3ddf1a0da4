"""docs/configuration.md, from the dataclasses: ``python -m flame_ext.config.reference > docs/configuration.md``."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, Literal

import docstring_parser
from torchtitan.config import Checkpoint as HostCheckpoint
from torchtitan.config import JobConfig

from flame_ext.config.sections import FlameJobConfig

_HEAD = """# Configuration

Every option of torchtitan 0.2.2 keeps its name and meaning (`python -m flame_ext.train --help` lists all of them, with these).
Below are the sections that flame_ext adds, and what it adds to `[checkpoint]`. On the command line an option is
`--section.key value`; a list is `--section.key=a,b`, a switch `--section.key` or `--section.no-key`.

This file is generated: `python -m flame_ext.config.reference > docs/configuration.md`.
"""


def reference() -> str:
    """The whole file."""
    hosts = {field.name for field in dataclasses.fields(JobConfig)}
    parts = [_HEAD]
    for name, section in typing.get_type_hints(FlameJobConfig).items():
        inherited = {field.name for field in dataclasses.fields(HostCheckpoint)} if name == "checkpoint" else set()
        if name in hosts and not inherited:
            continue
        parts.append(_section(name, section, inherited))
    return "\n".join(parts)


def _section(name: str, section: type, inherited: set[str]) -> str:
    documented = docstring_parser.parse_from_object(section)
    meanings: dict[str, str] = {}
    for owner in reversed(section.__mro__[:-1]):
        meanings |= {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(owner).params}
    types = typing.get_type_hints(section)
    lines = [f"## [{name}]", "", _one_line(documented.short_description or ""), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in _fields(section):
        if field.name not in inherited:
            cells = (f"`{name}.{field.name}`", f"`{_type(types[field.name])}`", f"`{_default(field)}`")
            lines.append(f"| {' | '.join(cells)} | {_one_line(meanings[field.name])} |")
    return "\n".join([*lines, ""])


def _fields(section: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(section)


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " \\| ".join(json.dumps(value) for value in typing.get_args(annotation))
    return (annotation.__name__ if annotation in (bool, int, float, str) else str(annotation)).replace("|", "\\|")


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return json.dumps(value)


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
