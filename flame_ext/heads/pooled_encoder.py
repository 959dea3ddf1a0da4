"""Summaries of the future that are pooled from the causal hidden states."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flame_ext.heads.spec import FutureSummaries, Head
from flame_ext.model.context_parallel import WHOLE, SequenceParts
from flame_ext.objective.masks import has_future
from flame_ext.objective.windows import reduce_following

# All but cuDNN, see choose_kernels; of these, flash takes masks on CPUs only.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.OVERRIDEABLE]


class PooledEncoder(Head):
    """Future summaries by pooling the causal hidden states of the positions that follow.

    Cheap, since there is no second forward. But the state at t + 1 has read everything up to t + 1: these summaries
    carry the past, and part of the prediction is a copy. The window is ``future_k`` positions, 0 = to the end of the document.
    The query of "attention" is that of the window's first position, so that F_t depends on positions after t alone; that of
    "query" is of position t: what the prefix asks of its future.
    """

    def __init__(
        self, method: Literal["mean", "max", "attention", "query"], future_k: int, hidden_size: int, num_heads: int
    ) -> None:
        super().__init__()
        if method not in ("mean", "max", "attention", "query"):
            raise ValueError(f"method must be one of 'mean', 'max', 'attention', 'query', got {method!r}")
        self.method, self.future_k, self.num_heads = method, future_k, num_heads
        if method in ("attention", "query"):
            self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
            self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
            self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, doc_ids: Tensor, parts: SequenceParts = WHOLE) -> FutureSummaries:
        """(B, n, D) causal hidden states of this rank's positions, and (B, T) document numbers, to summaries in float32 (by attention:
        as they came).
        """
        valid_mask = parts.shard(has_future(doc_ids))
        if self.method in ("attention", "query"):
            states = self._attend(hidden_states, doc_ids, valid_mask, parts)
        elif self.method == "max":
            states = self._reduce(hidden_states.float(), doc_ids, parts, torch.maximum, float("-inf"))
        else:
            states = self._reduce(hidden_states.float(), doc_ids, parts, torch.add, 0.0)
            ones = torch.ones_like(doc_ids, dtype=states.dtype)[..., None]
            count = parts.shard(reduce_following(ones, doc_ids, self.future_k, torch.add, 0.0))
            states = states / count.clamp_min(1.0)
        return FutureSummaries(torch.where(valid_mask[..., None], states, 0.0), valid_mask)

    def _reduce(
        self, states: Tensor, doc_ids: Tensor, parts: SequenceParts, combine: Callable[..., Tensor], empty: float
    ) -> Tensor:
        if not parts.is_split:
            return reduce_following(states, doc_ids, self.future_k, combine, empty)
        batch_size, seq_len = doc_ids.shape
        length = states.shape[1] // parts.chunks
        if 0 < self.future_k < seq_len - 1:  # what a window reads behind a chunk comes from other ranks
            values = parts.following(states, self.future_k).flatten(0, 1)
            documents = parts.shard_ahead(doc_ids, self.future_k, -1).flatten(0, 1)
            found = reduce_following(values, documents, self.future_k, combine, empty)[:, :length]
            return found.unflatten(0, (batch_size, -1)).flatten(1, 2)
        # To the end of the document: of each later chunk, one vector is enough, of the document that it begins with.
        values, documents = states.unflatten(1, (parts.chunks, -1)), parts.shard_ahead(doc_ids, 0, -1)
        inside = reduce_following(values.flatten(0, 1), documents.flatten(0, 1), 0, combine, empty).view_as(values)
        beginnings = parts.joined(combine(values[:, :, 0], inside[:, :, 0]))
        firsts = parts.order(seq_len, doc_ids.device).view(-1, length)[:, 0]
        own, last = parts.positions(seq_len, doc_ids.device).view(-1, length)[:, 0], documents[:, :, -1]
        reached = (firsts > own[:, None]) & (doc_ids[:, None, firsts] == last[..., None])  # (B, chunks, chunks of all)
        later = torch.full_like(values[:, :, 0], empty)
        for number in range(len(firsts)):
            later = combine(later, torch.where(reached[..., number, None], beginnings[:, None, number], empty))
        continued = torch.where((documents == last[..., None])[..., None], later[:, :, None], empty)
        return combine(inside, continued).flatten(1, 2)

    def _attend(self, hidden_states: Tensor, doc_ids: Tensor, valid_mask: Tensor, parts: SequenceParts) -> Tensor:
        # Row t attends to t + 1 .. t + future_k; where nothing follows, to itself, since no row may be empty.
        seq_len, device = doc_ids.shape[1], doc_ids.device
        rows, columns = parts.positions(seq_len, device), parts.order(seq_len, device)
        ahead = columns[None, :] - rows[:, None]
        allowed = (ahead > 0) if self.future_k == 0 else (ahead > 0) & (ahead <= self.future_k)
        mask = allowed & (doc_ids[:, rows, None] == doc_ids[:, None, columns]) | ((ahead == 0) & ~valid_mask[..., None])

        def split(states: Tensor) -> Tensor:
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        asking = hidden_states
        if self.method == "attention":
            asking = parts.following(hidden_states, 1)[:, :, 1:].flatten(1, 2)
        keys_and_values = torch.cat([self.k_proj(hidden_states), self.v_proj(hidden_states)], dim=-1)
        key, value = map(split, parts.joined(keys_and_values).chunk(2, dim=-1))
        with sdpa_kernel(_KERNELS):
            states = F.scaled_dot_product_attention(split(self.q_proj(asking)), key, value, attn_mask=mask[:, None])
        return states.transpose(1, 2).flatten(2)
