"""Draws initial values that are the same on any number of ranks and any device.

Blocks of rows have a generator each, seeded by seed, name and block; a rank draws only the blocks that its shard touches.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from flame_ext.model.initialisation import Constant, ParameterInit
from flame_ext.seeding.copying import Copies
from flame_ext.seeding.sources.boxes import Box, local_part

_BLOCK_ELEMENTS = 1 << 18  # rounded down to whole rows; changing it changes every initial value


@torch.no_grad()
def initialise(state: Mapping[str, Tensor], inits: Mapping[str, ParameterInit], rng_seed: int) -> None:
    """Fill this rank's part of each tensor of ``state`` (key to DTensor or plain tensor), in place."""
    with Copies() as copies:
        for key, tensor in state.items():
            (local, box), init = local_part(tensor), inits[key]
            if isinstance(init, Constant):
                local.fill_(init.value)
            elif local.numel():
                for make, rows in uniform_blocks(local, box, tuple(tensor.shape), init.bound, rng_seed, key):
                    copies.fill(make, rows)
        copies.finish()


def uniform_blocks(
    local: Tensor, box: Box, shape: tuple[int, ...], bound: float, rng_seed: int, key: str
) -> Iterator[tuple[Callable[[], Tensor], Tensor]]:
    """Return, for each block of the ``box`` of the full tensor of ``shape``, what draws its values and the rows of ``local`` for them."""
    if not shape:
        local, box, shape = local.view(1), ((0, 1),), (1,)
    rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    (begin, end), others = box[0], box[1:]
    for block in range(begin // rows, math.ceil(end / rows)):
        first, last = block * rows, min((block + 1) * rows, shape[0])
        low, high = max(begin, first), min(end, last)
        part = (slice(low - first, high - first), *(slice(*ends) for ends in others))
        draw = partial(_drawn, f"{rng_seed}\0{key}\0{block}", (last - first, *shape[1:]), bound, part)
        yield draw, local[low - begin : high - begin]


def _drawn(seed: str, shape: tuple[int, ...], bound: float, part: tuple[slice, ...]) -> Tensor:
    # A CPU generator whatever the device: CUDA's depends on the launch configuration.
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(shape, generator=generator, dtype=torch.float32)[part].mul_(2 * bound).sub_(bound)
