"""What the backbone's attention can be asked for: windows by layer type, and boolean masks where its own code has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

BOOLEAN_ATTENTION = "flame_ext_boolean"
"""The name under which :func:`boolean_attention` is known to transformers."""


def attention_windows(config: PreTrainedConfig) -> dict[str, int]:
    """Layer type to the number of positions that its causal attention sees, the own one included; 0 = all the past.

    Raises:
        ValueError: a layer type that does not attend by a mask over positions (linear attention, state spaces, chunks).
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [])
    if not kinds:
        return {"full_attention": window if getattr(config, "use_sliding_window", True) else 0}
    unknown = kinds - {"full_attention", "sliding_attention", "attention"}
    if unknown:
        raise ValueError(f"it has layers of type {', '.join(sorted(unknown))}")
    return {kind: window if kind == "sliding_attention" else 0 for kind in sorted(kinds)}


def not_anticausal(config: PreTrainedConfig) -> str | None:
    """Why an anti-causal forward of this backbone can not be right; None if nothing speaks against it.

    What code from elsewhere does is not known here; :func:`flame_ext.seeding.anticausal.prove_anticausal` measures it.
    """
    try:
        attention_windows(config)
    except ValueError as e:
        return str(e)
    model_cls = _known_class(config)
    if model_cls is None:
        return None
    if model_cls._is_stateful:
        return "it carries a recurrent state from left to right"
    if not (model_cls._supports_sdpa or model_cls._supports_attention_backend):
        return "its own attention code takes no boolean mask"
    return None


def supports_flex_attention(config: PreTrainedConfig) -> bool:
    """Whether transformers says so of the architecture; of code from elsewhere, which it does not know, true."""
    model_cls = _known_class(config)
    return model_cls is None or bool(model_cls._supports_flex_attn)


def _known_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None


def boolean_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with a boolean mask and soft-capping, zeros where nothing is allowed; for transformers' interface.

    For backbones that scaled_dot_product_attention does not serve (Gemma-2). transformers' own code for them adds a
    boolean mask to the scores as zeros and ones.

    Args:
        module: the attention layer.
        query: (B, H, T, d).
        key, value: (B, H or fewer, T, d).
        attention_mask: (B or 1, 1, T, T) bool.
        dropout: must be 0.
        scaling: of the scores; d^-1/2 by default.
        softcap: c in c·tanh(score / c), before the mask.

    Returns:
        (B, T, H, d), and no weights.
    """
    if dropout or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__}: dropout, sinks and position biases are not supported here")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~attention_mask, float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill(~attention_mask.any(dim=-1, keepdim=True), 0.0)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(BOOLEAN_ATTENTION, boolean_attention)


@contextmanager
def attention_implementation(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """For the time of a forward, let the layers that hold ``config`` attend by another implementation."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
