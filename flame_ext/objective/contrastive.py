"""InfoNCE without an N x M matrix in memory.

Contrastive predictive coding (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, eq. 4): each query has one
positive among the keys, all other valid keys are its negatives. The softmax is accumulated over tiles of keys with a
running maximum (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867), so nothing is larger than a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flame_ext.objective.compilation import compiled

# One tile of logits is at most _TILE_QUERIES x _TILE_KEYS float32 (16 MiB): large enough for a matrix product to run at
# full speed, small enough to stay in a cache.
_TILE_QUERIES = 1024
_TILE_KEYS = 4096


class ContrastiveOutput(NamedTuple):
    """Sums over the valid queries, so that they add up over micro-batches and ranks; the caller divides by the global
    number of pairs. All () float32; only ``loss_sum`` has a gradient."""

    loss_sum: Tensor
    """-log softmax of the positive, differentiable with respect to queries and, if they ask for it, keys."""
    top1_sum: Tensor
    """Queries with their own key nearer than every other valid one."""
    positive_cosine_sum: Tensor
    """Cosine of a query and its own key."""
    negative_cosine_sum: Tensor
    """Mean cosine of a query and the other valid keys."""
    keys_sum: Tensor
    """Number of valid keys that a query is compared with, its own included: the N of the bound."""
    information_sum: Tensor
    """log N - loss: the lower bound on the mutual information of query and key, in nats."""


class _Softmax(NamedTuple):
    """What is known of a tile of queries after some of the keys."""

    maximum: Tensor
    """(Q,) the largest logit."""
    total: Tensor
    """(Q,) sum of exp(logit - maximum)."""
    positive: Tensor
    """(Q,) the logit of the own key, once it was met."""
    rival: Tensor
    """(Q,) the largest logit of another key than the own."""


def info_nce(
    queries: Tensor,
    keys: Tensor,
    query_mask: Tensor,
    key_mask: Tensor,
    targets: Tensor,
    temperature: float,
    compile_backend: str | None = None,
) -> ContrastiveOutput:
    """Sum over valid queries of the cross-entropy of finding their own key. Equal to::

        logits = (queries @ keys.T / temperature).masked_fill(~key_mask, -inf)
        loss_sum = cross_entropy(logits[query_mask], targets[query_mask], reduction="sum")

    but in tiles, logits in float32, with the gradients computed beside the loss: 4·N·M·D floating point operations, or
    8·N·M·D if the keys want a gradient, and O((N + M)·D) memory. Shapes are static: invalid rows and columns are masked.

    Args:
        queries: (N, D), L2-normalised, with gradient.
        keys: (M, D), L2-normalised. Their dtype is that of the matrix products on an accelerator, which accumulates in
            float32; on a CPU products are in float32.
        query_mask: (N,) bool. A valid query's target must be a valid key.
        key_mask: (M,) bool.
        targets: (N,) int64 in [0, M), the index of each query's own key; ignored where ``query_mask`` is false.
        temperature: > 0.
        compile_backend: of ``torch.compile``, for what lies between the matrix products; None = not compiled.
    """
    # Autocast would take the products to a lower precision behind our back.
    with torch.autocast(queries.device.type, enabled=False):
        loss_sum, top1_sum, positive_sum = _InfoNCE.apply(
            queries, keys, query_mask, key_mask, targets, temperature, compile_backend
        )
    with torch.no_grad():
        queried, keyed = query_mask.float(), key_mask.float()
        pairs, candidates = queried.sum(), keyed.sum()
        # The sum over all pairs of cosines is the cosine of the sums: no N x M here either.
        every = (queried @ queries.float()) @ (keyed.to(keys.dtype) @ keys).float()
        negative_sum = (every - positive_sum) / (candidates - 1).clamp_min(1.0)
        information = pairs * candidates.clamp_min(1.0).log() - loss_sum
    return ContrastiveOutput(loss_sum, top1_sum, positive_sum, negative_sum, pairs * candidates, information)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        query_mask: Tensor,
        key_mask: Tensor,
        targets: Tensor,
        temperature: float,
        compile_backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_query_grad, wants_key_grad = ctx.needs_input_grad[:2]
        accumulate = compiled(_accumulate, compile_backend)
        bias = torch.zeros(keys.shape[0], device=keys.device).masked_fill_(~key_mask, float("-inf"))
        query_grad = torch.empty_like(queries) if wants_query_grad else None
        key_grad = torch.zeros(keys.shape, device=keys.device) if wants_key_grad else None
        sums = torch.zeros(3, device=queries.device)  # loss, top-1, cosine of the positive
        # One buffer for all tiles: fresh memory costs a CPU as much as the product that is written there.
        buffer = torch.empty(min(queries.shape[0], _TILE_QUERIES), min(keys.shape[0], _TILE_KEYS), device=keys.device)
        for rows in _tiles(queries.shape[0], _TILE_QUERIES):
            tile, valid, target = queries[rows], query_mask[rows], targets[rows]
            scaled = tile.float() * (1.0 / temperature)
            softmax = _empty_softmax(tile)
            expected = torch.zeros(tile.shape, device=tile.device) if wants_query_grad else None
            for columns in _tiles(keys.shape[0], _TILE_KEYS):
                logits = _products(scaled, keys[columns], buffer)
                weights, rescale, softmax = accumulate(logits, bias[columns], target - columns.start, softmax)
                if expected is not None:
                    _add_products(expected.mul_(rescale[:, None]), weights, keys[columns])
            # An invalid row may have no valid key and an excluded target: take it out before inf - inf can arise.
            loss = torch.where(valid, softmax.total.log() + softmax.maximum - softmax.positive, 0.0)
            hits = (softmax.positive > softmax.rival) & valid
            cosines = torch.where(valid, softmax.positive * temperature, 0.0)
            sums += torch.stack([loss.sum(), hits.float().sum(), cosines.sum()])
            per_row = torch.where(valid, 1.0 / temperature, 0.0)
            share = torch.where(valid, per_row / softmax.total, 0.0)
            if query_grad is not None and expected is not None:
                # The gradient: what the softmax expects the key to be, less the key that it is.
                own = keys[target].float().mul_(per_row[:, None])
                query_grad[rows] = expected.mul_(share[:, None]).sub_(own)
            if key_grad is not None:
                for columns in _tiles(keys.shape[0], _TILE_KEYS):
                    logits = _products(scaled, keys[columns], buffer).add_(bias[columns])
                    weights = logits.sub_(softmax.maximum[:, None]).exp_().mul_(share[:, None])
                    _add_products(key_grad[columns], weights.T, tile)
                key_grad.index_add_(0, target, tile.float() * per_row[:, None], alpha=-1.0)
        ctx.save_for_backward(query_grad, None if key_grad is None else key_grad.to(keys.dtype))
        loss_sum, top1_sum, positive_sum = sums.unbind()
        ctx.mark_non_differentiable(top1_sum, positive_sum)
        return loss_sum, top1_sum, positive_sum

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_no_grads: Tensor) -> tuple[Tensor | None, ...]:
        query_grad, key_grad = ctx.saved_tensors
        grads = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in (query_grad, key_grad))
        return *grads, None, None, None, None, None


def _accumulate(logits: Tensor, bias: Tensor, target: Tensor, so_far: _Softmax) -> tuple[Tensor, Tensor, _Softmax]:
    """Take a tile of keys into the softmax.

    Args:
        logits: (Q, K) float32; overwritten.
        bias: (K,) 0, or -inf where the key is not valid.
        target: (Q,) each query's own key, counted from the tile's first.
        so_far: of the keys before.

    Returns:
        exp(logit - maximum) (Q, K), what earlier sums have to be multiplied by (Q,), and the softmax with these keys.
    """
    logits = logits.add_(bias)
    inside = ((target >= 0) & (target < logits.shape[1]))[:, None]
    column = target.clamp(0, logits.shape[1] - 1)[:, None]
    own = logits.gather(1, column)
    positive = torch.where(inside, own, so_far.positive[:, None]).squeeze(1)
    # The largest of the others: a tenth of the time of an argmax, and a tie is no hit.
    logits = logits.scatter_(1, column, own.masked_fill(inside, float("-inf")))
    rival = torch.maximum(so_far.rival, logits.amax(dim=1))
    logits = logits.scatter_(1, column, own)
    # With no valid key so far the maximum is the least finite number: -inf less that is -inf, and exp of it 0.
    maximum = torch.maximum(so_far.maximum, torch.maximum(rival, positive))
    weights = logits.sub_(maximum[:, None]).exp_()
    rescale = torch.exp(so_far.maximum - maximum)
    total = so_far.total * rescale + weights.sum(dim=1)
    return weights, rescale, _Softmax(maximum, total, positive, rival)


def _empty_softmax(tile: Tensor) -> _Softmax:
    nothing = torch.zeros(tile.shape[0], device=tile.device)
    least = torch.full_like(nothing, torch.finfo(torch.float32).min)
    return _Softmax(maximum=least, total=nothing, positive=least, rival=least)


def _tiles(length: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _products(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """left @ right.T in float32: (Q, D), (K, D) to (Q, K), in ``buffer`` where the device can."""
    if right.dtype == torch.float32 or not right.is_cuda:
        out = buffer.flatten()[: left.shape[0] * right.shape[0]].view(left.shape[0], right.shape[0])
        return torch.mm(left.float(), right.float().T, out=out)
    return torch.mm(left.to(right.dtype), right.T, out_dtype=torch.float32)


def _add_products(result: Tensor, weights: Tensor, right: Tensor) -> None:
    """result += weights @ right, in float32: (Q, K), (K, D) to (Q, D)."""
    if right.dtype == torch.float32 or not right.is_cuda:
        result.addmm_(weights, right.float())
    else:
        result.add_(torch.mm(weights.to(right.dtype), right, out_dtype=torch.float32))
