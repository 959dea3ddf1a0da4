"""The variables that W&B reads when torchtitan starts it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flame_ext.run.wandb_run import continue_wandb_run

VARIABLES = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")


def started(folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int = 0, **given: str) -> dict[str, str]:
    """The variables after a start in which some are given."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set is taken back after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    continue_wandb_run(folder, rank)
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_a_run_that_is_started_again_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = started(tmp_path / "run", monkeypatch)
    assert len(first["WANDB_RUN_ID"]) == 8 and first["WANDB_RESUME"] == "allow"
    assert started(tmp_path / "run", monkeypatch) == first
    assert started(tmp_path / "other", monkeypatch) != first
    assert started(tmp_path / "run", monkeypatch, rank=1) != first


def test_what_the_user_says_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WANDB_RUN_ID": "mine", "WANDB_RESUME": "must"}
    assert started(tmp_path, monkeypatch, **given) == given
    assert started(tmp_path, monkeypatch, WANDB_FORK_FROM="a?_step=3") == {"WANDB_FORK_FROM": "a?_step=3"}
    assert list(tmp_path.iterdir()) == []
