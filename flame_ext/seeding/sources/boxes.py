"""Computes with boxes of index ranges, which say where a part lies in a full tensor."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# A box of a full tensor has one (begin, end) for each dimension; a scalar's is ().
Box = tuple[tuple[int, int], ...]


def full_box(shape: Sequence[int]) -> Box:
    return tuple((0, n) for n in shape)


def box_at(offsets: Sequence[int], sizes: Sequence[int]) -> Box:
    return tuple((begin, begin + n) for begin, n in zip(offsets, sizes, strict=True))


def volume(box: Box) -> int:
    """Return the number of elements; 1 for a scalar's box."""
    return math.prod(end - begin for begin, end in box)


def intersection(a: Box, b: Box) -> Box | None:
    """Return the elements in both boxes; None if there are none."""
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(begin < end for begin, end in common) else None


def inside(box: Box, outer: Box) -> tuple[slice, ...]:
    """Return the slices of ``box`` in a tensor that holds just ``outer``."""
    return tuple(slice(begin - start, end - start) for (begin, end), (start, _) in zip(box, outer, strict=True))


def tiles_exactly(box: Box, parts: Iterable[Box]) -> bool:
    """Return whether every element of ``box`` lies in exactly one of ``parts``, and nothing lies outside; in linear time."""
    parts = [*parts]
    if parts == [box]:
        return True
    # The corners of a box, with the sign of their parity, are the differences along all dimensions of its indicator function,
    # and determine it: two sums of indicator functions are equal if the sums of their corners are.
    corners: Counter[tuple[int, ...]] = Counter()
    for tile, sign in [*((part, 1) for part in parts), (box, -1)]:
        if volume(tile) > 0:
            for corner in product(*(((begin, 1), (end, -1)) for begin, end in tile)):
                corners[tuple(at for at, _ in corner)] += sign * math.prod(side for _, side in corner)
    return not any(corners.values())


def local_part(tensor: Tensor) -> tuple[Tensor, Box]:
    """Return the local tensor, to write into, and its box of the full tensor (empty on a rank without rows).

    Raises RuntimeError if torch's description of the shard disagrees with the shard: a write would be misplaced.
    """
    if not isinstance(tensor, DTensor):
        return tensor, full_box(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    if tuple(local.shape) != tuple(shape) and local.numel() > 0:
        raise RuntimeError(f"shard of shape {tuple(local.shape)} is described as {tuple(shape)} ({tensor.placements})")
    return local, box_at(offset, shape)


def whole_rows(tensor: Tensor) -> Tensor:
    """Gather the columns that are sharded, so that every rank has whole rows. Collective if so."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Replicas have no dimension. Tensor parallelism shards columns, and FSDP does where a rank has few experts.
    placements = [Replicate() if getattr(p, "dim", 0) else p for p in tensor.placements]
    return tensor if placements == list(tensor.placements) else tensor.redistribute(placements=placements)
