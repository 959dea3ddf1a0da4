"""Brings tensors, of which each rank holds boxes, to the main rank, one at a time."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor

from flame_ext.distributed import failing_together, is_main_rank, object_group
from flame_ext.errors import CheckpointError
from flame_ext.objective.chunks import chunks
from flame_ext.seeding.sources.boxes import Box, full_box, inside, intersection, local_part, tiles_exactly, volume
from flame_ext.seeding.sources.traced import TracedTensor

# Bytes that travel at a time, beside which only the main rank holds the tensor.
_AT_ONCE = 2**26

Summand = Callable[[Box, torch.device], Tensor]
"""Maps a box of a tensor and a device to the float32 values to add there."""


class BoxGatherer:
    """Gathers the elements that make up a tensor of a file, which the main rank alone holds whole.

    Building it is a collective over all ranks, and so is each call, with the same tensor on all of them.

    Args:
        state: this rank's part of the model, by key; DTensors, or plain tensors, which are whole.
        shapes: key to shape, of the whole model. A CheckpointError is raised if the ranks together do not hold all of it.
        device: for the tensors that are gathered; of the same kind on all ranks.
        summands: key to what is added to a tensor, in float32, before it is cast.
    """

    @torch.no_grad()
    def __init__(
        self,
        state: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        device: torch.device,
        summands: Mapping[str, Summand] = MappingProxyType({}),
    ) -> None:
        self._device, self._summands = device, summands
        with failing_together(CheckpointError):
            held = {key: local_part(tensor.detach()) for key, tensor in state.items()}
        given = _shared_out({key: box for key, (_, box) in held.items()}, shapes)
        self._given = {key: held[key] for key in given}

    @torch.no_grad()
    def __call__(self, tensor: TracedTensor) -> Tensor:
        """Returns a tensor that is made of the state's, cast to its own dtype, on the main rank; others are to drop the result."""
        shape = tuple(tensor.shape)
        whole = torch.empty(shape if is_main_rank() else 0, dtype=tensor.dtype, device=self._device)
        if not shape:
            return self._gathered(tensor, ())
        row = max(1, math.prod(shape[1:]) * tensor.dtype.itemsize)
        for rows in chunks(shape[0], max(1, _AT_ONCE // row)):
            values = self._gathered(tensor, ((rows.start, rows.stop), *full_box(shape[1:])))
            if is_main_rank():
                whole[rows] = values
        return whole

    def _gathered(self, tensor: TracedTensor, window: Box) -> Tensor:
        """The elements of a box of the tensor, on the main rank. Collective."""
        found = torch.zeros([end - begin for begin, end in window], dtype=tensor.dtype, device=self._device)
        for part in tensor.parts:
            if part.of not in self._given or (inner := part.within(window)) is None:
                continue
            local, box = self._given[part.of]
            if (common := intersection(box, inner.box_of)) is not None:
                values = local[inside(common, box)]
                if (summand := self._summands.get(part.of)) is not None:
                    values = values.float() + summand(common, values.device)
                values = inner.arranged(values).to(tensor.dtype)
                found[inside(inner.placed(common), window)] = values.to(self._device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Every byte comes from one rank and is zero on the others, so that the sum is that rank's, whatever it means.
            dist.reduce(found.view(-1).view(torch.uint8), dst=0)
        return found


def _shared_out(boxes: Mapping[str, Box], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Returns the keys whose boxes this rank gives: of the ranks that hold the same elements, the first one does. Collective."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    held: list[Mapping[str, Box]] = [boxes] * world_size
    shares: list[list[str]] = [[] for _ in range(world_size)]
    is_main = world_size == 1 or dist.get_rank() == 0
    if world_size > 1:
        dist.gather_object(boxes, held if is_main else None, dst=0, group=object_group())
    with failing_together(CheckpointError):
        seen: dict[str, set[Box]] = defaultdict(set)
        for share, of_rank in zip(shares, held, strict=True) if is_main else ():
            for key, box in of_rank.items():
                if volume(box) > 0 and box not in seen[key]:
                    seen[key].add(box)
                    share.append(key)
        for key, shape in shapes.items() if is_main else ():
            if not tiles_exactly(full_box(shape), seen[key]):
                raise CheckpointError(
                    f"{key!r} cannot be exported: the ranks hold {sorted(seen[key])} of {list(shape)}"
                )
    mine = [shares[0]]
    if world_size > 1:
        dist.scatter_object_list(mine, shares if is_main else None, src=0, group=object_group())
    return mine[0]
