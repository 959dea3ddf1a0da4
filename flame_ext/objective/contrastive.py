"""InfoNCE without an N x N matrix in memory.

Contrastive predictive coding (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, eq. 4): each query has one
positive among the keys, all other valid keys are its negatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Logits of one chunk of queries: at most this many float32 elements (64 MiB).
_CHUNK_ELEMENTS = 1 << 24


class ContrastiveOutput(NamedTuple):
    """Sums, so that they add up over micro-batches and ranks; the caller divides by the global number of pairs."""

    loss_sum: Tensor
    """() float32, differentiable with respect to the queries."""
    top1_sum: Tensor
    """() float32, no gradient: queries whose nearest valid key is their own."""


def info_nce(
    queries: Tensor, keys: Tensor, query_mask: Tensor, key_mask: Tensor, targets: Tensor, temperature: float
) -> ContrastiveOutput:
    """Sum over valid queries of the cross-entropy of finding their own key. Equal to::

        logits = (queries @ keys.T / temperature).masked_fill(~key_mask, -inf)
        loss_sum = cross_entropy(logits[query_mask], targets[query_mask], reduction="sum")

    but in chunks of queries, in float32, with the gradient of the queries computed beside the loss (the keys have
    none): 4·N·M·D floating point operations and O(N·D) memory. Shapes are static: invalid rows and columns are masked.

    Args:
        queries: (N, D), L2-normalised, float32, with gradient.
        keys: (M, D), L2-normalised, float32; treated as constants.
        query_mask: (N,) bool. A valid query's target must be a valid key.
        key_mask: (M,) bool.
        targets: (N,) int64 in [0, M), the index of each query's own key; ignored where ``query_mask`` is false.
        temperature: > 0.
    """
    return ContrastiveOutput(*_InfoNCE.apply(queries, keys.detach(), query_mask, key_mask, targets, temperature))


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, query_mask, key_mask, targets, temperature):
        needs_grad = ctx.needs_input_grad[0]
        loss_sum = queries.new_zeros(())
        top1_sum = queries.new_zeros(())
        grad = torch.empty_like(queries) if needs_grad else None
        column_bias = torch.zeros_like(key_mask, dtype=queries.dtype).masked_fill_(~key_mask, float("-inf"))
        rows = max(1, _CHUNK_ELEMENTS // max(1, keys.shape[0]))
        for begin in range(0, queries.shape[0], rows):
            chunk = slice(begin, begin + rows)
            valid = query_mask[chunk].to(queries.dtype)
            target = targets[chunk]
            logits = torch.mm(queries[chunk], keys.T).div_(temperature).add_(column_bias)
            # A row sees all keys at once, so its maximum is at hand; with no valid key it is -inf, which must stay 0.
            logits.sub_(logits.amax(dim=1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min))
            positive = logits.gather(1, target[:, None]).squeeze(1)
            top1_sum += ((logits.argmax(dim=1) == target).to(queries.dtype) * valid).sum()
            weights = logits.exp_()
            normaliser = weights.sum(dim=1)
            # An invalid row may have no valid key and an excluded target: take it out before inf - inf can arise.
            loss = torch.where(valid > 0, normaliser.log() - positive, 0.0)
            loss_sum += loss.sum()
            if grad is not None:
                scale = torch.where(valid > 0, normaliser.reciprocal(), 0.0)
                expected = torch.mm(weights, keys).mul_(scale[:, None])  # what the softmax expects the key to be
                grad[chunk] = (expected - keys[target] * valid[:, None]) / temperature
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(top1_sum)
        return loss_sum, top1_sum

    @staticmethod
    def backward(ctx, grad_loss, _grad_top1):
        (grad,) = ctx.saved_tensors
        return None if grad is None else grad * grad_loss, None, None, None, None, None
