"""The objective in whole runs: the same under every layout, learned, resumed, and gone at weight zero."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flame_ext.analysis import load_future_heads
from tests.ranks import TINY_OLMO, TrainRun, train

THREE_STEPS = ("--training.steps=3", "--lr_scheduler.total_steps=60", "--checkpoint.interval=100")
ACTION = ("--action_layer.enable", "--action_layer.top_k=4")
HALF = "--training.local_batch_size=4"
DDP2 = "--parallelism.data_parallel_replicate_degree=2"
DETERMINED = (
    "loss", "loss_ce", "loss_future", "loss_action", "loss_action_model", "future_mi_bound", "future_keys", "future_cos_positive",
    "future_cos_negative", "action_reward", "action_cosine", "grad_norm", "grad_norm_backbone", "grad_norm_heads",
    "tokens_seen",
)  # fmt: skip


def assert_same_run(run: TrainRun, reference: TrainRun) -> None:
    """Sums in another order: float32, 1e-5."""
    assert len(run.metrics) == len(reference.metrics)
    for line, expected in zip(run.metrics, reference.metrics, strict=True):
        assert set(line) == set(expected)
        for name in DETERMINED:
            if expected.get(name) is None:
                assert line.get(name) is None, (line["step"], name)
            else:
                assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (line["step"], name)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """Every loss, on one process, in one batch."""
    return train(tmp_path_factory.mktemp("three") / "run", *THREE_STEPS, *ACTION)


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, [HALF]),
        (2, [HALF, DDP2]),
        (4, ["--training.local_batch_size=2", DDP2]),
        (1, ["--training.local_batch_size=2", "--training.global_batch_size=8"]),
        (2, ["--training.local_batch_size=2", "--training.global_batch_size=8"]),
        (2, ["--training.local_batch_size=2", "--training.global_batch_size=8", DDP2]),
        (1, ["--future_encoder.negatives=local"]),
        (1, ["--future_encoder.teacher_attention=flex"]),
    ],
    ids=[
        "fsdp2",
        "ddp2",
        "hsdp4",
        "accumulation4",
        "fsdp2-accumulation2",
        "ddp2-accumulation2",
        "local-on-one-rank",
        "flex",
    ],
)
def test_losses_and_gradients_do_not_depend_on_the_layout(
    three_steps: TrainRun, dump_folder: Path, world_size: int, options: list[str]
) -> None:
    assert_same_run(train(dump_folder, *THREE_STEPS, *ACTION, *options, world_size=world_size), three_steps)


@pytest.mark.parametrize("method", ["mean", pytest.param("query", marks=pytest.mark.matrix)])
def test_gradients_through_pooled_summaries_do_not_depend_on_the_layout(dump_folder: Path, method: str) -> None:
    options = [*THREE_STEPS, f"--future_encoder.summary_method={method}", "--future_encoder.no-detach_targets"]
    reference = train(dump_folder / "one", *options)
    assert_same_run(train(dump_folder / "ddp2", *options, HALF, DDP2, world_size=2), reference)
    if method == "query":
        assert_same_run(train(dump_folder / "fsdp2", *options, HALF, world_size=2), reference)
        heads = load_future_heads(dump_folder / "one" / "hf" / "step-3")
        initial = train(dump_folder / "detached", *options, "--future_encoder.detach_targets")
        fixed = load_future_heads(initial.dump_folder / "hf" / "step-3")
        assert not torch.equal(heads["future_encoder"].q_proj.weight, fixed["future_encoder"].q_proj.weight)
        assert initial.metrics[-1]["loss_future"] != reference.metrics[-1]["loss_future"]


def test_every_other_step_has_a_teacher(dump_folder: Path) -> None:
    options = [*THREE_STEPS, *ACTION, "--future_encoder.teacher_interval=2"]
    run = train(dump_folder / "one", *options)
    first, idle, third = run.metrics
    assert idle["loss_future"] is None and idle["loss_action"] is None and "time_teacher" not in idle
    assert idle["grad_norm_heads"] == 0.0 and idle["loss"] == idle["loss_ce"]
    weighted = first["loss_future"] + first["loss_action"] + first["loss_action_model"]
    assert first["loss"] == pytest.approx(first["loss_ce"] + 2 * 0.1 * weighted, rel=1e-6), "twice the weights"
    assert third["loss_future"] is not None
    assert_same_run(train(dump_folder / "ddp2", *options, HALF, DDP2, world_size=2), run)


def test_a_fraction_of_the_sequences_has_a_teacher(three_steps: TrainRun, dump_folder: Path) -> None:
    run = train(dump_folder, *THREE_STEPS, *ACTION, "--future_encoder.teacher_fraction=0.5")
    first, whole = run.metrics[0], three_steps.metrics[0]
    # Sums over half of the sequences over half of all pairs; of those there are not quite as many in each half.
    assert first["future_keys"] == pytest.approx(whole["future_keys"] / 2, rel=0.05)
    assert first["loss_ce"] == whole["loss_ce"]
    assert first["loss_future"] == pytest.approx(whole["loss_future"] - math.log(2), rel=0.02), "half of the negatives"


def test_a_frozen_backbone_stays_as_it_is(dump_folder: Path) -> None:
    held_out = ["--validation.enable", "--validation.dataset=python_stdlib_validation", "--validation.seq_len=256"]
    held_out += ["--validation.steps=2", "--validation.freq=1"]
    options = [*THREE_STEPS, "--future_predictor.freeze_backbone", "--checkpoint.export_dtype=float32", *held_out]
    run = train(dump_folder, *options, HALF, DDP2, world_size=2)
    seeded, trained = load_file(TINY_OLMO / "model.safetensors"), load_file(dump_folder / "hf/step-3/model.safetensors")
    assert all(torch.equal(trained[key], value.float()) for key, value in seeded.items())
    assert run.values("grad_norm_backbone") == [0.0] * 3 and run.values("loss_future")[2] < run.values("loss_future")[0]
    lines = [json.loads(line) for line in (dump_folder / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert len({line["loss_ce"] for line in lines}) == 1, "the same held-out text every time"
    assert lines[2]["loss_future"] < lines[0]["loss_future"]
    assert lines[0]["future_keys"] > 900 and 0 <= lines[0]["future_top1"] <= 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_frozen_backbone_rests_with_its_heads(dump_folder: Path, world_size: int) -> None:
    options = [*THREE_STEPS, "--future_predictor.freeze_backbone", "--future_encoder.teacher_interval=2"]
    run = train(dump_folder, *options, world_size=world_size)
    norms = run.values("grad_norm")
    assert norms[0] > 0 and norms[1] == 0 and norms[2] > 0
    assert run.values("skipped_steps") == [0, 0, 0] and run.values("loss_future")[1] is None


def test_a_group_for_each_head_is_resumed_bit_for_bit(dump_folder: Path) -> None:
    options = [*THREE_STEPS, *ACTION, "--training.steps=4", "--checkpoint.interval=2"]
    options += ["--future_predictor.lr_scale=5", "--future_predictor.warmup_steps=1", "--action_layer.weight_decay=0"]
    options += ["--future_encoder.loss_weight_warmup_steps=3", "--action_layer.loss_weight_decay_steps=3"]
    run = train(dump_folder, *options)
    first, last = run.metrics[0], run.metrics[3]
    parts = (
        first["loss_ce"] + 0.1 / 3 * first["loss_future"] + 0.1 * (first["loss_action"] + first["loss_action_model"])
    )
    assert first["loss"] == pytest.approx(parts, rel=1e-6), "a third of the way up; not yet on the way down"
    assert last["loss"] == pytest.approx(
        last["loss_ce"] + 0.1 * last["loss_future"] + 0.1 * last["loss_action_model"], rel=1e-6
    )
    shutil.rmtree(dump_folder / "checkpoint" / "step-4")
    shutil.rmtree(dump_folder / "hf")
    resumed = train(dump_folder, *options)
    assert "Training starts at step 3" in resumed.ranks[0].output
    for name in (*DETERMINED, "lr"):
        assert resumed.values(name) == run.values(name), name


def test_all_weights_zero_is_plain_cross_entropy_bit_for_bit(dump_folder: Path) -> None:
    zero = ["--future_encoder.loss_weight=0", "--action_layer.loss_weight=0", "--action_layer.model_loss_weight=0"]
    attached = train(dump_folder / "attached", *THREE_STEPS, *ACTION, *zero)
    without = ["--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable"]
    plain = train(dump_folder / "plain", *THREE_STEPS, *without)
    assert attached.values("loss_ce") == plain.values("loss_ce")
    assert attached.values("grad_norm") == plain.values("grad_norm")
    assert not {"loss_future", "loss_action", "time_teacher"} & set(attached.metrics[0])


@pytest.mark.matrix  # three runs of 200 steps: minutes
def test_after_two_hundred_steps_the_heads_have_learned_and_the_model_is_none_the_worse(tmp_path: Path) -> None:
    held_out = ["--validation.enable", "--validation.dataset=python_stdlib_validation", "--validation.seq_len=256"]
    held_out += ["--validation.steps=8", "--validation.freq=200"]
    common = ["--training.steps=200", "--training.local_batch_size=4", "--checkpoint.interval=1000", *held_out]
    common.append("--checkpoint.no-last_save_in_hf")
    runs = {
        "joint": list(ACTION),
        "plain": ["--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable"],
        "probe": ["--future_predictor.freeze_backbone", "--future_predictor.head_type=linear"],
    }
    with ThreadPoolExecutor(2) as pool:
        done = {
            name: pool.submit(train, tmp_path / name, *common, *options, timeout=400) for name, options in runs.items()
        }
        joint, plain, probe = (done[name].result() for name in runs)

    def mean(run: TrainRun, name: str, steps: slice) -> float:
        values = run.values(name)[steps]
        return sum(values) / len(values)

    end, start = slice(-10, None), slice(0, 3)
    assert mean(joint, "action_cosine", end) > mean(joint, "action_cosine", start) + 0.2
    assert mean(joint, "action_reward", end) > mean(joint, "action_reward", start) + 0.05
    assert mean(joint, "action_rank", end) < mean(joint, "action_rank", start)
    assert mean(joint, "future_top1", end) > 10 * mean(probe, "future_top1", start)
    assert mean(joint, "future_top1", end) > mean(probe, "future_top1", end), "more than a linear probe of the start"

    def held_out_loss(run: TrainRun) -> float:
        lines = [json.loads(line) for line in (run.dump_folder / "validation.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 200
        return lines[-1]["loss_ce"]

    assert held_out_loss(joint) <= 1.01 * held_out_loss(plain)
