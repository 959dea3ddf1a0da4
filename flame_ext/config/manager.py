"""torchtitan's ``ConfigManager`` with the extra sections known and a TOML that is checked value by value.

The host passes TOML values through untyped: ``interval = "100"`` would reach the training loop as a string, and
``enable = "false"`` would be true. Here a wrong type or an unknown key is refused before anything is built, by its
full name and with the nearest valid one.
"""

from __future__ import annotations

import difflib
import sys
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtitan.config import ConfigManager, JobConfig

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class FlameConfigManager(ConfigManager):
    """Parses TOML and command line into a :class:`FlameJobConfig`; CLI over TOML over defaults."""

    def __init__(self) -> None:
        super().__init__(FlameJobConfig)

    def parse_args(self, args: list[str]) -> FlameJobConfig:
        """The configuration, typed but not yet checked for consistency (checks.py).

        Raises:
            ConfigError: the TOML is missing, malformed, or has a wrong type or an unknown key.
        """
        config = super().parse_args(args)
        # The host splits "--model.converters=" at commas into one empty name; it is the only way to say "none".
        config.model.converters = [name for name in config.model.converters if name]
        return config

    def _dict_to_dataclass(self, cls: Any, data: dict[str, Any]) -> Any:
        """The host's, and tables in lists ([[data.sources]]) as well."""
        result = super()._dict_to_dataclass(cls, data)
        for field in fields(cls) if is_dataclass(cls) else ():
            if field.name in data and (table := table_in_list(field.type)) is not None:
                tables = [self._dict_to_dataclass(table, values) for values in data[field.name]]
                setattr(result, field.name, tables)
        return result

    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        path = _option(args, "job.config_file")
        if path is None:
            return None
        try:
            with Path(path).open("rb") as file:
                return tomllib.load(file)
        except OSError as e:
            raise ConfigError(f"--job.config_file {path}: {e.strerror}; give the path of a TOML file") from e
        except tomllib.TOMLDecodeError as e:
            raise ConfigError(f"--job.config_file {path}: not valid TOML: {e}") from e

    def _maybe_add_custom_config(self, args: list[str], toml_values: dict[str, Any] | None) -> type[JobConfig]:
        try:
            config_cls = super()._maybe_add_custom_config(args, toml_values)
        except ModuleNotFoundError as e:
            raise ConfigError(f"job.custom_config_module: {e}; it must be importable from the current folder") from e
        if strings := _string_annotations(config_cls):
            raise ConfigError(
                f"job.custom_config_module: the types of {', '.join(strings)} are strings, which can not be merged; remove "
                "'from __future__ import annotations' from that module"
            )
        if toml_values is not None:
            problems = check_values(config_cls, toml_values)
            if problems:
                raise ConfigError(f"{_option(args, 'job.config_file')}: " + "; ".join(problems))
        return config_cls


def _option(args: list[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``, with either of - and _ (as tyro takes them)."""
    flag = "--" + name.replace("_", "-")
    for i, arg in enumerate(args):
        key, has_value, value = arg.partition("=")
        if key.replace("_", "-") == flag:
            if has_value:
                return value
            return args[i + 1] if i + 1 < len(args) else None
    return None


def _string_annotations(config_cls: type, prefix: str = "") -> list[str]:
    """Full names of fields whose types are strings: a merged dataclass has no module in which to look them up."""
    names = []
    for field in fields(config_cls):
        if isinstance(field.type, str):
            names.append(prefix + field.name)
        elif is_dataclass(field.type):
            names += _string_annotations(field.type, f"{prefix}{field.name}.")
    return names


def check_values(config_cls: type, values: dict[str, Any], prefix: str = "") -> list[str]:
    """What is wrong with a section's TOML values, one sentence each; empty if nothing is.

    Args:
        config_cls: the dataclass that the table is read into.
        values: the table, as ``tomllib`` reads it.
        prefix: the table's own name with a trailing dot, or "" at the top level.
    """
    hints = get_type_hints(config_cls)
    valid = [f.name for f in fields(config_cls)]
    problems = []
    for key, value in values.items():
        name = prefix + key
        if key not in valid:
            problems.append(f"unknown {'key' if prefix else 'section'} {name!r}{_nearest(key, valid, prefix)}")
        elif is_dataclass(hints[key]):
            if isinstance(value, dict):
                problems += check_values(hints[key], value, f"{name}.")
            else:
                problems.append(f"{name!r} is a section ([{name}] in TOML), got {value!r}")
        elif (table := table_in_list(hints[key])) is not None and _has_type(value, hints[key]):
            for number, item in enumerate(value):
                problems += check_values(table, item, f"{name}[{number}].")
        elif not _has_type(value, hints[key]):
            problems.append(f"{name!r} must be {spelled(hints[key])}, got {value!r} ({type(value).__name__})")
    return problems


def table_in_list(hint: Any) -> type | None:
    """The dataclass of a list of tables; None for anything else."""
    parameters = get_args(hint)
    return parameters[0] if get_origin(hint) is list and is_dataclass(parameters[0]) else None  # type: ignore[return-value]


def _nearest(key: str, valid: list[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f" (did you mean {prefix + close[0]!r}?)" if close else f" (valid: {', '.join(valid)})"


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a TOML value fits a field's annotation, without conversion (an integer is a valid float)."""
    origin, parameters = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parameters and type(value) in {type(p) for p in parameters}
    if origin in (Union, types.UnionType):
        return any(_has_type(value, parameter) for parameter in parameters)
    if origin is list:
        return isinstance(value, list) and all(_has_type(item, parameters[0]) for item in value)
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float)
    if is_dataclass(hint):
        return isinstance(value, dict)
    return type(value) is hint


def spelled(hint: Any) -> str:
    """A field's annotation in the words of TOML."""
    origin, parameters = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(p) for p in parameters)
    if origin in (Union, types.UnionType):
        return " or ".join(spelled(p) for p in parameters if p is not type(None))
    if table_in_list(hint) is not None:
        return "a list of tables"
    if origin is list:
        return f"a list, each {spelled(parameters[0])}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}.get(hint, str(hint))
