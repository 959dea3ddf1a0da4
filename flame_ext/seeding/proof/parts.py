"""The proof that a backbone with a part of each sequence computes what it does with all of it.

Masks and positions are handed to each architecture's own code, which may do more with them than a plan knows (ALiBi, a
count of positions of its own). That shows in no shape.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flame_ext.errors import SeedError


def prove_context_parallel(shared: Callable[[], Tensor], whole: Callable[[], Tensor], tolerance: float) -> None:
    """Compare the logits of both.

    Args:
        shared: (1, T, V), computed by all ranks together. Collective.
        whole: (1, T, V), computed by each rank for itself. Collective if the model is.
        tolerance: relative to the largest logit.

    Raises:
        SeedError: on every rank alike.
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
