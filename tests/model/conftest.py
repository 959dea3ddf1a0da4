"""Tiny models that a module's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.layouts import steps


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for them, filled as they are asked for (:func:`tests.layouts.steps`)."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def single(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The step of each of the module's ``JOBS`` in a single process, which has no use for what some of them ask for."""
    return steps(models, tmp_path_factory.mktemp("single"), "single", request.module.JOBS)[0]
