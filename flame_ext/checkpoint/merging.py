"""Adds adapters to the weights that they belong to while these are exported."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flame_ext.model.adapters import KEY_A, KEY_B
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.seeding.sources.boxes import local_part


@contextmanager
@torch.no_grad()
def merged(model: HFCausalLM, state: Mapping[str, Tensor]) -> Iterator[None]:
    """While this is entered, the weights in ``state``, by source names, have the adapters added, W + scaling · B A; then they are as
    before, to the bit: this rank's part is kept in the host's memory. Collective.
    """
    adapters = model.whole.adapters
    if adapters is None:
        yield
        return
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for layer in (key.removesuffix(KEY_A) for key in state if key.endswith(f".{KEY_A}")):
            a, b = _whole(state[layer + KEY_A]), _whole(state[layer + KEY_B])
            part, (rows, columns) = local_part(state[f"{layer}weight"].detach())
            before.append((part, part.to("cpu", copy=True)))
            part.copy_(part.float() + (b[slice(*rows)].float() @ a[:, slice(*columns)].float()) * adapters.scaling)
        yield
    finally:
        for part, values in before:
            part.copy_(values)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
