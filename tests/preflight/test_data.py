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


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("data", ["--training.dataset=c4"], "training.dataset = 'c4' has no effect beside data.sources; leave one"),
        ("data", ["--training.dataset_path=x"], "training.dataset_path = 'x' has no effect beside data.sources"),
        (
            "data",
            ["--data.text_field=x"],
            "data.text_field = 'x' has no effect beside data.sources; .*text_field in the tables",
        ),
        (
            "validation",
            ["--validation.dataset=c4"],
            "validation.dataset = 'c4' has no effect beside validation.sources",
        ),
        ("validation", ["--validation.dataset_path=x"], "validation.dataset_path = 'x' has no effect beside"),
        (
            "validation",
            ["--validation.sources.0.weight=2"],
            r"validation.sources\[0\]: weight and when_exhausted have no effect",
        ),
        ("validation", ["--validation.sources.0.when_exhausted=drop"], "weight and when_exhausted have no effect"),
    ],
)
def test_options_without_effect(tmp_path: Path, section: str, options: list[str], message: str) -> None:
    toml = tmp_path / "job.toml"
    text = DEBUG_TOML.read_text().replace('dataset = "python_stdlib"\n', "")
    toml.write_text(f'{text}\n[[{section}.sources]]\npath = "a"\n')
    parse([f"--job.config_file={toml}"])
    with pytest.raises(ConfigError, match=message):
        parse([f"--job.config_file={toml}", *options])


def test_the_text_field_that_validation_reads_by_is_no_option_without_effect(tmp_path: Path) -> None:
    toml = tmp_path / "job.toml"
    text = DEBUG_TOML.read_text().replace('dataset = "python_stdlib"\n', "")
    toml.write_text(f'{text}\n[[data.sources]]\npath = "a"\n')
    validation = ["--validation.enable", "--validation.dataset=json", "--validation.dataset_path=b"]
    parse([f"--job.config_file={toml}", "--data.text_field=content", *validation])
