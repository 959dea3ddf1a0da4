"""The summary F_t of what follows position t: the target of the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from flame_ext.model.initialisation import ParameterInit, linear_inits
from flame_ext.objective.masks import (
    anticausal_block_mask,
    anticausal_mask,
    anticausal_window_mask,
    has_future,
    window_is_short,
)
from flame_ext.objective.windows import reduce_following

AttentionMask = Tensor | BlockMask
MaskForm = Literal["dense", "windows", "flex"]
"""A (T, T) tensor; blocks of one where the window is short; FlexAttention's."""


class FutureSummaries(NamedTuple):
    """What an encoder gives."""

    states: Tensor
    """(B, T, D); finite everywhere."""
    valid_mask: Tensor
    """(B, T) bool: positions that have a future in their document. What ``states`` holds elsewhere means nothing."""


class AnticausalEncoder(nn.Module):
    """Future summaries by an anti-causal, gradient-free forward of the backbone itself.

    The backbone runs a second time with a mask that lets position t attend to later positions only; its last hidden
    states are the summaries. Token t itself enters F_t through its own residual stream, which is why predictions are
    compared with F_{t+shift}, shift >= 1. No parameters of its own.

    Args:
        future_k: how many following positions a layer may attend to, 0 = all.
        windows: layer type of the backbone to the window of its causal attention, the position itself included, 0 = all
            the past (:func:`flame_ext.model.attention.attention_windows`). A layer that sees w positions back sees as
            many ahead.
    """

    def __init__(self, future_k: int = 0, windows: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.future_k = future_k
        self.windows = dict(windows or {"full_attention": 0})

    @torch.no_grad()  # not inference_mode: FSDP's unsharded parameters are used again by the student's forward
    def forward(
        self, backbone: Callable[..., Tensor], input_ids: Tensor, doc_ids: Tensor | None, form: MaskForm = "dense"
    ) -> FutureSummaries:
        """
        Args:
            backbone: ``backbone(input_ids, attention_mask=mask, output="hidden_states")`` gives (B, T, D). The mask is
                (B or 1, 1, T, T), true where attention is allowed, or in blocks of it, or one for each layer type if
                there are several.
                Under FSDP it has to be the root module.
            input_ids: (B, T).
            doc_ids: (B, T) if summaries stop at the end of their document, else None.
            form: of the masks, one that the backbone understands.
        """
        states = backbone(
            input_ids, attention_mask=self.attention_mask(input_ids, doc_ids, form), output="hidden_states"
        )
        return self.summaries(states, input_ids, doc_ids)

    def attention_mask(
        self, input_ids: Tensor, doc_ids: Tensor | None, form: MaskForm
    ) -> AttentionMask | dict[str, AttentionMask]:
        """What the backbone's second forward attends by, see :meth:`forward`."""
        masks = {kind: self._mask(input_ids, doc_ids, window, form) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def summaries(self, states: Tensor, input_ids: Tensor, doc_ids: Tensor | None) -> FutureSummaries:
        """From the (B, T, D) last hidden states of that forward."""
        return FutureSummaries(states, has_future(torch.zeros_like(input_ids) if doc_ids is None else doc_ids))

    def _mask(self, input_ids: Tensor, doc_ids: Tensor | None, window: int, form: MaskForm) -> AttentionMask:
        # A causal window of w is w - 1 positions beside the own one, which an anti-causal layer does not attend to.
        reach = min((k for k in (self.future_k, max(1, window - 1) if window else 0) if k), default=0)
        batch_size, seq_len = input_ids.shape
        if form == "flex":
            return anticausal_block_mask(batch_size, seq_len, reach, doc_ids, device=input_ids.device)
        if form == "windows" and window_is_short(seq_len, reach):
            return anticausal_window_mask(seq_len, reach, doc_ids, device=input_ids.device)
        return anticausal_mask(seq_len, reach, doc_ids, device=input_ids.device)

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """There are none."""
        return {}

    def extra_repr(self) -> str:
        return f"future_k={self.future_k}, windows={self.windows}"


class PooledEncoder(nn.Module):
    """Future summaries by pooling the causal hidden states of the positions that follow.

    Cheap, since there is no second forward. But the state at t + 1 has read everything up to t + 1: these summaries
    carry the past, and part of the prediction is a copy.

    Args:
        method: "mean", "max", or "attention": over the window, with projections of its own; the query is that of the
            window's first position, so that F_t depends on positions after t alone.
        future_k: the window, 0 = to the end of the document.
        hidden_size: D.
        num_heads: of the attention; divides D.
    """

    def __init__(
        self, method: Literal["mean", "max", "attention"], future_k: int, hidden_size: int, num_heads: int
    ) -> None:
        super().__init__()
        if method not in ("mean", "max", "attention"):
            raise ValueError(f"method must be one of 'mean', 'max', 'attention', got {method!r}")
        self.method, self.future_k, self.num_heads = method, future_k, num_heads
        if method == "attention":
            self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
            self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
            self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, doc_ids: Tensor) -> FutureSummaries:
        """(B, T, D) causal hidden states and (B, T) document numbers to summaries in float32 (attention: as it came)."""
        valid_mask = has_future(doc_ids)
        if self.method == "attention":
            states = self._attend(hidden_states, doc_ids)
        elif self.method == "max":
            states = reduce_following(hidden_states.float(), doc_ids, self.future_k, torch.maximum, float("-inf"))
        else:
            states = reduce_following(hidden_states.float(), doc_ids, self.future_k, torch.add, 0.0)
            ones = torch.ones_like(doc_ids, dtype=states.dtype)[..., None]
            states = states / reduce_following(ones, doc_ids, self.future_k, torch.add, 0.0).clamp_min(1.0)
        return FutureSummaries(torch.where(valid_mask[..., None], states, 0.0), valid_mask)

    def _attend(self, hidden_states: Tensor, doc_ids: Tensor) -> Tensor:
        # Row i attends to i .. i + future_k - 1, itself included: no row is empty. It is the summary of i - 1.
        position = torch.arange(doc_ids.shape[1], device=doc_ids.device)
        ahead = position[None, :] - position[:, None]
        allowed = (ahead >= 0) if self.future_k == 0 else (ahead >= 0) & (ahead < self.future_k)
        mask = allowed & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])

        def split(states: Tensor) -> Tensor:
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query, key, value = (split(proj(hidden_states)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return states.roll(-1, dims=1)

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """Linear maps LeCun-uniform."""
        return linear_inits(self)

    def extra_repr(self) -> str:
        return f"method={self.method}, future_k={self.future_k}"


FutureEncoder = AnticausalEncoder | PooledEncoder


def build_future_encoder(
    summary_method: Literal["anticausal", "mean", "max", "attention"],
    future_k: int,
    hidden_size: int,
    num_heads: int,
    windows: Mapping[str, int] | None = None,
) -> FutureEncoder:
    """The encoder of ``[future_encoder]``.

    Args:
        summary_method: "anticausal", "mean", "max" or "attention".
        future_k: window, 0 = all the future.
        hidden_size: D of the backbone.
        num_heads: of the backbone; an attention of its own has as many, or one if they do not divide D.
        windows: of the backbone, see :class:`AnticausalEncoder`.
    """
    if summary_method == "anticausal":
        return AnticausalEncoder(future_k, windows)
    return PooledEncoder(summary_method, future_k, hidden_size, 1 if hidden_size % num_heads else num_heads)
