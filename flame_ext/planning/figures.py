"""What a rehearsal finds, as plain data: this is all that the process that asks for it knows of the job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rehearsal:
    """What one rank of a job needs and does. Sizes are in bytes."""

    rank: int
    peak: int  # the largest sum of tensors on the device
    parts: dict[str, int]  # that it consists of, largest first
    on_host: int  # of weights, gradients and moments, with CPU offload
    parameters: dict[str, int]  # of the whole model: "backbone", and each head by name
    local_parameters: int  # of the model on this rank
    tokens: int  # of a step, on all ranks
    operations: dict[str, float]  # for each token, by what they are for
    checkpoint: int  # a step of all ranks
    export: int  # to a Hugging Face folder
    stored_parameter: float  # in the source
    source: str  # where that was read
    settings: dict[str, Any]  # options that decide what a job needs, by full name
