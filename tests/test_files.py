"""Sizes on the command line and in the TOML."""

from __future__ import annotations

import pytest

from flame_ext.errors import ConfigError
from flame_ext.files import parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5_000_000_000), ("1.5MB", 1_500_000), (" 30 kb ", 30_000), ("1TB", 10**12), ("0KB", 0)],
)
def test_sizes_are_powers_of_1000(text: str, nbytes: int) -> None:
    assert parse_size(text, "--size") == nbytes


@pytest.mark.parametrize("text", ["", "5", "GB", "5GiB", "-5GB", "nanGB", "infGB", "5 apples", "5GB 6GB"])
def test_what_is_no_size_is_refused_with_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--size .*expected a number and KB, MB, GB or TB"):
        parse_size(text, "--size")
