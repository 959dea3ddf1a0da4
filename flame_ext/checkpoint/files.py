"""DCP's load planner and writer for the files of a step, and the state of random number generators that it keeps."""

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemWriter
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torchtitan.tools.logging import logger

from flame_ext.errors import CheckpointError


class StepPlanner(DefaultLoadPlanner):
    """Loads entries that are not tensors only if they are plain data: whoever can write to the folder could have changed them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises a CheckpointError if the entry holds anything but tensors, numbers, text and containers of them."""
        try:
            plain = torch.load(value, weights_only=True)
        except Exception as e:  # a damaged entry can raise anything
            name, reason = read_item.dest_index.fqn, str(e).splitlines()[0] if str(e) else type(e).__name__
            raise CheckpointError(f"{name!r} is not plain data and was not unpickled: {reason}") from e
        # As torch's planner, which would unpickle it a second time, without restrictions.
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)
        else:
            self.state_dict[read_item.dest_index.fqn] = plain


class StepWriter(FileSystemWriter):
    """Raises a failed write as OSError: ``torch.save`` only keeps it as the context of another error, which is lost between ranks."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with self._os_errors():
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with self._os_errors():
            super().finish(metadata, results)

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            error: Any = e
            while error is not None and not isinstance(error, OSError):
                error = error.__cause__ or error.__context__
            if error is None:
                raise
            raise OSError(error.errno, error.strerror, str(self.path)) from e


class RankRNG(Stateful):
    """Saves the default generators of torch, the accelerator, Python and numpy for each rank. Only as many ranks can load them."""

    def __init__(self) -> None:
        self._rank = dist.get_rank() if dist.is_initialized() else 0

    def fits(self, world_size: int | None) -> bool:
        """Returns whether so many ranks are running."""
        return world_size == (dist.get_world_size() if dist.is_initialized() else 1)

    def state_dict(self) -> dict[str, Any]:
        # The default generator, since other libraries may draw from it.
        state: Any = np.random.get_state()  # noqa: NPY002
        name, keys, *rest = state
        device, accelerator = torch.accelerator.current_accelerator(check_available=True), ""
        if device is not None:  # as text: DCP would require a tensor to have the same shape on every type of device
            accelerator = f"{device.type}:{bytes(torch.get_device_module(device).get_rng_state().tolist()).hex()}"
        return {
            f"rank_{self._rank}": {
                "cpu": torch.get_rng_state(),
                "accelerator": accelerator,
                "python": random.getstate(),
                "numpy": (name, tuple(keys.tolist()), *rest),
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = state_dict[f"rank_{self._rank}"]
        torch.set_rng_state(state["cpu"])
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
        device = torch.accelerator.current_accelerator(check_available=True)
        saved_type, _, accelerator = state["accelerator"].partition(":")
        device_type = "" if device is None else device.type
        if saved_type != device_type:
            logger.warning(
                f"The step's random numbers come from {saved_type or 'cpu'}, this run's device is {device_type or 'cpu'}: its "
                "generator is left as it is"
            )
        elif device is not None:
            generator = torch.tensor(list(bytes.fromhex(accelerator)), dtype=torch.uint8)
            torch.get_device_module(device).set_rng_state(generator)
