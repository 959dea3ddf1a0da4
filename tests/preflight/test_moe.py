"""Refusals of the options of mixtures of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import DeepseekV3PreTrainedModel

from flame_ext.train import parse
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML
from tests.tiny_models import save_tiny

PIPELINE = ["--parallelism.pipeline_parallel_degree=2", "--moe.balance_over=micro_batch"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, ["--moe.aux_loss_coef=0.1"], "moe.aux_loss_coef with OlmoForCausalLM: it is no mixture of experts"),
        (None, ["--moe.bias_update_rate=0.1"], "moe.bias_update_rate = 0.1 with OlmoForCausalLM: its routers have no e_score"),
        ("olmoe", ["--moe.bias_update_rate=0.1"], "OlmoeForCausalLM: its routers have no e_score_correction_bias"),
        ("olmoe", PIPELINE, "moe.balance_over = 'micro_batch' does not go with parallelism.pipeline_parallel_degree > 1"),
        ("glm4-moe", ["--moe.aux_loss_coef=0.1"], "Glm4MoeForCausalLM: its architecture defines no auxiliary loss"),
        ("olmoe", ["--moe.experts_implementation=eager", "--compile.enable"], "OlmoeForCausalLM: its experts are run by 'eager'"),
    ],
)  # fmt: skip
def test_options_that_a_model_does_not_have(tmp_path: Path, name: str | None, options: list[str], message: str) -> None:
    folder = [] if name is None else [f"--model.hf_assets_path={save_tiny(name, tmp_path)}"]
    assert message in refusal("--training.seq_len=64", *folder, *options)


@pytest.mark.parametrize("name", ["olmoe", "deepseek-v3", "gpt-oss"])
@pytest.mark.parametrize("chosen", [0, 9])
def test_a_token_goes_to_no_more_experts_than_there_are(tmp_path: Path, name: str, chosen: int) -> None:
    file = save_tiny(name, tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_experts_per_tok": chosen}))
    message = refusal("--training.seq_len=64", f"--model.hf_assets_path={tmp_path}")
    assert f"config.json lets model.layers.{int(name == 'deepseek-v3')}.mlp." in message
    assert f"send a token to {chosen} of {4 if name == 'gpt-oss' else 8} experts" in message


BFLOAT16 = ["--training.seq_len=64", "--training.dtype=bfloat16"]


@pytest.mark.skipif(
    "gate.weight" not in DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict,
    reason="this transformers has DeepSeek-V3's routers in the dtype of the rest",
)
def test_fsdp_takes_parameters_of_one_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"--model.hf_assets_path={save_tiny('deepseek-v3', tmp_path)}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refusal(*BFLOAT16, folder)
    assert "DeepseekV3ForCausalLM: it keeps model.layers.2.mlp.gate.weight in float32, and FSDP takes" in message
    config = f"--job.config_file={DEBUG_TOML}"
    for options in (["--parallelism.data_parallel_replicate_degree=2"], ["--moe.freeze_router"]):
        parse([config, *BFLOAT16, folder, *options])
    monkeypatch.setenv("WORLD_SIZE", "1")
    parse([config, *BFLOAT16, folder])


def test_a_backward_that_can_not_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"--model.hf_assets_path={save_tiny('olmoe', tmp_path)}"
    monkeypatch.setattr("flame_ext.preflight.moe._compiles_grouped_mm", lambda: False)
    options = [folder, "--training.seq_len=64", "--compile.enable", "--training.mixed_precision_param=bfloat16"]
    assert "cannot compile the backward of 'grouped_mm' with weights in float32: take moe." in refusal(*options)
    parse([f"--job.config_file={DEBUG_TOML}", *options, "--moe.experts_implementation=batched_mm"])
    parse([f"--job.config_file={DEBUG_TOML}", *options, "--training.dtype=bfloat16"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    parse([f"--job.config_file={DEBUG_TOML}", *options])
