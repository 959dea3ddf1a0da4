"""Helpers of the losses that are computed chunk by chunk."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def chunks(length: int, size: int) -> list[slice]:
    """Cuts ``length`` rows into slices of ``size``; the last one may be shorter."""
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


@cache
def compiled(function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    """Compiles ``function`` for dynamic shapes, since the last chunk is smaller; returns it as it is if ``backend`` is None."""
    return function if backend is None else torch.compile(function, backend=backend, dynamic=True)
