"""Digests across ranks: what they do not depend on, and what they notice."""

from __future__ import annotations

import pytest
import torch

from flame_ext.errors import SeedError
from flame_ext.seeding.proof.replicas import compare_replicas, local_digest, weights_digest
from flame_ext.seeding.sources.boxes import full_box
from tests.ranks import run_ranks

SHAPES = {"matrix": (37, 5), "cube": (8, 3, 5), "vector": (301,), "short": (1, 7), "scalar": ()}


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def digests_in_rank(placement: str, damaged_rank: int | None) -> tuple[dict[str, int] | None, str]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo")
    state = tensors()
    if placement != "plain":
        dims = (2, 2) if placement == "hsdp" else (dist.get_world_size(),)
        placements = [Replicate(), Shard(0)] if placement == "hsdp" else [Shard(0)]
        mesh = init_device_mesh("cpu", dims)
        state = {k: distribute_tensor(t, mesh, placements) if t.ndim else t for k, t in state.items()}
    if dist.get_rank() == damaged_rank:
        local = state["matrix"].to_local() if placement != "plain" else state["matrix"]
        local.view(torch.int16)[0, 0] ^= 1  # one bit
    try:
        return compare_replicas(state), ""
    except SeedError as e:
        return None, str(e)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "placement"), [(2, "plain"), (2, "rows"), (4, "rows"), (4, "hsdp")])
def test_digests_do_not_depend_on_the_placement(tmp_path, world_size: int, placement: str) -> None:
    expected = compare_replicas(tensors())
    for rank in run_ranks(digests_in_rank, world_size, placement, None, folder=tmp_path):
        assert rank.exit_code == 0, rank.output
        assert rank.value == (expected, "")


@pytest.mark.parametrize(("world_size", "placement"), [(2, "plain"), (4, "hsdp")])
def test_one_bit_of_one_replica_is_noticed_on_all_ranks(tmp_path, world_size: int, placement: str) -> None:
    for rank in run_ranks(digests_in_rank, world_size, placement, 1, folder=tmp_path):
        assert rank.exit_code == 0, rank.output
        assert rank.value[0] is None and rank.value[1].startswith("'matrix': rank ")
        assert "hold different values for the same elements" in rank.value[1]


def test_a_digest_is_of_values_and_places() -> None:
    state = tensors(torch.float32)
    matrix = state["matrix"]

    def digest(tensor: torch.Tensor) -> int:
        return local_digest(tensor, full_box(tensor.shape), tuple(tensor.shape))

    changed = [matrix.flip(0), matrix.flip(1), matrix.roll(1, 0), matrix.t().contiguous(), matrix * 2, -matrix * 0]
    assert len({digest(tensor) for tensor in [matrix, *changed, matrix * 0]}) == len(changed) + 2
    assert digest(matrix.t().contiguous().t()) == digest(matrix), "not of strides"
    digests = compare_replicas(state)
    total = weights_digest(digests, state, state)
    assert total == weights_digest(digests, state, reversed(list(state)))
    assert total != weights_digest(digests, {**state, "matrix": matrix.view(5, 37)}, state)
    assert total != weights_digest(digests, {**state, "matrix": matrix.view(torch.int32)}, state)
