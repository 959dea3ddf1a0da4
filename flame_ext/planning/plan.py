"""Plans a job: rehearses it in other processes, and says whether it fits, how long a step takes, what is written and read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from flame_ext.errors import ConfigError, UserError
from flame_ext.planning.figures import Rehearsal

_BESIDE = 1.6e9  # bytes of a GPU that its driver, its kernels and NCCL have
_LOST = 0.03  # share of a GPU that is lost between the allocator's blocks


@dataclass(frozen=True)
class Machine:
    """What a job runs on."""

    ranks: int = 1
    memory: float | None = 80.0  # of each GPU, in GB; None = no matter
    ranks_of_node: int = 8
    tflops: float = 989.0  # of each GPU, dense in bfloat16
    on_gpu: bool = True

    @property
    def limit(self) -> float | None:
        """Bytes of tensors that fit."""
        return None if self.memory is None else (1 - _LOST) * self.memory * 1e9 - _BESIDE

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_of_node)


@dataclass(frozen=True)
class Plan:
    """What a job needs, and what it does with it."""

    options: tuple[str, ...]
    machine: Machine
    rehearsal: Rehearsal

    @property
    def fits(self) -> bool:
        return self.machine.limit is None or self.rehearsal.peak <= self.machine.limit

    @property
    def operations(self) -> float:
        """Floating point operations for each token, with heads and teacher."""
        return sum(self.rehearsal.operations.values())

    def seconds(self, mfu: float) -> float:
        """How long a step takes if the GPUs do ``mfu`` of what they can."""
        return self.rehearsal.tokens * self.operations / (self.machine.ranks * self.machine.tflops * 1e12 * mfu)

    @property
    def seeding(self) -> float:
        """Bytes of the source that a node reads, by the rank with most parameters."""
        ranks = min(self.machine.ranks, self.machine.ranks_of_node)
        share = self.rehearsal.parameters["backbone"] / sum(self.rehearsal.parameters.values())
        return ranks * self.rehearsal.local_parameters * share * self.rehearsal.stored_parameter


def make_plan(options: Sequence[str], machine: Machine) -> Plan:
    """Plans the job of the trainer's ``options``.

    Raises a ConfigError for a configuration that preflight refuses, and a UserError for a job that cannot be rehearsed.
    """
    return Plan(tuple(options), machine, rehearsed(options, machine.ranks, machine.on_gpu))


def rehearsed(options: Sequence[str], ranks: int = 1, on_gpu: bool = True) -> Rehearsal:
    """Rehearses a job of so many ranks; of a pipeline, that of the first and the last rank that needs more memory."""
    found = _rehearsed(options, ranks, 0, on_gpu)
    if found.settings["parallelism.pipeline_parallel_degree"] > 1:
        found = max(found, _rehearsed(options, ranks, ranks - 1, on_gpu), key=lambda rehearsal: rehearsal.peak)
    return found


def _rehearsed(options: Sequence[str], ranks: int, rank: int, on_gpu: bool) -> Rehearsal:
    """In a process of its own, which sees no GPU, since in this one torchtitan may know its device already."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": 0}
    environment = {**os.environ, **{name: str(value) for name, value in launched.items()}, "MASTER_ADDR": "localhost"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    environment.pop("FLAME_EXT_POISON_PARAMETERS", None)
    command = [sys.executable, "-m", "flame_ext.planning.rehearsal", "gpu" if on_gpu else "cpu", *options]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    output = process.stdout.splitlines()[-1:]
    if process.returncode or not output:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(f"this job cannot be rehearsed: {reason}")
    found = json.loads(output[0])
    if "error" in found:
        raise ConfigError(found["error"])
    return Rehearsal(**found)
