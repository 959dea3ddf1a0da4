"""Errors that are the user's to mend. The commands print their message alone; anything else is a bug and keeps its traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base: the message says what was found, what was expected and what to do."""


class ConfigError(UserError):
    """A value in the TOML or on the command line can not be right."""


class SeedError(UserError):
    """The source can not be put into the model completely and exactly."""


class CheckpointError(UserError):
    """A saved step can not be read or written."""
