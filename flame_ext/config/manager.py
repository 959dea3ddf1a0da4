"""torchtitan's ``ConfigManager`` for the sections of flame_ext. It also checks the types of TOML values, which torchtitan does not:
``interval = "100"`` would reach the training loop as a string.
"""

import difflib
import importlib
import re
import sys
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.files import expanded
from flame_ext.host.names import ConfigManager, JobConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class FlameConfigManager(ConfigManager):
    """Parses TOML and command line into a ``config_class``. The command line overrides TOML, TOML overrides defaults."""

    def __init__(self, config_class: Callable[[], type[FlameJobConfig]]) -> None:
        self._config_class = config_class
        super().__init__(FlameJobConfig)

    def parse_args(self, args: list[str]) -> FlameJobConfig:
        """Returns the configuration, in which ``~`` and ``$NAME`` in paths are expanded.

        Raises ConfigError if the TOML is missing, malformed, or has a wrong type, an unknown key or a path of an unset variable.
        """
        try:
            config = super().parse_args(args)
        except (AssertionError, ValueError) as e:  # of a section's __post_init__, which names the option
            raise ConfigError(f"{_option(args, 'job.config_file') or 'command line'}: {e}") from e
        return _completed(config)

    def check_built(self, config: FlameJobConfig) -> FlameJobConfig:
        """Checks a configuration that was built in Python as a parsed one is, and completes it in place: names, types, paths.

        Raises ConfigError with one line for all findings.
        """
        if problems := check_values(type(config), config):
            raise ConfigError("configuration: " + "; ".join(problems))
        self.config = config
        try:
            self._validate_config()
            for section in vars(config).values():
                if hasattr(section, "__post_init__"):  # what is assigned later was not there when it ran
                    section.__post_init__()
        except (AssertionError, ValueError) as e:
            raise ConfigError(f"configuration: {e}") from e
        return _completed(config)

    def _dict_to_dataclass(self, cls: Any, data: dict[str, Any]) -> Any:
        """Also convert tables in lists, such as ``[[data.sources]]``."""
        result = super()._dict_to_dataclass(cls, data)
        for field in fields(cls) if is_dataclass(cls) else ():
            if field.name in data and (table := table_in_list(field.type)) is not None:
                setattr(result, field.name, [self._dict_to_dataclass(table, values) for values in data[field.name]])
        return result

    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        if (path := _option(args, "job.config_file")) is None:
            return None
        try:
            with Path(expanded(path, "--job.config_file")).open("rb") as file:
                return tomllib.load(file)
        except OSError as e:
            raise ConfigError(f"--job.config_file {path}: {e.strerror}; give the path of a TOML file") from e
        except (ValueError, RecursionError) as e:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
            raise ConfigError(f"--job.config_file {path}: not valid TOML: {e}") from e

    def _maybe_add_custom_config(self, args: list[str], toml_values: dict[str, Any] | None) -> type[JobConfig]:
        option = "experimental.custom_import"  # imported first, since it may add sections to the configuration
        try:
            module, section = _option(args, option), (toml_values or {}).get("experimental")
            if module is None and isinstance(section, dict):
                module = section.get("custom_import")
            if module and isinstance(module, str):
                importlib.import_module(module)
            option, self.config_cls = "job.custom_config_module", self._config_class()
            config_cls = super()._maybe_add_custom_config(args, toml_values)
        except ModuleNotFoundError as e:
            raise ConfigError(f"{option}: {e}; it must be importable from the current folder") from e
        if strings := _string_annotations(config_cls):
            raise ConfigError(
                f"job.custom_config_module: the types of {', '.join(strings)} are strings, which cannot be merged; remove "
                "'from __future__ import annotations' from that module"
            )
        if problems := check_values(config_cls, toml_values or {}):
            raise ConfigError(f"{_option(args, 'job.config_file')}: " + "; ".join(problems))
        return config_cls


