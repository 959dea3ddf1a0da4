"""Which part of a full tensor this rank holds. Arithmetic only."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_region(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """The local tensor, to write into, and the slices of the full tensor that it holds.

    A plain tensor is its own full tensor. A rank without any row of an unevenly sharded tensor gets an empty region.

    Raises:
        RuntimeError: if torch's own description of the shard disagrees with the shard; a write would be misplaced.
    """
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, n) for n in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    if tuple(local.shape) != tuple(shape) and local.numel() > 0:
        raise RuntimeError(f"shard of shape {tuple(local.shape)} is described as {tuple(shape)} ({tensor.placements})")
    return local, tuple(slice(begin, begin + n) for begin, n in zip(offset, shape, strict=True))
