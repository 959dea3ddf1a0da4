"""The proof that the backbone's anti-causal forward is one: no summary has read its past.

Whether a mask is obeyed is up to each architecture's own attention code, and to the kernel that runs it. A leak shows
neither in shapes nor in the loss, which it lowers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flame_ext.errors import SeedError


def prove_anticausal(summaries: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    """Change one token: the summaries after it must stay the same to the last bit, the one before it must change.

    Args:
        summaries: (1, T) tokens to (1, T, D) summaries, of one document. Collective if the model is.
        tokens: (1, T), T >= 4, not all the same.

    Raises:
        SeedError: on every rank alike.
    """
    middle = tokens.shape[1] // 2
    changed = tokens.clone()
    others = tokens[tokens != tokens[0, middle]]
    changed[0, middle] = others[0]
    remedy = "future_encoder.summary_method = 'anticausal' can not be right for this backbone; take 'mean', 'max' or 'attention'"
    try:
        before, after = summaries(tokens), summaries(changed)
    except Exception as e:  # the backbone's own code, with a mask that it may never have been given
        raise SeedError(f"the anti-causal forward fails with {type(e).__name__}: {e}; {remedy}") from e
    if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise SeedError(f"the anti-causal forward gives values that are not finite; {remedy}")
    differs = (before != after).any(dim=-1)[0]
    if differs[middle + 1 :].any():
        raise SeedError(
            f"the anti-causal forward leaks: with token {middle} changed, the summaries of "
            f"{int(differs[middle + 1 :].sum())} of the {len(differs) - middle - 1} positions after it change; {remedy}"
        )
    if not differs[middle - 1]:
        raise SeedError(
            f"the anti-causal forward sees no future: with token {middle} changed, the summary of position {middle - 1} "
            f"stays as it is; {remedy}"
        )
