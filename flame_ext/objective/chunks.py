"""Helpers of the losses that are computed chunk by chunk."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunk_elements(device: torch.device) -> int:
    """Elements of a chunk of activations: 64 MiB in float32 on a CPU; elsewhere 512 MiB, since every launch of a kernel costs time."""
    return 1 << 24 if device.type == "cpu" else 1 << 27


def chunks(length: int, size: int) -> list[slice]:
    """Cuts ``length`` rows into slices of ``size``; the last one may be shorter."""
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


@cache
def compiled(function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    """Compiles ``function`` for dynamic shapes, since the last chunk is smaller; returns it as it is if ``backend`` is None."""
    return function if backend is None else torch.compile(function, backend=backend, dynamic=True)


def sum_over_chunks(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """Sums ``function`` of chunks of ``size`` or more rows of the tensors; the backward computes each of them again.

    So what it makes of a chunk, such as logits in float32, is never in memory for two chunks at once. The chunks are at most 32:
    each adds to the gradients of the weights that it reads, and a sum of many parts in bfloat16 loses those that are small beside it.
    """
    size = max(size, -(-len(tensors[0]) // 32))
    pieces = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    parts = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.stack(parts).sum(0)
