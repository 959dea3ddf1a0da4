"""The jobs of configs/ready/, planned for one node of eight GPUs with 80 GB."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame_ext.planning.plan import Machine, make_plan
from tests.planning.ready_models import READY, save_config
from tests.ranks import REPOSITORY

FOLDER = REPOSITORY / "configs" / "ready"


def test_there_is_a_model_for_each_job() -> None:
    assert {file.stem for file in FOLDER.glob("*.toml")} == set(READY)


@pytest.mark.matrix
@pytest.mark.parametrize("name", READY)
def test_a_ready_job_fits(name: str, tmp_path: Path) -> None:
    assets = save_config(name, tmp_path)
    paths = [f"--model.hf_assets_path={assets}", f"--checkpoint.initial_load_path={assets}"]
    plan = make_plan([f"--job.config_file={FOLDER / name}.toml", *paths], Machine(ranks=8))
    assert plan.rehearsal.parameters["backbone"] == READY[name][1]
    assert plan.rehearsal.tokens == 2**19
    assert plan.fits and plan.rehearsal.peak > 0.15 * 80e9, f"{plan.rehearsal.peak / 1e9:.1f} GB"
    print(f"{name}: {plan.rehearsal.peak / 1e9:.1f} GB, {plan.seconds(0.4):.2f} s", plan.rehearsal.parts)
