"""``torch.compile`` of the losses' arithmetic, once for each function and backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    """``function``, compiled with dynamic shapes (the last chunk of a batch is a smaller one); as it is for None."""
    return function if backend is None else torch.compile(function, backend=backend, dynamic=True)
