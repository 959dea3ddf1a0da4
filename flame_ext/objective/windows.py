"""What follows each position in its document, without a loop over positions, documents or the batch."""

from collections.abc import Callable

import torch
from torch import Tensor


def reduce_following(
    values: Tensor, doc_ids: Tensor, future_k: int, combine: Callable[[Tensor, Tensor], Tensor], empty: float
) -> Tensor:
    """Combines ``values[t + 1 .. t + future_k]``, as far as they are in the document of t.

    It takes log2(future_k) steps, by doubling spans, and each result depends only on the values that it combines, to the
    last bit, unlike differences of prefix sums.

    Args:
        values: (B, T, D), like the result.
        doc_ids: (B, T) integers; a document is a run of equal ones.
        future_k: window, 0 = to the end of the document.
        combine: associative and commutative, e.g. ``torch.add``, with the neutral element ``empty``.
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


def upcoming_tokens(input_ids: Tensor, doc_ids: Tensor, window: int, positions: Tensor | None = None) -> Tensor:
    """Returns the (B, n, W) tokens at t + 1 .. t + W of (B, T) ``input_ids``; -1 where the document of t has ended.

    The n positions t are ``positions``, or all T.
    """
    length = input_ids.shape[1]
    if positions is None:
        positions = torch.arange(length, device=input_ids.device)
    later = positions[:, None] + torch.arange(1, window + 1, device=input_ids.device)
    ahead = later.clamp_max(length - 1)
    same = (later < length) & (doc_ids[:, ahead] == doc_ids[:, positions, None])
    return torch.where(same, input_ids[:, ahead], -1)


def _ahead(values: Tensor, doc_ids: Tensor, steps: int, empty: float) -> Tensor:
    """Shifts (B, T, D): row t holds ``values[t + steps]`` if that is in the document of t, else ``empty``."""
    if steps >= values.shape[1]:
        return torch.full_like(values, empty)
    same = doc_ids[:, steps:] == doc_ids[:, :-steps]
    ahead = torch.where(same[..., None], values[:, steps:], empty)
    return torch.nn.functional.pad(ahead, (0, 0, 0, steps), value=empty)
