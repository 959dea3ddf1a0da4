"""Refusals of the options of mixtures of experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.preflight.refusals import refusal
from tests.tiny_models import save_tiny

PIPELINE = ["--parallelism.pipeline_parallel_degree=2", "--moe.balance_over=micro_batch"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, ["--moe.aux_loss_coef=0.1"], "moe.aux_loss_coef: OlmoForCausalLM is no mixture of experts"),
        (None, ["--moe.bias_update_rate=0.1"], "moe.bias_update_rate = 0.1 with OlmoForCausalLM: its routers have no e_score"),
        ("olmoe", ["--moe.bias_update_rate=0.1"], "OlmoeForCausalLM: its routers have no e_score_correction_bias"),
        ("olmoe", PIPELINE, "moe.balance_over = 'micro_batch' does not go with parallelism.pipeline_parallel_degree > 1"),
        ("glm4-moe", ["--moe.aux_loss_coef=0.1"], "Glm4MoeForCausalLM: its architecture defines no auxiliary loss"),
    ],
)  # fmt: skip
def test_options_that_a_model_does_not_have(tmp_path: Path, name: str | None, options: list[str], message: str) -> None:
    folder = [] if name is None else [f"--model.hf_assets_path={save_tiny(name, tmp_path)}"]
    assert message in refusal("--training.seq_len=64", *folder, *options)
