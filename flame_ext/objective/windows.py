"""Sums and maxima over the positions that follow, without a loop over positions, documents or the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def reduce_following(
    values: Tensor, doc_ids: Tensor, future_k: int, combine: Callable[[Tensor, Tensor], Tensor], empty: float
) -> Tensor:
    """``combine`` of ``values[t + 1 .. t + future_k]``, as far as they are in the document of t.

    By doubling: the result for 2^p positions is that for 2^(p-1) combined with that of the position 2^(p-1) further on.
    log2(future_k) elementwise steps, and a result depends on its own positions only, to the last bit, which differences
    of prefix sums do not.

    Args:
        values: (B, T, D).
        doc_ids: (B, T) integers; a document is a run of equal ones.
        future_k: window, 0 = to the end of the document.
        combine: associative and commutative, e.g. ``torch.add``.
        empty: its neutral element, and the result of a position without any.

    Returns:
        (B, T, D)
    """
    length = values.shape[1]
    window = min(future_k, length - 1) if future_k > 0 else length - 1
    result = torch.full_like(values, empty)
    reduced, span, taken = values, 1, 0  # reduced[t]: over t .. t + span - 1
    while taken < window:
        if (window - taken) & span:
            result = combine(result, _ahead(reduced, doc_ids, 1 + taken, empty))
            taken += span
        if taken < window:
            reduced = combine(reduced, _ahead(reduced, doc_ids, span, empty))
            span *= 2
    return result


def _ahead(values: Tensor, doc_ids: Tensor, steps: int, empty: float) -> Tensor:
    """(B, T, D): row t holds ``values[t + steps]`` if that is in the document of t, else ``empty``."""
    if steps >= values.shape[1]:
        return torch.full_like(values, empty)
    same = doc_ids[:, steps:] == doc_ids[:, :-steps]
    ahead = torch.where(same[..., None], values[:, steps:], empty)
    return torch.nn.functional.pad(ahead, (0, 0, 0, steps), value=empty)
