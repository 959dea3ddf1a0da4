"""Log-probabilities of tokens, with only one chunk of the logits at a time in float32, in the forward and the backward."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flame_ext.objective.chunks import chunk_elements, chunks, compiled

_FUSED_COLUMNS = 2  # of a gradient: with more of them Inductor puts what they are added to into memory
IGNORE_INDEX = -100  # the label of a position that does not count, as in torch and torchtitan


class TokenLogProbs(NamedTuple):
    """Log-probabilities of the label and of the K likeliest tokens at each position."""

    values: Tensor  # (N, 1 + K) float32, differentiable; finite for an ignored label
    token_ids: Tensor  # (N, 1 + K) int64; 0 for an ignored label


def token_log_probs(
    logits: Tensor, labels: Tensor, top_k: int = 0, compile_backend: str | None = None
) -> TokenLogProbs:
    """Computes log softmax(logits), in float32, of the label and of the ``top_k`` likeliest tokens of each row.

    Args:
        logits: (N, V), or a DTensor that loss parallelism has sharded over the vocabulary, which is not gathered.
        labels: (N,) int64, ``IGNORE_INDEX`` where there is none; the same on all ranks of the DTensor.
        top_k: K, in 0..V.
        compile_backend: backend of ``torch.compile`` for the arithmetic of a chunk; None = not compiled.
    """
    with torch.autocast(logits.device.type, enabled=False):
        if isinstance(logits, DTensor):
            if logits.placements != (Shard(1),):
                raise ValueError(f"logits must be split over the vocabulary (Shard(1)), got {logits.placements}")
            _, (_, first) = compute_local_shape_and_global_offset(logits.shape, logits.device_mesh, logits.placements)
            shard = first, logits.device_mesh.get_group()
            return TokenLogProbs(*_ShardedTokenLogProbs.apply(logits.to_local(), labels, top_k, compile_backend, shard))
        return TokenLogProbs(*_TokenLogProbs.apply(logits, labels, top_k, compile_backend))


def cross_entropy_sum(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Sums the cross-entropies of (N,) labels, given their (N,) float32 log-probabilities, in the order of torch's own loss."""
    first = torch.zeros_like(labels).masked_fill_(labels == IGNORE_INDEX, IGNORE_INDEX)
    return F.nll_loss(log_probs[:, None], first, reduction="sum", ignore_index=IGNORE_INDEX)


