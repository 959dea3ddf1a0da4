"""Command line and TOML to a checked configuration."""

from __future__ import annotations

import importlib

from flame_ext.assembly import register
from flame_ext.config.manager import FlameConfigManager
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.preflight.checks import check_config


def parse(args: list[str]) -> FlameJobConfig:
    """Command line and TOML to a checked configuration; the user's own imports come first, they may register things.

    Raises:
        ConfigError: before anything is built.
    """
    register()
    config = FlameConfigManager().parse_args(args)
    if config.experimental.custom_import:
        try:
            importlib.import_module(config.experimental.custom_import)
        except ModuleNotFoundError as e:
            raise ConfigError(f"experimental.custom_import: {e}; it must be importable from the current folder") from e
    check_config(config)
    return config
