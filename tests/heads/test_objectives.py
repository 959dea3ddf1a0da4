"""The heads of other objectives, beside the first three: one step under every layout against a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flame_ext.analysis import load_future_heads
from flame_ext.heads.registry import check_heads, job_config_class
from tests.faults.test_resume import saved
from tests.layouts import COMPILE, PER_OP, assert_same_step, steps
from tests.ranks import train

HEADS = ("mtp", "token_order", "future_bag", "next_latent")
ENABLED = [*(f"--{name}.enable" for name in HEADS), "--next_latent.steps=2", "--mtp.depth=2"]
SEQUENTIAL = [*ENABLED, "--mtp.kind=sequential", "--data.document_attention"]
# The cross-entropy and the rewards are not as usual either.
WEIGHED = ["--loss.ce_weight=0.5", "--loss.weighting=dft", "--loss.mix_ce=0.25", "--action_layer.enable"]
WEIGHED += ["--action_layer.gt_bias=0.1", "--action_layer.entropy_weight=0.1"]

# Architecture and anything: job to options of its own.
JOBS: dict[str, list[str]] = {"olmo-tied+heads": ENABLED, "olmo2+heads+sequential": SEQUENTIAL + WEIGHED}
MORE: dict[str, list[str]] = {
    "gemma2+heads": ENABLED,  # caps scores and logits, norms around 0, sliding windows
    "gpt2-learned-positions+heads+sequential": SEQUENTIAL,  # learned positions
    "qwen3-qk-norm+heads": ENABLED,
    "olmoe+heads": [*ENABLED, "--mtp.no-enable"],
}


def test_one_step_is_that_of_a_single_process(models: Path, single: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert {f"loss_{name}" for name in HEADS} <= single["olmo-tied+heads"]["parts"].keys()
    for rank in steps(models, tmp_path, "fsdp2", JOBS):
        for name, result in rank.items():
            assert_same_step(result, single[name])


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["fsdp2", "ddp2", "tp2", "fsdp2-tp2", "accumulated"])
def test_every_architecture_under_every_layout(models: Path, tmp_path: Path, layout: str) -> None:
    jobs = JOBS | MORE
    if "tp" in layout:  # transformers plans none of these
        jobs = {name: options for name, options in jobs.items() if not name.startswith(("gpt2", "olmoe"))}
    (expected,) = steps(models, tmp_path, "single", jobs)
    more = ["--training.local_batch_size=2"] if layout == "accumulated" else []
    for rank in steps(models, tmp_path, "single" if more else layout, jobs, *more):
        for name in jobs:
            assert_same_step(rank[name], expected[name])


def test_an_option_below_its_limit_is_named_once() -> None:
    below = {"mtp.depth": 0, "token_order.window": 0, "future_bag.window": 1, "next_latent.steps": 0}
    config = job_config_class()()
    config.model.converters = ["future_prediction"]
    for option, value in (below | {f"{head}.loss_weight": -1.0 for head in HEADS}).items():
        head, _, field = option.partition(".")
        getattr(config, head).enable = True
        setattr(getattr(config, head), field, value)
    assert sorted(problem.split()[0] for problem in check_heads(config)) == sorted(
        [*below, *(f"{head}.loss_weight" for head in HEADS)]
    )


@pytest.mark.matrix
@pytest.mark.parametrize("job", JOBS)
def test_compiled_and_checkpointed_layers_give_the_same_step(
    models: Path, single: dict[str, dict[str, Any]], tmp_path: Path, job: str
) -> None:
    for rank in steps(models, tmp_path, "fsdp2", {job: JOBS[job]}, *COMPILE, *PER_OP):
        assert_same_step(rank[job], single[job])


SHORT = ("--training.steps=2", "--lr_scheduler.total_steps=60")


def test_they_are_exported_and_loaded_again(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *SHORT, *SEQUENTIAL, "--training.local_batch_size=4", world_size=2)
    heads = load_future_heads(run.dump_folder / "hf" / "step-2")
    weights = saved(run.dump_folder / "checkpoint" / "step-2")
    assert set(heads) == {"future_encoder", "future_predictor", *HEADS}
    for key, tensor in heads.state_dict().items():
        assert torch.equal(tensor, weights[key].to(tensor.dtype)), key
    states = torch.randn(1, 5, heads["token_order"].proj.in_features)
    assert heads["token_order"](states).shape == (1, 5, heads["token_order"].proj.out_features)
    assert heads["mtp"](states, torch.randn(2, *states.shape)).shape == (2, *states.shape)


def test_at_weight_0_a_run_is_bit_for_bit_a_plain_one(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", *SHORT)
    resting = train(tmp_path / "resting", *SHORT, *ENABLED, *(f"--{name}.loss_weight=0" for name in HEADS))
    for name in ("loss", "loss_ce", "loss_future", "grad_norm"):
        assert resting.values(name) == plain.values(name), name
    assert not {f"loss_{name}" for name in HEADS} & resting.metrics[-1].keys()


@pytest.mark.matrix
@pytest.mark.parametrize("options", [ENABLED, SEQUENTIAL], ids=["parallel", "sequential"])
def test_the_last_stage_of_a_pipeline_has_them(tmp_path: Path, options: list[str]) -> None:
    single = train(tmp_path / "single", *SHORT, *options)
    pipeline = ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=1F1B"]
    staged = train(tmp_path / "staged", *SHORT, *options, *pipeline, world_size=2)
    for name in ("loss_ce", *(f"loss_{head}" for head in HEADS), "grad_norm"):
        # Adam divides small gradients by themselves: a step on, roundings of 1e-7 are 1e-6.
        assert staged.values(name) == pytest.approx(single.values(name), rel=1e-5), name
