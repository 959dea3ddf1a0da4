"""Two stages by configuration alone: the second starts from the heads of the first, and does not change them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import REPOSITORY, TINY_OLMO, train

WORLD_MODEL, POLICY = (REPOSITORY / "configs" / "two_stages" / f"{name}.toml" for name in ("world_model", "policy"))
TWO_STEPS = ("--training.steps=2", "--lr_scheduler.total_steps=60", "--checkpoint.export_dtype=float32")


def test_the_second_stage_trains_the_backbone_by_the_heads_of_the_first(tmp_path: Path) -> None:
    first = train(tmp_path / "first", *TWO_STEPS, config=WORLD_MODEL)
    export = tmp_path / "first" / "hf" / "step-2"
    options = (f"--checkpoint.initial_load_path={export}", "--training.local_batch_size=4")
    second = train(tmp_path / "second", *TWO_STEPS, *options, world_size=2, config=POLICY)
    assert min(first.values("grad_norm_heads")) > 0 and second.values("grad_norm_heads") == [0.0] * 2
    line = second.metrics[0]
    assert line["loss"] == pytest.approx(line["loss_ce"] + 0.1 * line["loss_action"], rel=1e-6)
    after = tmp_path / "second" / "hf" / "step-2"
    heads, still = (load_file(folder / "future_heads" / "model.safetensors") for folder in (export, after))
    assert {key.split(".")[0] for key in heads} == {"future_predictor", "action_layer"}
    assert heads.keys() == still.keys() and all(torch.equal(still[key], value) for key, value in heads.items())
    backbone, trained = (load_file(folder / "model.safetensors") for folder in (export, after))
    assert not any(torch.equal(trained[key], value) for key, value in backbone.items())


def test_a_frozen_head_that_no_source_has_is_refused(tmp_path: Path) -> None:
    options = (f"--checkpoint.initial_load_path={TINY_OLMO}", "--seed.new_parameters=[a-z]*")
    run = train(tmp_path / "run", *TWO_STEPS, *options, config=POLICY, check=False)
    assert run.exit_codes == [1]
    assert "action_layer.freeze keeps a head as the source has it, but 'action_layer." in run.ranks[0].output
    assert not (tmp_path / "run" / "checkpoint").exists()
