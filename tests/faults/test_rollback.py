"""Runs that go back to an earlier step, are broken off on the way and started again: the branch that was given up does not come back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import TrainRun, train
from tests.sources import load_dcp

FAST = (
    "--training.seq_len=32", "--training.local_batch_size=2", "--seed.verify=none", "--lr_scheduler.warmup_steps=0",
    "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0", "--training.steps=4",
)  # fmt: skip
BACK = (*FAST, "--optimizer.lr=1e-4", "--checkpoint.allow_config_change=optimizer.lr")


@pytest.fixture(scope="module")
def given_up(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """Four steps, each of them saved, and an export."""
    return train(tmp_path_factory.mktemp("given-up") / "run", *FAST)


@pytest.fixture
def folder(given_up: TrainRun, dump_folder: Path) -> Path:
    shutil.copytree(given_up.dump_folder, dump_folder)
    return dump_folder


def rates(folder: Path) -> dict[int, float]:
    manifests = (
        (int(p.name[5:]), json.loads((p / "manifest.json").read_text())) for p in folder.glob("checkpoint/step-*")
    )
    return {step: manifest["config"]["optimizer.lr"] for step, manifest in sorted(manifests)}


def exports_its_own_step(folder: Path) -> bool:
    found = {key: t for file in (folder / "hf" / "step-4").rglob("*.safetensors") for key, t in load_file(file).items()}
    saved = load_dcp(folder / "checkpoint" / "step-4", {key: tensor.float() for key, tensor in found.items()})
    return all(torch.equal(found[key], saved[key].to(found[key].dtype)) for key in found)


@pytest.mark.parametrize("again", [(), ("--checkpoint.load_step=1",)])
def test_a_run_that_is_killed_before_it_saves_goes_on_from_where_it_went_back_to(
    folder: Path, again: tuple[str, ...]
) -> None:
    killed = train(folder, *BACK, "--checkpoint.load_step=1", env={"FLAME_EXT_FAULT": "before_rename"}, check=False)
    assert killed.exit_codes == [-9] and set(rates(folder).values()) == {1e-3}
    run = train(folder, *BACK, *again)
    assert f"Resumed from {folder / 'checkpoint' / 'step-1'}" in run.ranks[0].output
    assert rates(folder) == {1: 1e-3, 2: 1e-4, 3: 1e-4, 4: 1e-4} and exports_its_own_step(folder)


def test_a_finished_run_is_exported_though_the_branch_that_was_given_up_was(folder: Path) -> None:
    back = (*BACK, "--checkpoint.load_step=1")
    killed = train(folder, *back, env={"FLAME_EXT_FAULT": "during_export"}, check=False)
    assert killed.exit_codes == [-9] and rates(folder)[4] == 1e-4 and not exports_its_own_step(folder)
    run = train(folder, *back)
    assert "Exporting step 4 again: " in run.ranks[0].output and "is the export of another step" in run.ranks[0].output
    assert "load_step = 1 yields" in run.ranks[0].output and "Already complete: " in run.ranks[0].output
    assert exports_its_own_step(folder)
    other = train(folder, *back, "--optimizer.lr=1e-5", check=False)
    error = other.ranks[0].output.splitlines()[-1]
    assert other.exit_codes == [1] and error.endswith("move these out of the folder first: step-2, step-3, step-4")
    for step in (2, 3, 4):
        shutil.move(folder / "checkpoint" / f"step-{step}", folder / f"aside-{step}")
    train(folder, *back, "--optimizer.lr=1e-5")
    assert rates(folder) == {1: 1e-3, 2: 1e-5, 3: 1e-5, 4: 1e-5} and exports_its_own_step(folder)


def test_a_load_step_that_is_the_last_step_makes_up_for_its_export(folder: Path) -> None:
    shutil.rmtree(folder / "hf")
    run = train(folder, *FAST, "--checkpoint.load_step=4")
    assert "Already complete: " in run.ranks[0].output and exports_its_own_step(folder)
    assert sorted(rates(folder)) == [1, 2, 3, 4]


def test_a_dry_run_goes_back_in_nothing(folder: Path) -> None:
    train(folder, *BACK, "--checkpoint.load_step=1", "--seed.dry_run")
    assert not (folder / "checkpoint" / "lineage.json").exists()
