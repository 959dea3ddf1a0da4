"""Write a DCP checkpoint from tensors that are read one by one, when their turn to be written comes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from flame_ext.checkpoint.writing import StepWriter
from flame_ext.seeding.sources.dcp import NESTED_PREFIX


class _ReadingPlanner(DefaultSavePlanner):
    """Plans with tensors on meta, and reads the real one of each when it is written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._read(index.fqn)


def write_dcp(described: Mapping[str, Tensor], read: Callable[[str], Tensor], folder: Path, nested: bool) -> None:
    """Write tensors as ``dcp.save`` would, by one thread into one file: one tensor is in memory at a time.

    Args:
        described: name to a tensor on meta.
        read: name to its values, on CPU.
        folder: is there and empty.
        nested: save ``{"model": tensors}``, which makes ``model.name`` of every name.

    Raises:
        OSError: with the folder.
    """
    state: dict[str, Any] = {"model": dict(described)} if nested else dict(described)
    prefix = NESTED_PREFIX if nested else ""
    planner = _ReadingPlanner(lambda name: read(name.removeprefix(prefix)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as no_dist asks
        dcp.save(state, storage_writer=StepWriter(folder, thread_count=1), planner=planner, no_dist=True)