def weighted_sum(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Sums the cross-entropies of (N,) labels, each times the label's probability, which has no gradient (arXiv 2508.05629, eq. 9)."""
    return cross_entropy_sum(log_probs * log_probs.detach().exp(), labels)


def cross_entropy_loss(logits: Tensor, labels: Tensor, compile_backend: str | None = None) -> Tensor:
    """Sums the cross-entropies of (B, T, V) logits and (B, T) labels, equal to torchtitan's loss to the last bit."""
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
        for rows in _chunks(logits, token_ids, compile_backend):
            values[rows], token_ids[rows] = look_up(logits[rows], own[rows], top_k)
        ctx.save_for_backward(logits, token_ids)
        ctx.compile_backend = compile_backend
        ctx.mark_non_differentiable(token_ids)
        return values, token_ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _no_grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids = ctx.saved_tensors
        spread = compiled(_spread, ctx.compile_backend)
        if len(parts := _chunks(logits, token_ids, ctx.compile_backend)) == 1:
            return spread(logits, token_ids, grad), None, None, None
        logits_grad = torch.empty_like(logits)
        for rows in parts:
            logits_grad[rows] = spread(logits[rows], token_ids[rows], grad[rows])
        return logits_grad, None, None, None


class _ShardedTokenLogProbs(torch.autograd.Function):
    """:class:`_TokenLogProbs` for (N, V / ranks) logits. The forward is collective; its results are the same on all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        top_k: int,
        compile_backend: str | None,
        shard: tuple[int, dist.ProcessGroup],
    ) -> tuple[Tensor, Tensor]:
        first, group = shard  # the rank's first token, and all ranks
        own = labels.masked_fill(labels == IGNORE_INDEX, 0)[:, None]
        column, inside = _columns(own, logits, first)
        maximum = torch.empty(logits.shape[0], device=logits.device)
        of_own = torch.empty(logits.shape[0], 1, device=logits.device)
        for rows in _chunks(logits, own, compile_backend):
            maximum[rows] = logits[rows].amax(dim=1).float()
            of_own[rows] = logits[rows].gather(1, column[rows]).float().masked_fill(~inside[rows], 0.0)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        total = torch.empty_like(maximum)
        sum_up = compiled(_sum_of_exponentials, compile_backend)
        for rows in _chunks(logits, own, compile_backend):
            total[rows] = sum_up(logits[rows], maximum[rows])
        for summed in (total, of_own):
            dist.all_reduce(summed, group=group)
        log_total = (maximum + total.log())[:, None]
        values, token_ids = of_own, own
        if top_k > 0:
            likeliest = logits.topk(min(top_k, logits.shape[1]), dim=1)
            candidates = _concatenated(likeliest.values.float(), group)
            candidate_ids = _concatenated(likeliest.indices + first, group)
            found = candidates.topk(top_k, dim=1)
            values = torch.cat([values, found.values], dim=1)
            token_ids = torch.cat([own, candidate_ids.gather(1, found.indices)], dim=1)
        ctx.save_for_backward(logits, token_ids, log_total)
        ctx.compile_backend, ctx.first = compile_backend, first
        ctx.mark_non_differentiable(token_ids)
        return values - log_total, token_ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _no_grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids, log_total = ctx.saved_tensors
        column, inside = _columns(token_ids, logits, ctx.first)
        of_tokens, of_row = grad.masked_fill(~inside, 0.0), grad.sum(dim=1, keepdim=True)
        logits_grad = torch.empty_like(logits)
        spread = compiled(_spread_shard, ctx.compile_backend)
        for rows in _chunks(logits, token_ids, ctx.compile_backend):
            logits_grad[rows] = spread(logits[rows], column[rows], of_tokens[rows], of_row[rows], log_total[rows])
        return logits_grad, None, None, None, None


def _sum_of_exponentials(logits: Tensor, maximum: Tensor) -> Tensor:
    return (logits.float() - maximum[:, None]).exp().sum(dim=1)


def _concatenated(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _columns(token_ids: Tensor, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Returns the columns of tokens in this rank's logits, and whether the tokens are in its slice at all."""
    column = token_ids - first
    inside = (column >= 0) & (column < logits.shape[1])
    return column.clamp(0, logits.shape[1] - 1), inside


def _spread_shard(logits: Tensor, column: Tensor, of_tokens: Tensor, of_row: Tensor, log_total: Tensor) -> Tensor:
    """Computes the gradient of the logits: that of the tokens, less each column's probability times the row's sum."""
    probabilities = (logits.float() - log_total).exp()
    return _added(-probabilities * of_row, column, of_tokens).to(logits.dtype)


def _look_up(logits: Tensor, own: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    token_ids = own if top_k == 0 else torch.cat([own, logits.topk(top_k, dim=-1).indices], dim=1)
    return torch.log_softmax(logits.float(), dim=-1).gather(1, token_ids), token_ids


def _spread(logits: Tensor, token_ids: Tensor, grad: Tensor) -> Tensor:
    """Computes the gradient of the logits by the operation of torch's own backward, whose last bits another exp would miss."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    spread = _added(torch.zeros_like(log_probs), token_ids, grad)
    return torch.ops.aten._log_softmax_backward_data(spread, log_probs, -1, torch.float32).to(logits.dtype)


def _added(matrix: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Adds (N, K) values to the (N, V) matrix at their (N, K) columns."""
    if not torch.compiler.is_compiling() or columns.shape[1] > _FUSED_COLUMNS:
        return matrix.scatter_add(1, columns, values)
    # Comparisons fuse with what makes the matrix and what is made of it; a scatter needs it in memory.
    every = torch.arange(matrix.shape[1], device=matrix.device)
    for column, value in zip(columns.unbind(1), values.unbind(1), strict=True):
        matrix = matrix + torch.where(every == column[:, None], value[:, None], 0.0)
    return matrix


def _chunks(logits: Tensor, token_ids: Tensor, compile_backend: str | None) -> list[slice]:
    """With few tokens a row, Inductor makes nothing of the logits' size in float32: all at once, as far as 32-bit indices reach."""
    fused = compile_backend == "inductor" and token_ids.shape[1] <= _FUSED_COLUMNS
    whole = fused and logits.numel() < 2**31
    elements = logits.numel() if whole else chunk_elements(logits.device)
    return chunks(logits.shape[0], max(1, elements // logits.shape[1]))
