"""Computes what adapters add to the weights that they belong to, for an export in which both are one."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flame_ext.checkpoint.gathering import Summand
from flame_ext.model.adapters import KEY_A, KEY_B
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.seeding.sources.boxes import Box


@torch.no_grad()
def adapter_summands(model: HFCausalLM, state: Mapping[str, Tensor]) -> dict[str, Summand]:
    """Returns scaling · B A for each weight in ``state``, by source names, that has an adapter; {} without adapters. Collective.

    A and B are kept whole in the host's memory, and multiplied where they are asked for.
    """
    found: dict[str, Summand] = {}
    adapters = model.whole.adapters
    for layer in (key.removesuffix(KEY_A) for key in state if adapters and key.endswith(f".{KEY_A}")):
        assert adapters is not None
        a, b = (_whole(state[layer + key]) for key in (KEY_A, KEY_B))
        found[f"{layer}weight"] = partial(_product, a, b, adapters.scaling)
    return found


def _product(a: Tensor, b: Tensor, scaling: float, box: Box, device: torch.device) -> Tensor:
    rows, columns = (slice(*ends) for ends in box)
    return b[rows].to(device) @ a[:, columns].to(device) * scaling


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", torch.float32)
