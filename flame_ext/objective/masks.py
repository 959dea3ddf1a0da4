"""Attention masks over packed documents, and which positions have a future.

Each mask is one function, FlexAttention's ``mask_mod``, from which its dense, windowed and block forms are made.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps integer tensors of sequences, heads, rows and columns, which broadcast, to a bool: whether attention is allowed."""

_MIN_BLOCK = 64  # queries in a block of a windowed mask; smaller ones save scores, but copying keys costs more
_compile = cache(torch.compile)


def doc_ids_from_eos(input_ids: Tensor, eos_id: int) -> Tensor:
    """Numbers the documents of (B, T) packed tokens, from 0 in each sequence, as (B, T) int64; an EOS ends its document."""
    is_eos = (input_ids == eos_id).long()
    return is_eos.cumsum(dim=1) - is_eos


def anticausal(future_k: int, doc_ids: Tensor | None) -> MaskMod:
    """The strictly-future mask: position i attends to j where i < j <= i + future_k, in the same document.

    The last position of a document may attend to nothing. The mask is boolean for that reason: attention gives such a row
    zeros, while a large negative additive mask makes it uniform over *all* keys, past included, and one layer later every
    position reads the past from it.

    ``future_k`` 0 = all the future; ``doc_ids`` are (B, T) integers, or None if each sequence is one document.
    """

    def allowed(b: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        result = (j > i) & (j <= i + future_k) if future_k else j > i
        return result if doc_ids is None else result & (doc_ids[b, i] == doc_ids[b, j])

    return allowed


def causal(doc_ids: Tensor | None, window: int, queries: Tensor, keys: Tensor) -> MaskMod:
    """The causal mask: position i attends to j where i - window < j <= i, in the same document; window 0 = all the past.

    Its rows are for the (n,) positions ``queries`` and its columns for the (m,) ``keys``; ``doc_ids`` as in :func:`anticausal`.
    """

    def allowed(b: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        i, j = queries[row], keys[column]
        result = (j <= i) & (j > i - window) if window else j <= i
        return result if doc_ids is None else result & (doc_ids[b, i] == doc_ids[b, j])

    return allowed


def anticausal_mask(
    seq_len: int,
    future_k: int = 0,
    doc_ids: Tensor | None = None,
    device: torch.device | str = "cpu",
    queries: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Evaluates :func:`anticausal` as a (B, 1, n, m) bool tensor on ``device``, where ``doc_ids`` are; B is 1 without them.

    Its rows are for the (n,) positions ``queries`` and its columns for the (m,) ``keys``, all T of them if not given.
    """
    every = torch.arange(seq_len, device=device)
    rows, columns = (every if positions is None else positions for positions in (queries, keys))
    return _dense(anticausal(future_k, doc_ids), doc_ids, rows[None, :, None], columns)


def anticausal_window_mask(
    seq_len: int, future_k: int, doc_ids: Tensor | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Evaluates :func:`anticausal` only in the blocks that a window much shorter than the sequence can reach.

    Block n holds the C = max(future_k, 64) queries nC .. nC + C - 1 and the only keys that they can attend to,
    nC .. nC + C + future_k - 1. :func:`flame_ext.model.attention.boolean_attention` attends by it. Returns
    (B, ceil(T / C), C, C + future_k) bool; B is 1 without ``doc_ids``.
    """
    size = max(future_k, _MIN_BLOCK)
    count = -(-seq_len // size)
    query = torch.arange(count * size, device=device).view(count, size, 1)
    key = query[:, :1] + torch.arange(size + future_k, device=device)
    if doc_ids is not None:
        doc_ids = F.pad(doc_ids, (0, count * size + future_k - seq_len))
    return _dense(anticausal(future_k, doc_ids), doc_ids, query, key) & (key < seq_len)


def window_is_short(seq_len: int, future_k: int) -> bool:
    """Whether :func:`anticausal_window_mask` saves at least half of the scores."""
    return future_k > 0 and 2 * (max(future_k, _MIN_BLOCK) + future_k) <= seq_len


def anticausal_block_mask(
    seq_len: int,
    future_k: int = 0,
    doc_ids: Tensor | None = None,
    device: torch.device | str = "cpu",
    queries: Tensor | None = None,
    keys: Tensor | None = None,
) -> BlockMask:
    """Makes the FlexAttention form of :func:`anticausal_mask`; without ``doc_ids`` it fits any number of sequences."""
    allowed = anticausal(future_k, doc_ids)
    if queries is None or keys is None:
        return _blocks(allowed, doc_ids, seq_len, seq_len, torch.device(device))

    def of_positions(b: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return allowed(b, head, queries[row], keys[column])

    return _blocks(of_positions, doc_ids, len(queries), len(keys), queries.device)


def causal_mask(doc_ids: Tensor | None, window: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Evaluates :func:`causal` as a (B, 1, n, m) bool tensor; B is 1 without ``doc_ids``."""
    rows, columns = (torch.arange(len(positions), device=queries.device) for positions in (queries, keys))
    return _dense(causal(doc_ids, window, queries, keys), doc_ids, rows[None, :, None], columns)


def causal_block_mask(doc_ids: Tensor | None, window: int, queries: Tensor, keys: Tensor) -> BlockMask:
    """Makes the FlexAttention form of :func:`causal`."""
    return _blocks(causal(doc_ids, window, queries, keys), doc_ids, len(queries), len(keys), queries.device)


def _dense(mask_mod: MaskMod, doc_ids: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
    """Evaluates a mask for (n, Q, 1) rows and for columns that broadcast against them, as one expression: (B, n, Q, K)."""
    batch = torch.arange(1 if doc_ids is None else len(doc_ids), device=rows.device)[:, None, None, None]
    return mask_mod(batch, batch, rows, columns).expand(len(batch), -1, -1, -1)


def _blocks(mask_mod: MaskMod, doc_ids: Tensor | None, rows: int, columns: int, device: torch.device) -> BlockMask:
    # Compiled, this holds no tensor of rows x columns.
    create = _compile(create_block_mask) if device.type == "cuda" else create_block_mask
    batch_size = None if doc_ids is None else len(doc_ids)
    return create(mask_mod, batch_size, None, rows, columns, device=str(device))


def has_future(doc_ids: Tensor) -> Tensor:
    """Marks the positions of (B, T) documents that have a future, as (B, T) bool: the next one is in the same document."""
    return pair_mask(torch.ones_like(doc_ids, dtype=torch.bool), doc_ids, shift=1)


def pair_mask(valid_mask: Tensor, doc_ids: Tensor, shift: int) -> Tensor:
    """Marks the positions t for which the pair (prediction at t, summary at t + shift) counts, as (B, T) bool.

    It does if t + shift, with shift >= 1, is in the document of t and true in ``valid_mask``, the (B, T) valid summaries.
    """
    if shift < 1:
        raise ValueError(f"shift must be >= 1 (F_t itself contains token t), got {shift}")
    pairs = torch.zeros_like(valid_mask)
    pairs[:, :-shift] = valid_mask[:, shift:] & (doc_ids[:, shift:] == doc_ids[:, :-shift])
    return pairs
