"""Muon: torch's own update on one process, the same on every layout, and resumed bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

from flame_ext.config.head_options import HeadOptimization
from flame_ext.config.sections import Optimizer
from flame_ext.model.hf_causal_lm import AttachedHead
from flame_ext.run.muon import Muon
from flame_ext.run.optimization import build_optimizers
from tests.ranks import TrainRun, run_ranks, train

OPTIONS = ("--optimizer.name=Muon", "--training.steps=2", "--checkpoint.interval=1", "--lr_scheduler.warmup_steps=0")


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    built = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32)
    built.head = torch.nn.Linear(16, 16)
    built.heads = {"head": AttachedHead(HeadOptimization(lr_scale=2.0))}
    return built


def test_matrices_are_updated_as_by_torchs_muon_and_the_rest_as_by_its_adamw() -> None:
    ours, reference = model(), model()
    config = Optimizer(name="Muon", lr=0.01, implementation="for-loop", muon_momentum=0.9)
    (optimizer,) = build_optimizers([ours], config, None)
    assert isinstance(optimizer, Muon)
    named = dict(reference.named_parameters())
    matrices = {name: p for name, p in named.items() if "proj" in name}
    heads = {name: p for name, p in named.items() if name.startswith("head.")}
    rest = {name: p for name, p in named.items() if name not in matrices and name not in heads}
    assert len(matrices) == 7 and {"model.embed_tokens.weight", "lm_head.weight"} <= set(rest)
    adamw = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "foreach": False}
    expected = [
        torch.optim.Muon(matrices.values(), lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": [*rest.values()]}, {"params": [*heads.values()], "lr": 0.02}], **adamw),
    ]
    for step in range(3):
        tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(step))
        for stepped, optimizers in ((ours, [optimizer]), (reference, expected)):
            states = stepped(tokens, output_hidden_states=True)
            (states.logits.logsumexp(-1).mean() + stepped.head(states.hidden_states[-1]).square().mean()).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    assert all(torch.equal(p, named[name]) for name, p in ours.named_parameters())


SHAPES = ((12, 8), (5, 24), (16, 16), (2, 8), (24, 5), (7, 7))


def _two_steps_of_one_gradient(meshes: list[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    """The matrices after two steps, for each mesh."""
    results = []
    for sizes in meshes:
        mesh = init_device_mesh("cpu", sizes) if sizes else None
        matrices = []
        for number, shape in enumerate(SHAPES):
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            if mesh is not None:
                whole = distribute_tensor(
                    whole, mesh, [Shard(0), Shard(1)][: mesh.ndim] if number % 2 else [Shard(0)] * mesh.ndim
                )
            matrices.append(torch.nn.Parameter(whole))
        optimizer = torch.optim.AdamW(matrices, lr=0.01, weight_decay=0.1)
        optimizer.__class__ = Muon
        optimizer.param_groups[0] |= {"muon_momentum": 0.95}
        if mesh is None:
            optimizer = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for step in range(2):
            for number, p in enumerate(matrices):
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + number))
                p.grad = distribute_tensor(grad, mesh, p.placements) if isinstance(p, DTensor) else grad
            optimizer.step()
        results.append([p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in matrices])
    return results


def test_of_the_same_gradients_a_sharded_update_is_bit_equal(tmp_path: Path) -> None:
    """On four ranks, some of which have no row."""
    for rank in run_ranks(_in_group, 4, [(), (4,), (2, 2)], folder=tmp_path):
        expected, *sharded = rank.value
        for matrices in sharded:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(matrices, expected, strict=True))


def _in_group(meshes: list[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    dist.init_process_group("gloo")
    try:
        return _two_steps_of_one_gradient(meshes)
    finally:
        dist.destroy_process_group()


def test_biases_of_experts_and_routers_are_no_matrices_of_muon() -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = GptOssConfig(**sizes, head_dim=8, num_local_experts=4, num_experts_per_tok=2, vocab_size=32)
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    built.heads = {}
    (optimizer,) = build_optimizers([built], Optimizer(name="Muon", implementation="for-loop"), None)
    names = {id(p): name for name, p in built.named_parameters()}
    (matrices,) = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups if "muon_momentum" in g]
    assert matrices == [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    return train(tmp_path_factory.mktemp("muon") / "run", *OPTIONS, "--training.steps=1")


def exported(run: TrainRun) -> dict[str, torch.Tensor]:
    (folder,) = run.dump_folder.glob("hf/step-*")
    return load_file(folder / "model.safetensors") | load_file(folder / "future_heads" / "model.safetensors")


FSDP2 = (2, ["--training.local_batch_size=4"])
LAYOUTS = {
    "ddp2": (2, [*FSDP2[1], "--parallelism.data_parallel_replicate_degree=2"]),
    "tp2": (2, ["--parallelism.tensor_parallel_degree=2"]),
    "fsdp2-tp2": (4, [*FSDP2[1], "--parallelism.tensor_parallel_degree=2"]),
    "hsdp2-2": (4, ["--training.local_batch_size=2", "--parallelism.data_parallel_replicate_degree=2"]),
    "pp2": (2, ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=4"]),
}


@pytest.mark.parametrize(
    "layout", [FSDP2, *(pytest.param(layout, id=name, marks=pytest.mark.matrix) for name, layout in LAYOUTS.items())]
)
def test_a_step_is_that_of_one_process(one_step: TrainRun, dump_folder: Path, layout: tuple[int, list[str]]) -> None:
    """Gradients are sums in another order, and torch computes in bfloat16, in which that may change any of 15 products' last places."""
    world_size, options = layout
    run = train(dump_folder, *OPTIONS, "--training.steps=1", *options, world_size=world_size)
    assert "Muon updates" in run.ranks[0].output
    ours = exported(run)
    for name, expected in exported(one_step).items():
        matrix = expected.ndim == 2 and "layers" in name
        place = (
            1e-3 * 0.2 * max(expected.shape) ** 0.5 * 2**-8
        )  # the last one of values in 0.5..1, times what they are multiplied by
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=4 * place if matrix else 1e-5)


