"""Refusals of the options of heads, by their values and by the backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flame_ext.errors import ConfigError
from flame_ext.train import parse
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML, TINY_OLMO
from tests.tiny_models import save_tiny

WITHOUT_HEADS = ("--future_encoder.no-enable", "--future_predictor.no-enable", "--model.converters=")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--future_encoder.future_k=-3"], "future_encoder.future_k must be >= 0 (0 = all the future), got -3"),
        (["--future_encoder.shift_k=0"], "future_encoder.shift_k must be in 1..training.seq_len - 1 (255), got 0"),
        (["--future_encoder.temperature=0"], "future_encoder.temperature must be > 0"),
        (["--future_encoder.loss_weight=-1"], "future_encoder.loss_weight must be >= 0"),
        (["--future_predictor.dropout=1.0"], "future_predictor.dropout must be in [0, 1)"),
        (["--future_predictor.no-enable"], "go together"),
        (["--model.converters="], 'nothing attaches the heads: set model.converters = ["future_prediction"]'),
        (["--future_encoder.no-enable", "--future_predictor.no-enable"], "enable it or drop the converter"),
        (["--action_layer.enable", "--model.converters="], "nothing attaches the heads"),
        (["--action_layer.enable", "--future_encoder.no-enable"], "action_layer.enable needs future_encoder.enable"),
        (["--action_layer.enable", "--action_layer.top_k=0"], "action_layer.top_k must be >= 1"),
        (["--action_layer.enable", "--action_layer.top_k=265"], "action_layer.top_k (265) is above the model's vocabulary (264)"),
        (["--action_layer.enable", "--action_layer.tau=0"], "action_layer.tau must be > 0"),
        (["--action_layer.enable", "--action_layer.model_loss_weight=0"], "nothing would train the head that gives the rewards"),
        (["--action_layer.enable", "--action_layer.loss_weight=-1"], "action_layer.loss_weight must be >= 0"),
        (["--action_layer.enable", "--action_layer.model_loss_weight=-1"], "action_layer.model_loss_weight must be >= 0"),
        (["--action_layer.ffn_hidden_size=0"], "action_layer.ffn_hidden_size must be >= 1"),
        (["--future_encoder.loss_weight_warmup_steps=-1"], "future_encoder.loss_weight_warmup_steps must be >= 0"),
        (["--future_predictor.lr_scale=0"], "future_predictor.lr_scale must be > 0"),
        (["--future_predictor.weight_decay=-0.1"], "future_predictor.weight_decay must be >= 0"),
        (["--future_predictor.warmup_steps=-1"], "future_predictor.warmup_steps must be >= 0"),
        (["--future_predictor.lr_scale=2", "--optimizer.early_step_in_backward"], "which optimizer.early_step_in_backward does not have"),
        (["--future_predictor.freeze_backbone", "--future_encoder.loss_weight=0"], "freeze_backbone leaves nothing to train"),
        (["--future_predictor.freeze_backbone", *WITHOUT_HEADS], "freeze_backbone leaves nothing to train"),
        (["--future_predictor.freeze_backbone", "--future_predictor.freeze"], "freeze_backbone leaves nothing to train"),
        (["--future_predictor.freeze", "--future_predictor.lr_scale=2"], "future_predictor.freeze leaves nothing for"),
        (["--future_encoder.teacher_interval=0"], "future_encoder.teacher_interval must be >= 1"),
        (["--future_encoder.teacher_fraction=0"], "future_encoder.teacher_fraction must be in (0, 1]"),
        (["--future_encoder.teacher_fraction=0.3"], "must be a whole number of sequences; for 2 of them, set it to 0.25"),
        (["--future_encoder.teacher_interval=2", "--future_encoder.summary_method=mean"], "'mean' has none"),
        (["--future_encoder.no-detach_targets"], "detach_targets = false is for pooled summaries"),
    ],
)  # fmt: skip
def test_values_that_can_not_be_right(options: list[str], message: str) -> None:
    assert message in refusal(*options)


@pytest.mark.parametrize(
    ("model_type", "supported"), [("olmo", True), ("gpt_neox", True), ("gpt2", False), ("falcon", False)]
)
def test_flex_attention_is_refused_where_transformers_has_none(
    tmp_path: Path, model_type: str, supported: bool
) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=264)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((TINY_OLMO / file).read_bytes())
    options = [f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={tmp_path}"]
    parse(options)
    if supported:
        parse([*options, "--future_encoder.teacher_attention=flex"])
        return
    with pytest.raises(ConfigError, match=f"'flex': transformers has no FlexAttention for '{model_type}'; take 'auto'"):
        parse([*options, "--future_encoder.teacher_attention=flex"])


def test_flex_attention_is_refused_for_heads_that_cuda_cannot_multiply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("olmo-tied", tmp_path)
    options = [
        "--training.seq_len=128",
        f"--model.hf_assets_path={tmp_path}",
        "--future_encoder.teacher_attention=flex",
    ]
    parse([f"--job.config_file={DEBUG_TOML}", *options])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert refusal(*options) == (
        "future_encoder.teacher_attention = 'flex': on CUDA it takes heads of 16 or more, and those of 'olmo' have 8; take 'auto' or 'sdpa'"
    )


def test_an_anticausal_encoder_of_a_recurrent_backbone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    AutoConfig.for_model(
        "rwkv", vocab_size=264, hidden_size=32, num_hidden_layers=2, architectures=["RwkvForCausalLM"]
    ).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((TINY_OLMO / file).read_bytes())
    with pytest.raises(ConfigError, match="cannot be right for 'rwkv': it carries a recurrent state.*take 'mean'"):
        parse([f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={tmp_path}"])
