"""Refusals of the model, and of backbones that cannot look ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from flame_ext.errors import ConfigError
from flame_ext.model.attention import mask_problem
from flame_ext.train import parse
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML, TINY_OLMO


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.converters=future_predicton"], "unknown converter 'future_predicton'; did you mean 'future_prediction'?"),
        (["--model.name=llama3"], "model.name must be 'hf_causal_lm', got 'llama3'"),
        (["--model.flavor=1B"], "model.flavor must be 'auto'"),
        (["--model.hf_assets_path=nowhere"], "model.hf_assets_path 'nowhere': no usable config.json"),
        (["--training.seq_len=513"], "beyond the model's max_position_embeddings (512)"),
    ],
)  # fmt: skip
def test_values_that_can_not_be_right(options: list[str], message: str) -> None:
    assert message in refusal(*options)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "it has layers of type linear_attention"),
        ("qwen3_next", "it has layers of type linear_attention"),
        ("llama4_text", "it has layers of type chunked_attention"),
        ("rwkv", "it carries a recurrent state from left to right"),
        ("gpt_neo", "its own attention code takes no boolean mask"),
        ("gemma2", None),
        ("mistral", None),
        ("olmo3", None),
    ],
)
def test_backbones_that_can_not_look_ahead_are_refused(model_type: str, reason: str | None) -> None:
    assert mask_problem(AutoConfig.for_model(model_type)) == reason


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((TINY_OLMO / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="no tokenizer"):
        parse([f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={tmp_path}"])
