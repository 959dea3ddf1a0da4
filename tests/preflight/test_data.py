"""Refusals of tables of sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flame_ext.errors import ConfigError
from flame_ext.train import parse
from tests.ranks import DEBUG_TOML


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("weight = 0.0", "data.sources[0].weight must be > 0"),
        (
            'label = "a"\n[[data.sources]]\npath = "x/a"',
            "data.sources[1] is reported as 'a', as data.sources[0] is; give it a label",
        ),
        ("max_samples = 0", "data.sources[0].max_samples must be >= 1"),
    ],
)
def test_values_that_can_not_be_right(tmp_path: Path, line: str, message: str) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text(f'{DEBUG_TOML.read_text()}\n[[data.sources]]\npath = "a"\n{line}\n')
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse([f"--job.config_file={toml}"])
