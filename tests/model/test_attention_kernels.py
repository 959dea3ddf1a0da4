"""Which kernels attention by a mask may use: not cuDNN's, also where activation checkpointing runs layers again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from transformers import DeepseekV3Config, Gemma2Config, GPT2Config, OlmoConfig, PreTrainedConfig, Qwen3Config

from flame_ext.heads.pooled_encoder import PooledEncoder
from flame_ext.model.attention import attention_options, flex_problem, mask_form
from flame_ext.model.context_parallel import WHOLE
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.objective.masks import causal_mask
from tests.tiny_models import save_tiny


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each call of SDPA, whether it has a mask, and whether cuDNN's kernel may be chosen."""
    seen, attend = [], F.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        seen.append((attn_mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize(
    ("name", "own_masks"),
    [
        ("olmo-tied", False),
        ("gpt2-learned-positions", False),
        ("falcon-multi-query", True),
        ("olmo3-sliding-window", True),
    ],
)
def test_attention_by_a_mask_is_kept_from_cudnn(
    tmp_path: Path, allowed: list[tuple[bool, bool]], name: str, own_masks: bool
) -> None:
    model: Any = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(save_tiny(name, tmp_path))))
    model.to_empty(device="cpu").init_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    apply_ac(model, ActivationCheckpoint(mode="full"))
    every = torch.arange(24)
    tokens = every.expand(2, -1)
    for mask in (None, causal_mask(None, 0, every, every), None):
        allowed.clear()
        model(tokens, attention_mask=mask, output="hidden_states").sum().backward()
        masked = mask is not None or own_masks
        assert len(allowed) == 6, "three layers, and each again in the backward"
        assert {enabled for _, enabled in allowed} == {not masked}
        assert any(has_mask for has_mask, _ in allowed) == masked


def test_pooled_summaries_are_kept_from_cudnn(allowed: list[tuple[bool, bool]]) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    PooledEncoder("attention", 4, 16, 2)(torch.randn(2, 24, 16), torch.zeros(2, 24, dtype=torch.long))
    assert allowed == [(True, False)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


_LATENT = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (OlmoConfig(hidden_size=64, num_attention_heads=4), "flex"),
        (OlmoConfig(hidden_size=64, num_attention_heads=8), "windows"),
        (Qwen3Config(hidden_size=64, num_attention_heads=8, head_dim=16), "flex"),
        (DeepseekV3Config(**_LATENT, v_head_dim=16), "flex"),
        (DeepseekV3Config(**_LATENT, v_head_dim=8), "windows"),
        (GPT2Config(), "windows"),
    ],
)
def test_flex_attention_is_taken_where_it_can_be_compiled(config: PreTrainedConfig, form: str) -> None:
    model = SimpleNamespace(
        config=config,
        _supports_flex_attn=config.model_type != "gpt2",
        _supports_attention_backend=True,
        context=WHOLE,
    )
    assert mask_form("auto", model, torch.device("cuda")) == form
    assert mask_form("auto", model, torch.device("cpu")) == "windows"
    assert (flex_problem(config, "cuda") is None) == (form == "flex")


@pytest.mark.parametrize(
    ("config", "device_type", "expected"),
    [
        (OlmoConfig(), "cuda", None),
        (Gemma2Config(), "cuda", "flex_attention"),
        (Gemma2Config(), "cpu", "eager"),
        (Gemma2Config(attention_dropout=0.1), "cuda", "eager"),
        (Gemma2Config(head_dim=8), "cuda", "eager"),
        (Gemma2Config(attn_logit_softcapping=None), "cuda", None),
    ],
)
def test_soft_capped_scores_are_left_to_an_attention_that_caps_them(
    config: PreTrainedConfig, device_type: str, expected: str | None
) -> None:
    assert attention_options(config, device_type).get("attn_implementation") == expected
