"""Weights of losses as functions of the step alone: nothing to save, nothing to restore."""

from __future__ import annotations


def scheduled_weight(weight: float, step: int, total_steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Linear rise to ``weight`` over the first ``warmup_steps``, linear fall to 0 over the last ``decay_steps``.

    Args:
        weight: in between.
        step: counted from 1; full weight is reached at ``warmup_steps``, zero at ``total_steps``.
        total_steps: of the run.
        warmup_steps: 0 = none.
        decay_steps: 0 = none.
    """
    rise = step / warmup_steps if warmup_steps else 1.0
    fall = (total_steps - step) / decay_steps if decay_steps else 1.0
    return weight * max(0.0, min(1.0, rise, fall))
