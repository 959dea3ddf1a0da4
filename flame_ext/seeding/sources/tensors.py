"""Whole tensors out of a source, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from flame_ext.seeding.sources.boxes import full_box, inside
from flame_ext.seeding.sources.source import Source


def read_tensor(source: Source, name: str) -> Tensor:
    """One tensor of a source in the dtype of its file, on CPU.

    Where it lies in one piece the result is a view of the mapped file, which is unmapped with it.

    Raises:
        SeedError: naming the file.
    """
    entry = source.entries[name]
    whole: Tensor | None = None
    for chunk in entry.chunks:
        with source.open(chunk.file) as read_box:
            values = read_box(entry, chunk, chunk.box)
        if len(entry.chunks) == 1:
            return values
        if whole is None:
            whole = torch.empty(entry.shape, dtype=entry.dtype)
        whole[inside(chunk.box, full_box(entry.shape))].copy_(values)
    return torch.empty(entry.shape, dtype=entry.dtype) if whole is None else whole


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Weights in another dtype; an integer buffer means its integers."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits: 0.0 is not -0.0, and NaN is itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.numel() == 0:
        return True
    # Views of mapped files can start anywhere and can be strided.
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