def _completed(config: FlameJobConfig) -> FlameJobConfig:
    # "--model.converters=", the only way to ask for none, is one empty name after torchtitan's split at commas.
    config.model.converters = [name for name in config.model.converters if name]
    _expand_paths(config)
    return config


def _expand_paths(section: Any, prefix: str = "") -> None:
    """Expand the paths of a section, in place: the fields whose names end in path, folder, file or files."""
    for field in fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            if is_dataclass(item):
                _expand_paths(item, f"{name}[{number}]." if isinstance(value, list) else f"{name}.")
        if re.search("(^|_)(path|folder|files?)$", field.name):
            if isinstance(value, str):
                setattr(section, field.name, expanded(value, name))
            elif isinstance(value, list):
                setattr(section, field.name, [expanded(item, name) for item in value])


def _option(args: list[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``, where the name has either - or _ (as in tyro)."""
    for arg, following in zip_longest(args, args[1:]):
        key, has_value, value = arg.partition("=")
        if key.replace("_", "-") == "--" + name.replace("_", "-"):
            return value if has_value else following
    return None


def _string_annotations(config_cls: Any, prefix: str = "") -> list[str]:
    """Full names of fields whose types are strings, which cannot be resolved: a merged dataclass has no module."""
    names = [prefix + field.name for field in fields(config_cls) if isinstance(field.type, str)]
    for field in fields(config_cls):
        names += _string_annotations(field.type, f"{prefix}{field.name}.") if is_dataclass(field.type) else []
    return names


def check_values(config_cls: type, values: Any, prefix: str = "") -> list[str]:
    """One sentence for each value that does not fit ``config_cls``; ``prefix`` is the table's name with a trailing dot.

    ``values`` is a TOML table, whose sections are tables, or an object of ``config_cls``, whose sections are objects.
    """
    hints = get_type_hints(config_cls)
    valid = [f.name for f in fields(config_cls)]
    in_toml = isinstance(values, dict)
    problems = []
    for key, value in (values if in_toml else vars(values)).items():
        name = prefix + key
        if key not in valid:
            close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            hint = f" (did you mean {prefix + close[0]!r}?)" if close else f" (valid: {', '.join(valid)})"
            problems.append(f"unknown {'key' if prefix else 'section'} {name!r}{hint}")
        elif not _has_type(value, hints[key], in_toml):
            wrong = f"must be {spelled(hints[key])}, got {value!r} ({type(value).__name__})"
            if is_dataclass(hints[key]):
                what = f"[{name}] in TOML" if in_toml else hints[key].__name__
                wrong = f"is a section ({what}), got {value!r}"
            problems.append(f"{name!r} {wrong}")
        elif is_dataclass(hints[key]):
            problems += check_values(hints[key], value, f"{name}.")
        elif (table := table_in_list(hints[key])) is not None:
            for number, item in enumerate(value):
                problems += check_values(table, item, f"{name}[{number}].")
    return problems


def table_in_list(hint: Any) -> type | None:
    """The dataclass of the items if ``hint`` is a list of dataclasses, else None."""
    parameters = get_args(hint)
    return parameters[0] if get_origin(hint) is list and is_dataclass(parameters[0]) else None  # type: ignore[return-value]


def _has_type(value: Any, hint: Any, in_toml: bool) -> bool:
    """Whether a value has the type of a field's annotation; an integer is a valid float, and a table of TOML a section."""
    origin, parameters = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parameters and type(value) in {type(p) for p in parameters}
    if origin in (Union, types.UnionType):
        return any(_has_type(value, parameter, in_toml) for parameter in parameters)
    if origin is list:
        return isinstance(value, list) and all(_has_type(item, parameters[0], in_toml) for item in value)
    if is_dataclass(hint):
        return isinstance(value, dict if in_toml else hint)  # type: ignore[arg-type]
    return hint is Any or type(value) is hint or (hint is float and type(value) is int)


def spelled(hint: Any) -> str:
    """Describes a field's annotation in the terms of TOML, for messages and the reference."""
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
