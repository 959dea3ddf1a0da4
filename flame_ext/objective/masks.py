"""Which positions may see which, and which have a future at all. Pure functions; nothing loops over documents."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

_MIN_BLOCK = 64
"""Queries in a block of a windowed mask; smaller blocks save scores, and cost more in copies of keys than that."""


def doc_ids_from_eos(input_ids: Tensor, eos_id: int) -> Tensor:
    """Number the documents of packed sequences: an EOS is the last token of its document.

    Args:
        input_ids: (B, T) integer tokens.
        eos_id: the tokenizer's end-of-sequence id.

    Returns:
        (B, T) int64, counted from 0 in each sequence.
    """
    is_eos = (input_ids == eos_id).long()
    return is_eos.cumsum(dim=1) - is_eos


def anticausal_mask(
    seq_len: int, future_k: int = 0, doc_ids: Tensor | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The strictly-future attention mask: i attends to j where i < j <= i + future_k, in the same document.

    Positions without a future (the last one, and the last of every document) get a row with nothing allowed. The mask
    is boolean for that reason: scaled_dot_product_attention gives such a row zeros, while a large negative additive
    mask makes it uniform over *all* keys, past included, and one layer later every position reads the past from it.

    Args:
        seq_len: T.
        future_k: window, 0 = all the future.
        doc_ids: (B, T) integers, or None if the sequence is one document.
        device: of the result; ``doc_ids.device`` by default.

    Returns:
        (B, 1, T, T) bool, true where attention is allowed; B is 1 without ``doc_ids``.
    """
    position = torch.arange(seq_len, device=doc_ids.device if device is None and doc_ids is not None else device)
    distance = position[None, :] - position[:, None]  # (T, T): how far key j lies ahead of query i
    allowed = distance > 0
    if future_k > 0:
        allowed = allowed & (distance <= future_k)
    if doc_ids is None:
        return allowed[None, None]
    same_document = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]
    return allowed & same_document


def anticausal_window_mask(
    seq_len: int, future_k: int, doc_ids: Tensor | None = None, device: torch.device | str | None = None
) -> Tensor:
    """:func:`anticausal_mask` for a window much shorter than the sequence, without its (T, T): block by block.

    Block n of C = max(future_k, 64) queries, the positions nC .. nC + C - 1, can see no keys but those of nC .. nC + K - 1,
    K = C + future_k. :func:`flame_ext.model.attention.boolean_attention` attends by it.

    Args:
        seq_len: T.
        future_k: window, > 0.
        doc_ids: (B, T) integers, or None if the sequence is one document.
        device: of the result; ``doc_ids.device`` by default.

    Returns:
        (B, ceil(T / C), C, K) bool, true where attention is allowed; B is 1 without ``doc_ids``.
    """
    size = max(future_k, _MIN_BLOCK)
    count = -(-seq_len // size)
    query = torch.arange(count * size, device=doc_ids.device if device is None and doc_ids is not None else device)
    query = query.view(count, size, 1)
    key = query[:, :1] + torch.arange(size + future_k, device=query.device)  # (count, 1, K)
    allowed = ((key > query) & (key <= query + future_k) & (key < seq_len))[None]
    if doc_ids is None:
        return allowed
    doc_ids = F.pad(doc_ids, (0, count * size + future_k - seq_len), value=-1)
    return allowed & (doc_ids[:, query] == doc_ids[:, key])


def window_is_short(seq_len: int, future_k: int) -> bool:
    """Whether :func:`anticausal_window_mask` saves at least half of the scores."""
    return future_k > 0 and 2 * (max(future_k, _MIN_BLOCK) + future_k) <= seq_len


def anticausal_block_mask(
    batch_size: int,
    seq_len: int,
    future_k: int = 0,
    doc_ids: Tensor | None = None,
    device: torch.device | str | None = None,
) -> BlockMask:
    """:func:`anticausal_mask` for FlexAttention, which skips blocks where nothing is allowed and holds no (T, T) mask.

    Args:
        batch_size: B.
        seq_len: T.
        future_k: window, 0 = all the future.
        doc_ids: (B, T) integers, or None if the sequence is one document.
        device: of the result; ``doc_ids.device``, or the CPU, by default.
    """

    def allowed(b: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        result = j > i
        if future_k > 0:
            result = result & (j <= i + future_k)
        if doc_ids is not None:
            result = result & (doc_ids[b, i] == doc_ids[b, j])
        return result

    # Not compiled, it holds the (B, T, T) mask for a moment.
    if device is None:
        device = "cpu" if doc_ids is None else doc_ids.device
    create = _compiled_create_block_mask() if torch.device(device).type == "cuda" else create_block_mask
    return create(allowed, None if doc_ids is None else batch_size, None, seq_len, seq_len, device=device)


def causal_mask(doc_ids: Tensor | None, window: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Causal attention that does not leave a document: i attends to j where i - window < j <= i, in the same document.

    Args:
        doc_ids: (B, T) integers, or None if each sequence is one document.
        window: positions that are seen, the own one included; 0 = all the past.
        queries: (n,) positions that the rows are for.
        keys: (m,) positions that the columns are for.

    Returns:
        (B, 1, n, m) bool, true where attention is allowed; B is 1 without ``doc_ids``.
    """
    behind = queries[:, None] - keys[None, :]
    allowed = ((behind >= 0) & (behind < window) if window else behind >= 0)[None, None]
    if doc_ids is None:
        return allowed
    return allowed & (doc_ids[:, None, queries, None] == doc_ids[:, None, None, keys])


def causal_block_mask(doc_ids: Tensor | None, window: int, queries: Tensor, keys: Tensor) -> BlockMask:
    """:func:`causal_mask` for FlexAttention, which skips blocks that are all masked."""

    def allowed(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        i, j = queries[row], keys[column]
        result = (j <= i) & (i - j < window) if window else j <= i
        return result if doc_ids is None else result & (doc_ids[b, i] == doc_ids[b, j])

    create = _compiled_create_block_mask() if queries.is_cuda else create_block_mask
    batch_size = None if doc_ids is None else doc_ids.shape[0]
    return create(allowed, batch_size, None, len(queries), len(keys), device=str(queries.device))


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def has_future(doc_ids: Tensor) -> Tensor:
    """Positions whose summary has something to summarise: the next position is in the same document.

    Args:
        doc_ids: (B, T) integers.

    Returns:
        (B, T) bool; the last position of a sequence is always False.
    """
    valid = torch.zeros_like(doc_ids, dtype=torch.bool)
    valid[:, :-1] = doc_ids[:, 1:] == doc_ids[:, :-1]
    return valid


def pair_mask(valid_mask: Tensor, doc_ids: Tensor, shift: int) -> Tensor:
    """Positions t for which the pair (prediction at t, summary at t + shift) counts.

    Args:
        valid_mask: (B, T) bool, positions with a valid summary.
        doc_ids: (B, T) integers.
        shift: >= 1.

    Returns:
        (B, T) bool: t + shift is inside the sequence, in the document of t, and has a valid summary.
    """
    if shift < 1:
        raise ValueError(f"shift must be >= 1 (F_t itself contains token t), got {shift}")
    pairs = torch.zeros_like(valid_mask)
    pairs[:, :-shift] = valid_mask[:, shift:] & (doc_ids[:, shift:] == doc_ids[:, :-shift])
    return pairs
