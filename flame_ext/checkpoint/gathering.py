"""Brings tensors, of which each rank holds boxes, to the main rank, one at a time."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from flame_ext.distributed import gathered
from flame_ext.seeding.sources.boxes import Box, full_box, inside, intersection, local_part
from flame_ext.seeding.sources.source import cast
from flame_ext.seeding.sources.traced import TracedTensor


class BoxGatherer:
    """Gathers the elements that make up a tensor of a file; no rank holds more than that tensor beside its own state.

    Building it is a collective over all ranks, and so is each call, with the same tensor on all of them.

    Args:
        state: this rank's part of the model, by key; DTensors, or plain tensors, which are whole.
    """

    @torch.no_grad()
    def __init__(self, state: Mapping[str, Tensor]) -> None:
        held = {key: local_part(tensor.detach()) for key, tensor in state.items()}
        boxes = gathered({key: box for key, (_, box) in held.items()})
        rank = dist.get_rank() if dist.is_initialized() else 0
        # Of the ranks that hold the same elements, the first one gives them.
        others: set[tuple[str, Box]] = {item for before in boxes[:rank] for item in before.items()}
        self._given = {key: part for key, part in held.items() if (key, part[1]) not in others}
        self._device = next((local.device for local, _ in held.values()), torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, tensor: TracedTensor, dtype: torch.dtype) -> Tensor:
        """Returns ``tensor``, made of the state's by key; floating-point values in ``dtype``. Right on the main rank alone."""
        full = cast(torch.zeros(tensor.shape, dtype=tensor.dtype, device=self._device), dtype)
        for part in tensor.parts:
            local, box = self._given.get(part.of, (full, None))
            common = None if box is None else intersection(box, part.box_of)
            if box is not None and common is not None:
                place = part.placed(common)
                values = part.within(place)
                assert values is not None
                full[inside(place, full_box(full.shape))] = values.arranged(local[inside(common, box)]).to(full.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Every byte comes from one rank and is zero on the others, so that the sum is that rank's, whatever it means.
            dist.reduce(full.view(-1).view(torch.uint8), dst=0)
        return full
