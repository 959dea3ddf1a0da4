"""Proves that each architecture's attention code and kernel obey masks: on parts of sequences, and anti-causally."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.proof.parity import TOLERANCE, Probe

ROUNDING = 1e-2
"""Where a token changes the rounding of others: what that may change, relative to what the token itself changes."""


def prove_attention(probe: Probe) -> list[str]:
    """Make the proofs that the probe has forwards for and return a clause for each. Collective; raises SeedError on all ranks."""
    proved = []
    if probe.logits_in_parts is not None:
        shared, whole = partial(probe.logits_in_parts, probe.tokens), partial(probe.forward, probe.tokens)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # as in :func:`parity.verify`
            prove_context_parallel(shared, whole, TOLERANCE[probe.compute_dtype])
        proved.append("sequences in parts give the logits of whole ones")
    if probe.summaries is not None:
        tokens = probe.tokens.repeat(1, -(-probe.seq_len // probe.tokens.shape[1]))[:, : probe.seq_len]
        prove_anticausal(probe.summaries, tokens, probe.summaries_remedy, 0.0 if probe.rounds_alike else ROUNDING)
        proved.append("no summary of the future depends on its past")
    return proved


def prove_context_parallel(shared: Callable[[], Tensor], whole: Callable[[], Tensor], tolerance: float) -> None:
    """Compare the (1, T, V) logits that all ranks compute together (``shared``) with those that each computes alone (``whole``).

    Collective. ``tolerance`` is relative to the largest logit. Raises SeedError on all ranks alike.
    """
    remedy = "set parallelism.context_parallel_degree = 1, and scale with FSDP or tensor_parallel_degree"
    try:
        logits = shared()
    except Exception as e:  # the backbone's own code, with a mask that it may never have been given
        raise SeedError(f"this backbone fails with a part of the sequence, {type(e).__name__}: {e}; {remedy}") from e
    expected = whole()
    difference, bound = (logits - expected).abs().max().item(), tolerance * expected.abs().max().item()
    if not difference <= bound:  # NaN included
        raise SeedError(
            f"with a part of the sequence this backbone does not compute what it does with all of it: logits differ by up to "
            f"{difference:.3g} (allowed: {bound:.3g}), so its code depends on more than masks and positions; {remedy}"
        )


def prove_anticausal(
    summaries: Callable[[Tensor], Tensor], tokens: Tensor, remedy: str = "", rounding: float = 0.0
) -> None:
    """Change one of (1, T) tokens: summaries after it must stay bit-equal, the one before it must change.

    ``summaries`` gives (1, T, D) of one document, T >= 4; messages end with ``remedy``. After the token, a change of at most
    ``rounding`` times the one before it is none. Raises SeedError on every rank alike.
    """
    middle = tokens.shape[1] // 2
    changed = tokens.clone()
    others = tokens[tokens != tokens[0, middle]]  # none of a text that the tokenizer knows no word of
    changed[0, middle] = others[0] if len(others) else (tokens[0, middle] == 0).to(tokens.dtype)
    remedy = f"; {remedy}" if remedy else ""
    try:
        before, after = summaries(tokens), summaries(changed)
    except Exception as e:  # the backbone's own code, with a mask that it may never have been given
        raise SeedError(f"the anti-causal forward fails with {type(e).__name__}: {e}{remedy}") from e
    if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise SeedError(f"the anti-causal forward gives values that are not finite{remedy}")
    change = (before - after).abs().amax(dim=-1)[0]
    leaks = change[middle + 1 :] > rounding * change[middle - 1]
    if leaks.any():
        raise SeedError(
            f"the anti-causal forward leaks: with token {middle} changed, the summaries of {int(leaks.sum())} of the {len(leaks)} "
            f"positions after it change{remedy}"
        )
    if not change[middle - 1] > 0:
        raise SeedError(
            f"the anti-causal forward sees no future: with token {middle} changed, the summary of position {middle - 1} stays{remedy}"
        )
