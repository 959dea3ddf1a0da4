"""The random number generators of every rank, saved as tensors, numbers and text."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.tools.logging import logger


class RankRNG(Stateful):
    """The default generators of torch, on the CPU and on the accelerator, of Python and of numpy.

    Each rank saves its own under its number, so a step has those of as many ranks as saved it; :meth:`fits` says
    whether they can be loaded. Where they can not, leave this out of what is loaded: ranks keep the generators that
    ``debug.seed`` gave them.
    """

    def __init__(self) -> None:
        initialised = dist.is_initialized()
        self._rank = dist.get_rank() if initialised else 0
        self._world_size = dist.get_world_size() if initialised else 1

    def fits(self, world_size: int) -> bool:
        """Whether the generators of a step saved by ``world_size`` ranks are those of these ranks."""
        return world_size == self._world_size

    def state_dict(self) -> dict[str, Any]:
        # The default generator, which others may draw from.
        state: Any = np.random.get_state()  # noqa: NPY002
        name, keys, *rest = state
        return {
            f"rank_{self._rank}": {
                "cpu": torch.get_rng_state(),
                "accelerator": _accelerator_state(),
                "python": random.getstate(),
                "numpy": (name, tuple(keys.tolist()), *rest),
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = state_dict[f"rank_{self._rank}"]
        torch.set_rng_state(state["cpu"])
        _set_accelerator_state(state["accelerator"])
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def _accelerator_state() -> str:
    """``type:bytes in hexadecimal``: text has no shape, which would have to be the same where there is another device."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return ""
    return f"{device.type}:{bytes(torch.get_device_module(device).get_rng_state().tolist()).hex()}"


def _set_accelerator_state(saved: str) -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    device_type, _, state = saved.partition(":")
    if device_type != ("" if device is None else device.type):
        logger.warning(
            f"The step's random numbers come from {device_type or 'cpu'}, this run's device is "
            f"{'cpu' if device is None else device.type}: its generator is left as it is"
        )
    elif device is not None:
        torch.get_device_module(device).set_rng_state(torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8))
