"""Counts the operations of matrix products as torch does, without those that only some versions of transformers have."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """Counts all products but batched outer ones: older transformers make the angles of RoPE by one, later versions do not."""

    def products(a: Any, b: Any, **_: Any) -> int:
        batch, rows, inner = a
        return 0 if inner == 1 else 2 * batch * rows * inner * b[2]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: products})
