"""The backbone's attention: its windows by layer type, the masks that it takes, and an implementation for boolean masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.tools.utils import device_type
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils

from flame_ext.objective.masks import causal_block_mask, causal_mask

if TYPE_CHECKING:
    from flame_ext.model.hf_causal_lm import HFCausalLM

_CUDNN = torch.backends.cuda.cudnn_sdp_enabled()  # unless the user has turned it off
BOOLEAN_ATTENTION = "flame_ext_boolean"  # transformers' name for boolean_attention

_MIN_FLEX_HEAD = 16  # of queries, keys and values: Triton multiplies no smaller tiles

MaskForm = Literal["dense", "windows", "flex"]
"""A boolean tensor of T x T; blocks of one, where the window is short; FlexAttention's ``BlockMask``."""


def attention_options(config: PreTrainedConfig, device_type: str = device_type) -> dict[str, Any]:
    """Returns the options to build a model with, for a device of a type.

    transformers before 5.21 lets SDPA drop the soft-capping of scores. FlexAttention has it where there are kernels for it, and
    the eager attention, which makes all T x T scores, elsewhere.
    """
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) is None:
        return {}
    dropout = getattr(text, "attention_dropout", 0.0)  # which FlexAttention does not know
    flex = device_type == "cuda" and not dropout and flex_problem(config, device_type) is None
    return {"attn_implementation": "flex_attention" if flex else "eager"}


def attention_windows(config: PreTrainedConfig) -> dict[str, int]:
    """Maps each layer type to the number of positions that its causal attention sees, its own included; 0 = all the past.

    Raises a ValueError if a layer type does not attend by a mask over positions (linear attention, state spaces, chunks).
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
    """Says why a backbone cannot run under a mask other than its own; None if no reason is known.

    For code from outside transformers, :func:`flame_ext.seeding.proof.attention.prove_anticausal` measures it instead.
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


def supports(feature: Literal["flex_attn", "attention_backend"], config: PreTrainedConfig) -> bool:
    """Whether an architecture supports FlexAttention, or attention by name; true for code from outside transformers."""
    return bool(getattr(_known_class(config), f"_supports_{feature}", True))


def flex_problem(config: PreTrainedConfig, device_type: str) -> str | None:
    """Says why a backbone cannot attend by FlexAttention on a device of a type; None if no reason is known."""
    if not supports("flex_attn", config):
        return f"transformers has no FlexAttention for {config.model_type!r}"
    config = config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hasattr(config, "qk_nope_head_dim"):  # of latent attention, whose head_dim is a part of it
        size = config.qk_nope_head_dim + config.qk_rope_head_dim
    size = min(size, getattr(config, "v_head_dim", None) or size)
    if device_type == "cuda" and size < _MIN_FLEX_HEAD:
        return f"on CUDA it takes heads of {_MIN_FLEX_HEAD} or more, and those of {config.model_type!r} have {size}"
    return None


def mask_form(teacher_attention: str, model: HFCausalLM, device: torch.device) -> MaskForm:
    """Returns the form of masks that ``future_encoder.teacher_attention`` asks for; "auto" = what is fastest on ``device``."""
    if teacher_attention != "auto":
        return "flex" if teacher_attention == "flex" else "dense"
    if device.type == "cuda" and model._supports_flex_attn and flex_problem(model.config, device.type) is None:
        return "flex"
    return "windows" if model._supports_attention_backend and not model.context.is_split else "dense"


