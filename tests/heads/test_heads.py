"""The predictor's forms, and initial values that depend on seed and name alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from flame_ext.heads.future_predictor import FuturePredictor
from flame_ext.model.initialisation import Constant, Uniform
from flame_ext.seeding import new_parameters
from flame_ext.seeding.new_parameters import initialise
from tests.ranks import run_ranks


@pytest.mark.parametrize("head_type", ["linear", "mlp", "gated"])
def test_predictions_are_unit_vectors_in_float32(head_type: str) -> None:
    head = FuturePredictor(16, head_type)
    inits = head.parameter_inits()
    assert set(inits) == {name for name, _ in head.named_parameters()}
    initialise(dict(head.named_parameters()), inits, rng_seed=0)
    predictions = head.to(torch.bfloat16)(torch.randn(2, 5, 16, dtype=torch.bfloat16))
    assert predictions.shape == (2, 5, 16) and predictions.dtype == torch.float32
    torch.testing.assert_close(predictions.norm(dim=-1), torch.ones(2, 5))
    predictions.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_linear_head_is_layernorm_then_linear() -> None:
    head = FuturePredictor(16, "linear")
    x = torch.randn(3, 4, 16)
    expected = torch.nn.functional.layer_norm(x, (16,)) @ head.proj.weight.T + head.proj.bias
    torch.testing.assert_close(head(x), expected / expected.norm(dim=-1, keepdim=True))


def test_unknown_head_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'linear', 'mlp', 'gated'"):
        FuturePredictor(16, "deep")


SHAPES = {"matrix": (37, 5), "wide": (3, 4096), "vector": (301,), "cube": (8, 3, 5), "one": (1, 7), "scalar": ()}
INITS = {name: Uniform(0.25) for name in SHAPES}


def filled(device_shards: str = "none") -> dict[str, torch.Tensor]:
    """In a rank, or alone: full tensors after initialisation under a placement."""
    mesh = None
    if device_shards != "none":
        dims = (2, 2) if device_shards == "hsdp" else (torch.distributed.get_world_size(),)
        mesh = init_device_mesh("cpu", dims)
    state = {}
    for name, shape in SHAPES.items():
        tensor = torch.full(shape, float("nan"))
        if mesh is not None and shape:
            placements = [Replicate(), Shard(0)] if device_shards == "hsdp" else [Shard(0)]
            if device_shards == "columns" and len(shape) > 1:
                placements = [Shard(1)]
            tensor = distribute_tensor(tensor, mesh, placements)
        state[name] = tensor
    initialise(state, INITS, rng_seed=3)
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def filled_in_rank(device_shards: str) -> dict[str, torch.Tensor]:
    new_parameters._BLOCK_ELEMENTS = 64
    torch.distributed.init_process_group("gloo")
    try:
        return filled(device_shards)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("world_size", "shards"), [(2, "rows"), (4, "rows"), (4, "hsdp"), (3, "columns")])
def test_initial_values_do_not_depend_on_the_placement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, shards: str
) -> None:
    monkeypatch.setattr(new_parameters, "_BLOCK_ELEMENTS", 64)  # several blocks a tensor, and shards that cut them
    expected = filled()
    for rank in run_ranks(filled_in_rank, world_size, shards, folder=tmp_path):
        assert rank.exit_code == 0, rank.output
        for name, value in expected.items():
            assert torch.equal(rank.value[name], value), name


def test_initial_values_depend_on_seed_and_name_and_fill_the_range() -> None:
    def values(name: str, seed: int) -> torch.Tensor:
        tensor = torch.empty(600, 500)
        initialise({name: tensor}, {name: Uniform(0.5)}, seed)
        return tensor

    reference = values("a", 0)
    assert torch.equal(reference, values("a", 0))
    assert not torch.equal(reference, values("b", 0)) and not torch.equal(reference, values("a", 1))
    assert reference.min() >= -0.5 and reference.max() < 0.5
    assert reference.mean().abs() < 2e-3 and reference.std().item() == pytest.approx(0.5 / 3**0.5, rel=5e-3)
    assert torch.unique(reference.flatten()[: 1 << 18]).numel() > 0.95 * (1 << 18), "blocks differ from each other"
    rows = reference.view(-1)
    assert not torch.equal(rows[:1000], rows[(1 << 18) // 500 * 500 :][:1000]), "second block is not the first again"


def test_constants() -> None:
    tensor = torch.empty(4)
    initialise({"x": tensor}, {"x": Constant(1.5)}, 0)
    assert tensor.tolist() == [1.5] * 4
