"""Initial values that depend on the seed and the parameter's name only: the same on any number of ranks, on any device.

The full tensor is cut into blocks of whole rows along its first dimension. Each block has a generator of its own,
keyed by the seed, the name and the block's number, so a rank makes just the blocks that its shard touches and no rank
ever builds the whole of a large tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flame_ext.model.initialisation import Constant, ParameterInit
from flame_ext.seeding.sources.boxes import Box, local_part

# Elements of one block, rounded down to whole rows. Changing it changes every initial value.
_BLOCK_ELEMENTS = 1 << 18


@torch.no_grad()
def initialise(state: Mapping[str, Tensor], inits: Mapping[str, ParameterInit], rng_seed: int) -> None:
    """Fill this rank's part of each tensor of ``state``, in place.

    Args:
        state: key to parameter, DTensor or plain.
        inits: the initialisation of each key of ``state``.
        rng_seed: the integer of the whole job.
    """
    for key, tensor in state.items():
        local, box = local_part(tensor)
        if local.numel() == 0:
            continue
        init = inits[key]
        if isinstance(init, Constant):
            local.fill_(init.value)
        else:
            _fill_uniform(local, box, tuple(tensor.shape), init.bound, rng_seed, key)


def _fill_uniform(local: Tensor, box: Box, shape: tuple[int, ...], bound: float, rng_seed: int, key: str) -> None:
    """Write the ``box`` of the full tensor of ``shape`` into ``local``."""
    if not shape:
        local, box, shape = local.view(1), ((0, 1),), (1,)
    row = math.prod(shape[1:])
    rows = max(1, _BLOCK_ELEMENTS // max(1, row))
    (begin, end), others = box[0], box[1:]
    for block in range(begin // rows, math.ceil(end / rows)):
        first, last = block * rows, min((block + 1) * rows, shape[0])
        values = torch.rand((last - first, *shape[1:]), generator=_generator(rng_seed, key, block), dtype=torch.float32)
        low, high = max(begin, first), min(end, last)
        values = values[(slice(low - first, high - first), *(slice(*ends) for ends in others))]
        local[low - begin : high - begin].copy_(values.mul_(2 * bound).sub_(bound))


def _generator(rng_seed: int, key: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{rng_seed}\0{key}\0{block}".encode()).digest()
    # A CPU generator whatever the device: CUDA's depends on the launch configuration.
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