def causal_attention(
    model: HFCausalLM,
    input_dict: dict[str, Tensor],
    within_documents: bool,
    device: torch.device,
    rows: slice = slice(None),
) -> dict[str, Any]:
    """Returns the forward's arguments beside the tokens; an empty dict if the model's own causal mask is right.

    ``input_dict`` has the dataloader's (B, T) tensors: "input", and "doc_ids" and "positions" if there are documents;
    ``rows`` are the sequences to use. Where ``model.context`` splits them, the first call for a sequence length is collective.
    """
    context = model.context
    within = within_documents and "doc_ids" in input_dict
    if not within and not context.is_split:
        return {}
    batch_size, seq_len = input_dict["input"][rows].shape
    queries, keys = context.positions(seq_len, device), context.order(seq_len, device)
    doc_ids, positions = None, queries.expand(batch_size, -1)
    if within:
        doc_ids, positions = (input_dict[name][rows].to(device) for name in ("doc_ids", "positions"))
        positions = context.shard(positions)
    make = causal_block_mask if mask_form("auto", model, device) == "flex" else causal_mask
    masks = {kind: make(doc_ids, window, queries, keys) for kind, window in attention_windows(model.config).items()}
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    return {"attention_mask": mask, "position_ids": positions, "part_of_sequence": context.is_split}


@contextmanager
def positions_in_order() -> Iterator[None]:
    """Keeps transformers from looking for packed sequences in the positions of a batch without a mask, which waits for the device."""
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


def choose_kernels(config: PreTrainedConfig, attention_mask: Any, seq_len: int) -> None:
    """Keeps SDPA from cuDNN, in this process, if any layer of a forward of ``seq_len`` positions is given a mask.

    Beside ``attention_mask``, backbones make masks for windows, and those with attention code of their own may for anything.

    cuDNN's kernels do not promise zeros for rows that attend to nothing, and their backward by a mask has given NaN
    (https://github.com/pytorch/pytorch/issues/196678). Without masks it is the fastest there is, and allowed again.
    """
    masked = attention_mask is not None or not supports("attention_backend", config)
    try:
        masked = masked or any(0 < window <= seq_len for window in attention_windows(config).values())
    except ValueError:  # layers of a kind that is not known here
        masked = True
    torch.backends.cuda.enable_cudnn_sdp(_CUDNN and not masked)


def _known_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    mapping: Any = AutoModelForCausalLM._model_mapping
    return mapping.get(type(config), None)


def boolean_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends by a boolean mask, in the signature of transformers' interface; gives zeros where nothing is allowed.

    transformers' own code has no masks in blocks, and under soft-capping (Gemma-2) it adds a boolean mask to the scores as
    zeros and ones. Returns (B, T, H, d), and None for the weights.

    Args:
        query, key, value: (B, H or fewer, T, d).
        attention_mask: (B or 1, 1, T, T) bool; or (B or 1, n, C, K) bool, in blocks of C queries and the K keys from the
            same position on, n·C >= T (:func:`flame_ext.objective.masks.anticausal_window_mask`).
        scaling: factor of the scores; d^-1/2 by default.
        softcap: c in c·tanh(score / c), which is applied before the mask.
        s_aux: (H,) sinks, scores of a key of zeros that every query attends to (gpt-oss).
    """
    if dropout or kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__}: dropout and position biases are not supported here")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    batch_size, seq_len = query.shape[0], query.shape[2]
    if attention_mask.shape[1] > 1:
        _, count, size, reach = attention_mask.shape
        query = _blocks(query, count, size, size)
        key, value = _blocks(key, count, size, reach), _blocks(value, count, size, reach)
        attention_mask = attention_mask.expand(batch_size, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    if softcap is None and s_aux is None:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~attention_mask, float("-inf"))
        if s_aux is not None:
            sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        weights = weights.masked_fill(~attention_mask.any(dim=-1, keepdim=True), 0.0)
        output = weights.to(value.dtype) @ value
    # Joins blocks, (B·n, C, H, d), to sequences; without blocks this changes nothing.
    output = output.transpose(1, 2).unflatten(0, (batch_size, -1)).flatten(1, 2)
    return output[:, :seq_len].contiguous(), None


def _blocks(states: Tensor, count: int, size: int, reach: int) -> Tensor:
    """Cuts (B, H, T, d) into (B·count, H, reach, d), one block from every size-th position on, with zeros after the end."""
    states = F.pad(states, (0, 0, 0, (count - 1) * size + reach - states.shape[2]))
    return states.unfold(2, reach, size).permute(0, 2, 1, 4, 3).flatten(0, 1)


AttentionInterface.register(BOOLEAN_ATTENTION, boolean_attention)
