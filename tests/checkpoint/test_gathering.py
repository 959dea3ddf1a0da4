"""Boxes of several ranks, gathered into tensors of a file: each byte once, whoever holds it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from flame_ext.checkpoint import gathering
from flame_ext.checkpoint.gathering import BoxGatherer
from flame_ext.errors import CheckpointError
from flame_ext.seeding.sources.traced import TracedTensor
from tests.ranks import run_ranks
from tests.seeding.test_read import LargestTensor

EXPERTS = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0))
EXPERTS[2, 1, 0], EXPERTS[4, 0, 0] = -0.0, float("nan")
NORM = torch.arange(7.0)


def gather_all() -> dict[str, torch.Tensor]:
    """In a rank: five experts over three ranks and two replicas, an uneven shard, a number that one rank alone has."""
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicate", "shard"))
    state = {
        "experts": distribute_tensor(EXPERTS, mesh, [Replicate(), Shard(0)]),
        "along": distribute_tensor(EXPERTS, mesh, [Replicate(), Shard(2)]),
        "norm": distribute_tensor(NORM, mesh["shard"], [Shard(0)]),
        "plain": NORM + 1,
    }
    if rank == 4:
        state["number"] = torch.tensor(3.5)
    shapes = {key: tensor.shape for key, tensor in state.items()} | {"number": ()}
    gather = BoxGatherer(state, shapes, torch.device("cpu"))
    whole = {key: TracedTensor.whole(shape, torch.float32, key) for key, shape in shapes.items()}
    pieces = {f"{name}.{n}": whole[name].transpose(1, 2)[n] for name in ("experts", "along") for n in range(5)}
    with mock.patch.object(gathering, "_AT_ONCE", 100), LargestTensor() as largest:  # less than two experts
        found = {key: gather(tensor) for key, tensor in (whole | pieces).items()}
    assert rank == 0 or largest.nbytes <= 100
    found["half"] = gather(TracedTensor.whole(EXPERTS.shape, torch.bfloat16, "experts"))
    with pytest.raises(CheckpointError, match=r"'absent' cannot be exported: the ranks hold \[\] of \[2\]"):
        BoxGatherer(state, {**shapes, "absent": (2,)}, torch.device("cpu"))
    dist.destroy_process_group()
    return found


def test_tensors_are_whole_on_the_main_rank_bit_for_bit(tmp_path: Path) -> None:
    ranks = run_ranks(gather_all, 6, folder=tmp_path)
    assert all(rank.exit_code == 0 for rank in ranks), ranks[0].output[-3000:]
    found = ranks[0].value
    expected = {"experts": EXPERTS, "along": EXPERTS, "norm": NORM, "plain": NORM + 1, "number": torch.tensor(3.5)}
    expected |= {f"{name}.{n}": EXPERTS[n].T for name in ("experts", "along") for n in range(5)}
    expected["half"] = EXPERTS.bfloat16()
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        same = found[key].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
        assert same and found[key].dtype == tensor.dtype, key
