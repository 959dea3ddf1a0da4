"""The load of a mixture's experts in whole runs: the same under every layout, untouched by the teacher, resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import TrainRun, train
from tests.tiny_models import save_tiny

FIGURES = ("loss_router", "router_entropy", "router_largest_share", "router_unused")
DDP2 = "--parallelism.data_parallel_replicate_degree=2"
PIPELINE = ("--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=1F1B")
ACCUMULATED = ("--training.local_batch_size=2", "--training.global_batch_size=8")
NO_HEADS = ("--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable")


def run(folder: Path, dump_folder: Path, *options: str, steps: int = 2, world_size: int = 1) -> TrainRun:
    common = [f"--model.hf_assets_path={folder}", f"--checkpoint.initial_load_path={folder}", "--training.seq_len=64"]
    common += [f"--training.steps={steps}", "--lr_scheduler.total_steps=60", "--checkpoint.interval=100"]
    return train(dump_folder, *common, *options, world_size=world_size)


def assert_same_load(
    found: TrainRun, expected: TrainRun, names: tuple[str, ...] = (*FIGURES, "loss", "grad_norm")
) -> None:
    assert len(found.metrics) == len(expected.metrics)
    for name in names:
        assert found.values(name) == pytest.approx(expected.values(name), rel=1e-5), name


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def whole_batch(olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """Two steps on one process, in one batch, with heads; the routers' loss weighs as much as the rest."""
    return run(olmoe, tmp_path_factory.mktemp("whole") / "run", "--moe.aux_loss_coef=1.0")


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ACCUMULATED),
        (2, ["--training.local_batch_size=4"]),
        pytest.param(2, [*ACCUMULATED, DDP2], marks=pytest.mark.matrix),
        pytest.param(4, ["--training.local_batch_size=2", DDP2], marks=pytest.mark.matrix),
        pytest.param(4, ["--training.local_batch_size=2"], marks=pytest.mark.matrix),
        pytest.param(1, ["--activation_checkpoint.mode=full"], marks=pytest.mark.matrix),
        pytest.param(1, ["--activation_checkpoint.mode=selective", *ACCUMULATED], marks=pytest.mark.matrix),
        pytest.param(2, ["--training.local_batch_size=4", "--training.enable_cpu_offload"], marks=pytest.mark.matrix),
        pytest.param(1, ["--moe.experts_implementation=eager"], marks=pytest.mark.matrix),
    ],
    ids=[
        "accumulation4",
        "fsdp2",
        "ddp2-accumulation2",
        "hsdp4",
        "fsdp4",
        "recomputed",
        "selective-accumulation4",
        "offload2",
        "eager",
    ],
)
def test_the_load_does_not_depend_on_the_layout(
    olmoe: Path, whole_batch: TrainRun, dump_folder: Path, world_size: int, options: list[str]
) -> None:
    found = run(olmoe, dump_folder, "--moe.aux_loss_coef=1.0", *options, world_size=world_size)
    assert_same_load(found, whole_batch)
    assert ("time_routes" in found.metrics[-1]) == any("global_batch" in option for option in options)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, [*PIPELINE, "--training.local_batch_size=8"]),
        (4, [*PIPELINE, *ACCUMULATED]),
        (2, [PIPELINE[0], "--parallelism.pipeline_parallel_schedule=Interleaved1F1B", "--training.local_batch_size=8"]),
    ],
    ids=["pipeline2", "fsdp2-pipeline2-accumulation2", "interleaved"],
)
def test_the_load_does_not_depend_on_a_pipeline(
    tmp_path: Path, dump_folder: Path, world_size: int, options: list[str]
) -> None:
    folder = save_tiny("qwen3-moe", tmp_path / "model")
    expected = run(folder, dump_folder / "one", "--moe.aux_loss_coef=1.0")
    found = run(folder, dump_folder / "stages", "--moe.aux_loss_coef=1.0", *options, world_size=world_size)
    assert_same_load(found, expected)
    assert "time_routes" in found.metrics[-1]


def test_the_teacher_leaves_the_load_alone(olmoe: Path, whole_batch: TrainRun, dump_folder: Path) -> None:
    plain = run(olmoe, dump_folder, "--moe.aux_loss_coef=1.0", *NO_HEADS, steps=1)
    first, expected = plain.metrics[0], whole_batch.metrics[0]
    assert {name: first[name] for name in FIGURES} == {name: expected[name] for name in FIGURES}
    assert first["loss"] == pytest.approx(first["loss_ce"] + first["loss_router"], rel=1e-6)
    assert "1 times the auxiliary loss of OlmoeForCausalLM, over the tokens of a step" in plain.ranks[0].output


def test_biases_are_moved_saved_and_resumed(tmp_path: Path, dump_folder: Path) -> None:
    folder = save_tiny("deepseek-v3", tmp_path / "model")
    options = ["--moe.bias_update_rate=0.01", "--checkpoint.interval=2", "--checkpoint.export_dtype=float32"]
    # Two micro-batches, of which the first does not end the step.
    options += ["--training.local_batch_size=4", "--training.global_batch_size=8", *NO_HEADS]
    whole = run(folder, dump_folder, *options, steps=4)
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = load_file(folder / "model.safetensors")[key]
    after = load_file(dump_folder / "hf/step-4/model.safetensors")[key]
    moved = (after - before).abs()
    assert moved.max() == pytest.approx(0.04, abs=1e-6) and torch.all(moved < 0.0401)
    assert (
        "loss_router" not in whole.metrics[0]
        and whole.metrics[-1]["router_entropy"] > whole.metrics[0]["router_entropy"]
    )
    shutil.rmtree(dump_folder / "checkpoint" / "step-4")
    shutil.rmtree(dump_folder / "hf")
    resumed = run(folder, dump_folder, *options, steps=4)
    assert "Training starts at step 3" in resumed.ranks[0].output
    assert torch.equal(load_file(dump_folder / "hf/step-4/model.safetensors")[key], after)
    assert resumed.values("router_entropy") == whole.values("router_entropy")


@pytest.mark.matrix
def test_gpt_oss_learns_with_a_teacher_and_its_sinks(tmp_path: Path, dump_folder: Path) -> None:
    folder = save_tiny("gpt-oss", tmp_path / "model")
    found = run(folder, dump_folder, "--seed.verify=parity", steps=3)
    assert "no summary of the future depends on its past" in found.ranks[0].output
    assert found.values("loss_ce")[2] < found.values("loss_ce")[0]
