"""InfoNCE without an N x M matrix in memory.

Contrastive predictive coding (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, eq. 4): each query has one
positive among the keys, all other valid keys are its negatives. The softmax runs over tiles of keys (Milakov and Gimelshein
2018, https://arxiv.org/abs/1805.02867), so nothing is larger than a tile.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flame_ext.objective.chunks import chunks, compiled


def _tile(device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile of logits: 16 MiB on a CPU, which stay in a cache; else 256 MiB, which take few launches."""
    return (1024, 4096) if device.type == "cpu" else (4096, 16384)


class ContrastiveOutput(NamedTuple):
    """() float32 sums over the valid queries, which add up over micro-batches and ranks. Only ``loss_sum`` has a gradient."""

    loss_sum: Tensor  # -log softmax of the query's own key
    top1_sum: Tensor  # number of queries whose own key is nearer than every other valid key
    positive_cosine_sum: Tensor  # cosine of each query with its own key
    negative_cosine_sum: Tensor  # mean cosine of each query with the other valid keys
    keys_sum: Tensor  # N, the number of valid keys that each query is compared with, its own included
    information_sum: Tensor  # log N - loss: the lower bound on the mutual information of query and key, in nats


class _Softmax(NamedTuple):
    """The running softmax of a tile of queries over the keys seen so far, (Q,) each."""

    maximum: Tensor  # largest logit
    total: Tensor  # sum of exp(logit - maximum)
    positive: Tensor  # logit of the query's own key, once it was seen
    rival: Tensor  # largest logit of the other keys


def info_nce(
    queries: Tensor,
    keys: Tensor,
    query_mask: Tensor,
    key_mask: Tensor,
    targets: Tensor,
    temperature: float,
    compile_backend: str | None = None,
) -> ContrastiveOutput:
    """Sums the cross-entropy of each valid query's own key among all valid keys. Equal to::

        logits = (queries @ keys.T / temperature).masked_fill(~key_mask, -inf)
        loss_sum = cross_entropy(logits[query_mask], targets[query_mask], reduction="sum")

    but in tiles, with logits in float32 and gradients computed in the forward: 4·N·M·D floating point operations, or
    8·N·M·D if the keys require a gradient, and O((N + M)·D) memory. Shapes are static: invalid rows and columns are masked.

    Args:
        queries: (N, D), L2-normalised.
        keys: (M, D), L2-normalised. On an accelerator matrix products are in the dtype of the keys, accumulated in float32; on
            a CPU they are in float32.
        query_mask: (N,) bool. A valid query's target must be a valid key.
        key_mask: (M,) bool.
        targets: (N,) int64 in [0, M), the index of each query's own key; ignored where ``query_mask`` is false.
        temperature: > 0.
        compile_backend: backend of ``torch.compile`` for the operations between matrix products; None = not compiled.
    """
    # Autocast would lower the precision of the products.
    with torch.autocast(queries.device.type, enabled=False):
        loss_sum, top1_sum, positive_sum = _InfoNCE.apply(
            queries, keys, query_mask, key_mask, targets, temperature, compile_backend
        )
    with torch.no_grad():
        queried, keyed = query_mask.float(), key_mask.float()
        pairs, candidates = queried.sum(), keyed.sum()
        # The sum of all cosines is the product of the sums, which needs no N x M matrix.
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
        accumulate, spread = compiled(_accumulate, compile_backend), compiled(_spread, compile_backend)
        tile_queries, tile_keys = _tile(queries.device)
        # Products are in the dtype of the keys on an accelerator, else in float32.
        dtype = keys.dtype if keys.is_cuda else torch.float32
        bias = torch.zeros(keys.shape[0], device=keys.device).masked_fill_(~key_mask, float("-inf"))
        query_grad = torch.empty_like(queries) if wants_query_grad else None
        key_grad = torch.zeros(keys.shape, device=keys.device) if wants_key_grad else None
        sums = torch.zeros(3, device=queries.device)  # loss, top-1, cosine of the positive
        # All tiles share a buffer: on a CPU, fresh memory costs as much time as the product that is written to it.
        buffer = torch.empty(min(queries.shape[0], tile_queries), min(keys.shape[0], tile_keys), device=keys.device)
        for rows in chunks(queries.shape[0], tile_queries):
            tile, valid, target = queries[rows], query_mask[rows], targets[rows]
            scaled = (tile.float() * (1.0 / temperature)).to(dtype)
            nothing = torch.zeros(tile.shape[0], device=tile.device)
            least = torch.full_like(nothing, torch.finfo(torch.float32).min)
            softmax = _Softmax(maximum=least, total=nothing, positive=least.clone(), rival=least.clone())
            expected = torch.zeros(tile.shape, device=tile.device) if wants_query_grad else None
            for columns in chunks(keys.shape[0], tile_keys):
                logits = _products(scaled, keys[columns], buffer)
                weights, rescale, softmax = accumulate(logits, bias[columns], target - columns.start, softmax, dtype)
                if expected is not None:
                    _add_products(expected.mul_(rescale[:, None]), weights, keys[columns])
            # An invalid row may have no valid key and a masked target: drop it before inf - inf can arise.
            loss = torch.where(valid, softmax.total.log() + softmax.maximum - softmax.positive, 0.0)
            hits = (softmax.positive > softmax.rival) & valid
            cosines = torch.where(valid, softmax.positive * temperature, 0.0)
            sums += torch.stack([loss.sum(), hits.float().sum(), cosines.sum()])
            per_row = torch.where(valid, 1.0 / temperature, 0.0)
            share = torch.where(valid, per_row / softmax.total, 0.0)
            if query_grad is not None and expected is not None:
                # The gradient is the key that the softmax expects less the query's own key.
                own = keys[target].float().mul_(per_row[:, None])
                query_grad[rows] = expected.mul_(share[:, None]).sub_(own)
            if key_grad is not None:
                for columns in chunks(keys.shape[0], tile_keys):
                    logits = _products(scaled, keys[columns], buffer)
                    weights = spread(logits, bias[columns], softmax.maximum, share, dtype)
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


