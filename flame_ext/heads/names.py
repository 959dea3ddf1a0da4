"""What heads are called, without what builds them, which needs torch and the host: tools ask for names alone."""

from __future__ import annotations

HEAD_NAMES = ("future_encoder", "future_predictor", "action_layer")
"""flame_ext's own."""

registered_names: set[str] = set()
"""A user's (:func:`flame_ext.heads.own.register_head`)."""


def is_heads(name: str) -> bool:
    """Whether a plain name is that of a head's parameter."""
    head = name.split(".")[0]
    return head in HEAD_NAMES or head in registered_names
