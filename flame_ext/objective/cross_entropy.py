"""The log-probabilities that the objective needs, from logits that are read twice and copied never.

A float32 copy of the logits, its log-softmax and their gradients are what a language model's loss usually spends its
memory on. Here only one chunk of rows at a time is in float32, in the forward and again in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_ext.objective.compilation import compiled

IGNORE_INDEX = -100
"""The label of a position that does not count, as torch and the host have it."""

# A chunk of rows is at most this many float32 elements (64 MiB).
_CHUNK_ELEMENTS = 1 << 24


class TokenLogProbs(NamedTuple):
    """Log-probabilities of some tokens at each position."""

    values: Tensor
    """(N, 1 + K) float32, differentiable: of the label, and of the K likeliest tokens; finite for an ignored label."""
    token_ids: Tensor
    """(N, 1 + K) int64: which tokens these are; 0 for an ignored label."""


def token_log_probs(
    logits: Tensor, labels: Tensor, top_k: int = 0, compile_backend: str | None = None
) -> TokenLogProbs:
    """log softmax(logits), in float32, of the label and of the ``top_k`` likeliest tokens of each row.

    Args:
        logits: (N, V).
        labels: (N,) int64, ``IGNORE_INDEX`` where there is none.
        top_k: K, in 0..V.
        compile_backend: of ``torch.compile``, for the arithmetic of a chunk; None = not compiled.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return TokenLogProbs(*_TokenLogProbs.apply(logits, labels, top_k, compile_backend))


def cross_entropy_sum(log_probs: Tensor, labels: Tensor) -> Tensor:
    """-sum of the labels' log-probabilities, without those to be ignored, in the order that torch's own loss sums them.

    Args:
        log_probs: (N,) float32, of the labels.
        labels: (N,) int64.
    """
    first = torch.zeros_like(labels).masked_fill_(labels == IGNORE_INDEX, IGNORE_INDEX)
    return F.nll_loss(log_probs[:, None], first, reduction="sum", ignore_index=IGNORE_INDEX)


def cross_entropy_loss(logits: Tensor, labels: Tensor, compile_backend: str | None = None) -> Tensor:
    """The host's loss function: the sum of the cross-entropies, number for number.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64.
        compile_backend: as in :func:`token_log_probs`.
    """
    labels = labels.flatten()
    log_probs = token_log_probs(logits.flatten(0, 1), labels, compile_backend=compile_backend)
    return cross_entropy_sum(log_probs.values[:, 0], labels)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, top_k: int, compile_backend: str | None
    ) -> tuple[Tensor, Tensor]:
        own = labels.masked_fill(labels == IGNORE_INDEX, 0)[:, None]
        values = torch.empty(logits.shape[0], 1 + top_k, device=logits.device)
        token_ids = torch.empty(logits.shape[0], 1 + top_k, device=logits.device, dtype=torch.int64)
        look_up = compiled(_look_up, compile_backend)
        for rows in _chunks(logits):
            values[rows], token_ids[rows] = look_up(logits[rows], own[rows], top_k)
        ctx.save_for_backward(logits, token_ids)
        ctx.compile_backend = compile_backend
        ctx.mark_non_differentiable(token_ids)
        return values, token_ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _no_grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids = ctx.saved_tensors
        logits_grad = torch.empty_like(logits)
        spread = compiled(_spread, ctx.compile_backend)
        for rows in _chunks(logits):
            logits_grad[rows] = spread(logits[rows], token_ids[rows], grad[rows])
        return logits_grad, None, None, None


def _look_up(logits: Tensor, own: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    if top_k == 0:
        return log_probs.gather(1, own), own
    likeliest = log_probs.topk(top_k, dim=-1)
    return (
        torch.cat([log_probs.gather(1, own), likeliest.values], dim=1),
        torch.cat([own, likeliest.indices], dim=1),
    )


def _spread(logits: Tensor, token_ids: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the logits, by the operation that torch's own backward calls: another exp has other last bits."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    spread = torch.zeros_like(log_probs).scatter_add(1, token_ids, grad)
    return torch.ops.aten._log_softmax_backward_data(spread, log_probs, -1, torch.float32).to(logits.dtype)


def _chunks(logits: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    return [slice(begin, begin + rows) for begin in range(0, logits.shape[0], rows)]