def _accumulate(
    logits: Tensor, bias: Tensor, target: Tensor, so_far: _Softmax, dtype: torch.dtype
) -> tuple[Tensor, Tensor, _Softmax]:
    """Adds a tile of K keys to the softmax over the keys before.

    Takes (Q, K) logits, a (K,) bias of 0, or -inf for keys that are not valid, and (Q,) indices of the queries' own keys,
    counted from the tile's first. Returns (Q, K) exp(logit - maximum) in ``dtype``, the (Q,) factor that rescales earlier sums,
    and the softmax with these keys. Compiled, it reads the logits twice and writes the result; else it overwrites them.
    """
    # Not compiled, everything is done in the tile itself: fresh memory is slow on a CPU. Compiled, a write to it would be one more.
    fused = torch.compiler.is_compiling()
    logits = logits + bias if fused else logits.add_(bias)
    inside = (target >= 0) & (target < logits.shape[1])
    column = target.clamp(0, logits.shape[1] - 1)[:, None]
    own = logits.gather(1, column).squeeze(1)
    positive = torch.where(inside, own, so_far.positive)
    # The largest of the others takes a tenth of the time of an argmax, and does not count a tie as a hit.
    if fused:
        others = logits.masked_fill(
            target[:, None] == torch.arange(logits.shape[1], device=logits.device), float("-inf")
        )
    else:
        others = logits.scatter_(1, column, own.masked_fill(inside, float("-inf"))[:, None])
    rival = torch.maximum(so_far.rival, others.amax(dim=1))
    if not fused:
        logits = logits.scatter_(1, column, own[:, None])
    # Without a valid key so far, the maximum is the least finite number, so that exp(-inf - maximum) is 0.
    maximum = torch.maximum(so_far.maximum, torch.maximum(rival, positive))
    weights = (logits - maximum[:, None] if fused else logits.sub_(maximum[:, None])).exp_()
    rescale = torch.exp(so_far.maximum - maximum)
    total = so_far.total * rescale + weights.sum(dim=1)
    return weights.to(dtype), rescale, _Softmax(maximum, total, positive, rival)


def _spread(logits: Tensor, bias: Tensor, maximum: Tensor, share: Tensor, dtype: torch.dtype) -> Tensor:
    """The (Q, K) softmax in ``dtype``, given its (Q,) maximum; each row times ``share``, which includes its total."""
    logits = logits + bias if torch.compiler.is_compiling() else logits.add_(bias)
    return logits.sub_(maximum[:, None]).exp_().mul_(share[:, None]).to(dtype)


def _products(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """Computes left @ right.T in float32, (Q, D) and (K, D) to (Q, K), in ``buffer``."""
    out = buffer.flatten()[: left.shape[0] * right.shape[0]].view(left.shape[0], right.shape[0])
    if left.dtype == torch.float32:
        return torch.mm(left, right.float().T, out=out)
    return torch.mm(left, right.T, out_dtype=torch.float32, out=out)


def _add_products(result: Tensor, weights: Tensor, right: Tensor) -> None:
    """Adds weights @ right in float32, (Q, K) and (K, D) to (Q, D), to ``result``."""
    if weights.dtype == torch.float32:
        result.addmm_(weights, right.float())
    else:
        result.add_(torch.mm(weights, right.to(weights.dtype), out_dtype=torch.float32))
