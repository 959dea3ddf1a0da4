"""What the backbone's attention can be asked for: windows by layer type, and boolean masks where its own code has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

BOOLEAN_ATTENTION = "flame_ext_boolean"
"""The name under which :func:`boolean_attention` is known to transformers."""


def attention_options(config: PreTrainedConfig) -> dict[str, Any]:
    """What transformers has to be told to build the model by: before 5.21 it lets SDPA drop the soft-capping of scores."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


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


def mask_problem(config: PreTrainedConfig) -> str | None:
    """Why a forward under a mask other than its own can not be right for a backbone; None if nothing speaks against it.

    What code from elsewhere does is not known here; :func:`flame_ext.seeding.proof.anticausal.prove_anticausal` measures it.
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


def supports_attention_backend(config: PreTrainedConfig) -> bool:
    """Whether its attention can be exchanged for another by name; as :func:`supports_flex_attention`."""
    model_cls = _known_class(config)
    return model_cls is None or bool(model_cls._supports_attention_backend)


def _known_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    try:
        known: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None
    return known


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
    """Attention with a boolean mask, zeros where nothing is allowed; for transformers' interface.

    For what transformers' own code lacks: masks in blocks; and soft-capping (Gemma-2), where it adds a boolean mask to the
    scores as zeros and ones.

    Args:
        module: the attention layer.
        query: (B, H, T, d).
        key, value: (B, H or fewer, T, d).
        attention_mask: (B or 1, 1, T, T) bool; or (B or 1, n, C, K) in blocks of C queries and the K keys from the same
            position on, n·C >= T (:func:`flame_ext.objective.masks.anticausal_window_mask`).
        dropout: must be 0.
        scaling: of the scores; d^-1/2 by default.
        softcap: c in c·tanh(score / c), before the mask.

    Returns:
        (B, T, H, d), and no weights.
    """
    if dropout or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__}: dropout, sinks and position biases are not supported here")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    batch_size, seq_len = query.shape[0], query.shape[2]
    if attention_mask.shape[1] > 1:
        _, count, size, reach = attention_mask.shape
        query = _blocks(query, count, size, size)
        key, value = _blocks(key, count, size, reach), _blocks(value, count, size, reach)
        attention_mask = attention_mask.expand(batch_size, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    if softcap is None:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        output = _soft_capped(query, key, value, attention_mask, scaling, softcap)
    # Of blocks, (B·n, C, H, d), the sequences again; without them this changes nothing.
    output = output.transpose(1, 2).unflatten(0, (batch_size, -1)).flatten(1, 2)
    return output[:, :seq_len].contiguous(), None


def _blocks(states: Tensor, count: int, size: int, reach: int) -> Tensor:
    """(B, H, T, d) to (B·count, H, reach, d): from every size-th position on, zeros after the end."""
    states = F.pad(states, (0, 0, 0, (count - 1) * size + reach - states.shape[2]))
    return states.unfold(2, reach, size).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float
) -> Tensor:
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return weights.to(value.dtype) @ value


AttentionInterface.register(BOOLEAN_ATTENTION, boolean_attention)
