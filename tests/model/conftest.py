"""Tiny models that a module's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for them, filled as they are asked for (:func:`tests.layouts.steps`)."""
    return tmp_path_factory.mktemp("models")
