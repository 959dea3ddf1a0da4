"""Draws initial values that are the same on any number of ranks and any device.

Blocks of rows have a generator each, seeded by seed, name and block; a rank draws only the blocks that its shard touches.
"""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flame_ext.model.initialisation import Constant, ParameterInit
from flame_ext.seeding.sources.boxes import Box, local_part

_BLOCK_ELEMENTS = 1 << 18  # rounded down to whole rows; changing it changes every initial value


@torch.no_grad()
def initialise(state: Mapping[str, Tensor], inits: Mapping[str, ParameterInit], rng_seed: int) -> None:
    """Fill this rank's part of each tensor of ``state`` (key to DTensor or plain tensor), in place."""
    for key, tensor in state.items():
        (local, box), init = local_part(tensor), inits[key]
        if isinstance(init, Constant):
            local.fill_(init.value)
        elif local.numel():
            _fill_uniform(local, box, tuple(tensor.shape), init.bound, rng_seed, key)


def _fill_uniform(local: Tensor, box: Box, shape: tuple[int, ...], bound: float, rng_seed: int, key: str) -> None:
    """Write the ``box`` of the full tensor of ``shape`` into ``local``."""
    if not shape:
        local, box, shape = local.view(1), ((0, 1),), (1,)
    rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    (begin, end), others = box[0], box[1:]
    for block in range(begin // rows, math.ceil(end / rows)):
        first, last = block * rows, min((block + 1) * rows, shape[0])
        # A CPU generator whatever the device: CUDA's depends on the launch configuration.
        digest = hashlib.sha256(f"{rng_seed}\0{key}\0{block}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        values = torch.rand((last - first, *shape[1:]), generator=generator, dtype=torch.float32)
        low, high = max(begin, first), min(end, last)
        values = values[(slice(low - first, high - first), *(slice(*ends) for ends in others))]
        local[low - begin : high - begin].copy_(values.mul_(2 * bound).sub_(bound))