@pytest.mark.parametrize("layout", [(1, []), pytest.param(LAYOUTS["fsdp2-tp2"], marks=pytest.mark.matrix)])
def test_a_run_is_resumed_bit_for_bit(dump_folder: Path, layout: tuple[int, list[str]]) -> None:
    world_size, options = layout
    expected = exported(train(dump_folder, *OPTIONS, *options, world_size=world_size))
    shutil.rmtree(dump_folder / "checkpoint" / "step-2")
    shutil.rmtree(dump_folder / "hf")
    resumed = train(dump_folder, *OPTIONS, *options, world_size=world_size)
    assert "Training starts at step 2" in resumed.ranks[0].output
    ours = exported(resumed)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.matrix
def test_a_step_is_resumed_under_another_layout_but_not_by_adamw(dump_folder: Path) -> None:
    heads = ("--future_predictor.lr_scale=2", "--future_predictor.warmup_steps=1")
    expected = exported(train(dump_folder / "unbroken", *OPTIONS, *heads))
    train(dump_folder / "run", *OPTIONS, *heads, *LAYOUTS["pp2"][1], world_size=2)
    shutil.rmtree(dump_folder / "run" / "checkpoint" / "step-2")
    shutil.rmtree(dump_folder / "run" / "hf")
    other = ("--optimizer.name=AdamW", "--checkpoint.allow_config_change=optimizer.name")
    refused = train(dump_folder / "run", *OPTIONS, *heads, *other, check=False)
    assert "has the state of optimizer.name = 'Muon', which 'AdamW' cannot continue" in refused.ranks[0].output
    ours = exported(train(dump_folder / "run", *OPTIONS, *heads, *LAYOUTS["fsdp2-tp2"][1], world_size=4))
    for name, theirs in expected.items():
        place = 2e-3 * 0.2 * max(theirs.shape) ** 0.5 * 2**-8 if theirs.ndim == 2 and "layers" in name else 1e-5
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=4 * place)
