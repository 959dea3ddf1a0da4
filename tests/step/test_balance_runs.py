"""The load of a mixture's experts in whole runs: the same under every layout, untouched by the teacher, resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import TrainRun, train
from tests.tiny_models import MIXTURES, save_tiny

FIGURES = ("loss_router", "router_entropy", "router_largest_share", "router_unused")
DDP2 = "--parallelism.data_parallel_replicate_degree=2"
PIPELINE = ("--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=1F1B")
ACCUMULATED = ("--training.local_batch_size=2", "--training.global_batch_size=8")
COMPILED = ("--compile.enable", "--compile.backend=aot_eager", "--compile.components=model,loss")
PER_OP = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
EACH_LAYER = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=1")
OFFLOADED = ("--training.enable_cpu_offload",)
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
        pytest.param(1, COMPILED, marks=pytest.mark.matrix),
        pytest.param(2, [*COMPILED, "--training.local_batch_size=4"], marks=pytest.mark.matrix),
        pytest.param(2, [*COMPILED, *ACCUMULATED, DDP2], marks=pytest.mark.matrix),
        pytest.param(1, [*COMPILED, "--activation_checkpoint.mode=full"], marks=pytest.mark.matrix),
        pytest.param(2, [*COMPILED, *EACH_LAYER, "--training.local_batch_size=4"], marks=pytest.mark.matrix),
        pytest.param(2, [*COMPILED, *PER_OP, *OFFLOADED, "--training.local_batch_size=4"], marks=pytest.mark.matrix),
        pytest.param(1, [*COMPILED, "--moe.experts_implementation=batched_mm"], marks=pytest.mark.matrix),
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
        "compiled",
        "compiled-fsdp2",
        "compiled-ddp2-accumulation2",
        "compiled-recomputed",
        "compiled-layer-fsdp2",
        "compiled-op-offload2",
        "compiled-batched",
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


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ["--training.dtype=bfloat16"]),
        (2, ["--training.local_batch_size=4", "--training.dtype=bfloat16"]),
        (2, ["--training.local_batch_size=4", "--training.mixed_precision_param=bfloat16"]),
        (2, ["--training.local_batch_size=4", "--training.mixed_precision_param=bfloat16", *COMPILED, *PER_OP]),
    ],
    ids=["bfloat16", "bfloat16-fsdp2", "mixed-fsdp2", "mixed-fsdp2-compiled"],
)
def test_the_load_in_bfloat16_is_that_in_float32_within_rounding(
    olmoe: Path, whole_batch: TrainRun, dump_folder: Path, world_size: int, options: list[str]
) -> None:
    found = run(olmoe, dump_folder, "--moe.aux_loss_coef=1.0", *options, world_size=world_size)
    for name in ("loss", "loss_ce", "loss_router", "loss_future", "router_entropy"):
        assert found.values(name) == pytest.approx(whole_batch.values(name), rel=2**-8), name
    assert found.values("grad_norm") == pytest.approx(whole_batch.values("grad_norm"), rel=2**-6)
    assert found.values("loss") != whole_batch.values("loss")


@pytest.mark.matrix
@pytest.mark.parametrize("options", [[DDP2], ["--moe.freeze_router"]], ids=["ddp2", "fsdp2-frozen"])
def test_routers_that_stay_in_float32_are_trained_beside_bfloat16(
    tmp_path: Path, dump_folder: Path, options: list[str]
) -> None:
    folder = save_tiny("deepseek-v3", tmp_path / "model")
    expected = run(folder, dump_folder / "float32")
    options = ["--training.dtype=bfloat16", "--training.local_batch_size=4", *options]
    found = run(folder, dump_folder / "bfloat16", *options, world_size=2)
    assert found.values("loss") == pytest.approx(expected.values("loss"), rel=2**-8)


@pytest.mark.matrix
@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "olmoe"])
def test_every_mixture_can_be_compiled(tmp_path: Path, dump_folder: Path, name: str) -> None:
    folder = save_tiny(name, tmp_path / "model")
    expected = run(folder, dump_folder / "plain")
    found = run(folder, dump_folder / "compiled", *COMPILED, "--training.local_batch_size=4", world_size=2)
    assert_same_load(found, expected, tuple({*FIGURES, "loss", "grad_norm"} & {*expected.metrics[0]}))


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, []),
        pytest.param(2, ["--training.local_batch_size=4"], marks=pytest.mark.matrix),
        pytest.param(2, ["--training.local_batch_size=4", DDP2], marks=pytest.mark.matrix),
        pytest.param(1, [*COMPILED, *ACCUMULATED], marks=pytest.mark.matrix),
    ],
    ids=["single", "fsdp2", "ddp2", "compiled-accumulation4"],
)
def test_frozen_routers_stay_bit_for_bit(
    tmp_path: Path, dump_folder: Path, world_size: int, options: list[str]
) -> None:
    # gpt-oss has routers with biases; experts without tokens are moved by the decay of weights alone.
    folder = save_tiny("gpt-oss", tmp_path / "model")
    common = ["--moe.freeze_router", "--moe.aux_loss_coef=1.0", "--checkpoint.interval=1", *options]
    found = run(folder, dump_folder, *common, world_size=world_size)
    said = "moe.freeze_router: 4 parameters stay as they are: model.layers.0.mlp.router.bias, model.layers.0.mlp.router.weight, "
    assert said in found.ranks[0].output and found.values("loss_router")[0] > 0
    before, after = (load_file(at / "model.safetensors") for at in (folder, dump_folder / "hf/step-2"))
    same = {key for key, tensor in before.items() if torch.equal(after[key], tensor)}
    assert same == {key for key in before if ".router." in key} and len(same) == 4
    if not options:  # that a run goes on is the same thing again
        return
    for name in ("checkpoint/step-2", "hf/step-2"):
        shutil.rmtree(dump_folder / name)
    resumed = run(folder, dump_folder, *common, world_size=world_size)
    assert "Training starts at step 2" in resumed.ranks[0].output
    again = load_file(dump_folder / "hf/step-2/model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in after.items())


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("deepseek-v3", 1),
        *(pytest.param(name, 2, marks=pytest.mark.matrix) for name in ("deepseek-v3", "glm4-moe")),
        pytest.param("glm4-moe", 1, marks=pytest.mark.matrix),
    ],
)
def test_biases_are_moved_saved_and_resumed(tmp_path: Path, dump_folder: Path, name: str, world_size: int) -> None:
    folder = save_tiny(name, tmp_path / "model")
    options = ["--moe.bias_update_rate=0.01", "--checkpoint.interval=2", "--checkpoint.export_dtype=float32"]
    # Two micro-batches, of which the first does not end the step.
    options += [f"--training.local_batch_size={4 // world_size}", "--training.global_batch_size=8", *NO_HEADS]
    whole = run(folder, dump_folder, *options, steps=4, world_size=world_size)
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = load_file(folder / "model.safetensors")[key]
    after = load_file(dump_folder / "hf/step-4/model.safetensors")
    moved = (after[key] - before).abs()
    assert moved.max() == pytest.approx(0.04, abs=1e-6) and torch.all(moved < 0.0401)
    assert (
        "loss_router" not in whole.metrics[0]
        and whole.metrics[-1]["router_entropy"] > whole.metrics[0]["router_entropy"]
    )
    shutil.rmtree(dump_folder / "checkpoint" / "step-4")
    shutil.rmtree(dump_folder / "hf")
    resumed = run(folder, dump_folder, *options, steps=4, world_size=world_size)
    assert "Training starts at step 3" in resumed.ranks[0].output
    again = load_file(dump_folder / "hf/step-4/model.safetensors")
    assert set(again) == set(after) and all(torch.equal(again[key], tensor) for key, tensor in after.items())
    assert resumed.values("router_entropy") == whole.values("router_entropy")


@pytest.mark.matrix
def test_gpt_oss_learns_with_a_teacher_and_its_sinks(tmp_path: Path, dump_folder: Path) -> None:
    folder = save_tiny("gpt-oss", tmp_path / "model")
    found = run(folder, dump_folder, "--seed.verify=parity", steps=3)
    assert "no summary of the future depends on its past" in found.ranks[0].output
    assert found.values("loss_ce")[2] < found.values("loss_ce")[0]
