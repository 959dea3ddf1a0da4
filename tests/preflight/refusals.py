"""The message with which a configuration is refused."""

from __future__ import annotations

import pytest

from flame_ext.errors import ConfigError
from flame_ext.train import parse
from tests.ranks import DEBUG_TOML


def refusal(*options: str) -> str:
    """The message with which configs/debug.toml with these options is refused."""
    with pytest.raises(ConfigError) as e:
        parse([f"--job.config_file={DEBUG_TOML}", *options])
    return str(e.value)
