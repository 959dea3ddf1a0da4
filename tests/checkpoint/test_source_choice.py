"""Which source is taken where several could be, and that it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import DEBUG_TOML, TINY_OLMO, train


@pytest.fixture
def without_path(tmp_path: Path) -> Path:
    """The debug configuration without ``checkpoint.initial_load_path``."""
    lines = [line for line in DEBUG_TOML.read_text().splitlines() if not line.startswith("initial_load_path")]
    (tmp_path / "debug.toml").write_text("\n".join(lines))
    return tmp_path / "debug.toml"


def test_the_assets_are_the_source_where_the_host_is_told_so(without_path: Path, dump_folder: Path) -> None:
    options = ["--checkpoint.initial_load_in_hf", "--seed.dry_run"]
    run = train(dump_folder, *options, config=without_path)
    assert (
        "Seeding from model.hf_assets_path (checkpoint.initial_load_in_hf is set, initial_load_path is not)"
        in run.ranks[0].output
    )
    report = json.loads((dump_folder / "seed_report.json").read_text())
    assert Path(report["source"]).resolve() == TINY_OLMO.resolve()
    assert "Dry run: stopped before step 1" in run.ranks[0].output and not (dump_folder / "checkpoint").exists()


def test_nothing_to_start_from_is_an_error(without_path: Path, dump_folder: Path) -> None:
    run = train(dump_folder, config=without_path, check=False)
    assert run.exit_codes == [2] and "training never starts from random weights" in run.ranks[0].output


def test_a_path_without_checkpointing_is_an_error(dump_folder: Path) -> None:
    run = train(dump_folder, "--checkpoint.no-enable", check=False)
    assert run.exit_codes == [2] and "checkpoint.enable must be true" in run.ranks[0].output


def test_a_step_goes_before_the_source_and_incomplete_steps_are_named(dump_folder: Path) -> None:
    options = ["--checkpoint.interval=1", "--training.local_batch_size=2"]
    train(dump_folder, *options, "--training.steps=2")
    (dump_folder / "checkpoint" / "step-2" / "manifest.json").unlink()
    output = train(dump_folder, *options, "--training.steps=2").ranks[0].output
    assert "Passed over" in output and "step-2: no manifest.json" in output
    assert "step-1; passed over checkpoint.initial_load_path, which is for step 0" in output
