"""Errors that users can mend: commands print the message alone, while other exceptions keep their traceback."""


class UserError(Exception):
    """Base: the message says what was found, what was expected and what to do."""


class ConfigError(UserError):
    """A value in the TOML or on the command line cannot be right."""


class SeedError(UserError):
    """The source cannot be put into the model completely and exactly."""


class CheckpointError(UserError):
    """A saved step cannot be read or written."""


class LostRankError(UserError):
    """Another rank has ended or stands still, so that this one cannot go on."""
