"""Float8 beside heads, emulated on a CPU by torchao: layouts, ties, steps, exports and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flame_ext.model.quantization import FLOAT8
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.source import read_tensor
from tests.layouts import COMPILE, TP2, steps
from tests.ranks import TrainRun, train

CONVERTERS = f"--model.converters={FLOAT8},future_prediction"
EMULATED = [CONVERTERS, f"--{FLOAT8}.emulate"]
ON_CPU = "--experimental.custom_import=tests.float8_on_cpu"
# A scale for each token and each row of a weight, and so the same however a batch is split.
ROWWISE = [CONVERTERS, f"--{FLOAT8}.recipe_name=rowwise", ON_CPU]
GATHERED = [*EMULATED, f"--{FLOAT8}.enable_fsdp_float8_all_gather", "--seed.verify=none", ON_CPU]
FEW = [
    "--training.seq_len=64",
    "--checkpoint.export_dtype=float32",
    "--checkpoint.interval=1",
    "--lr_scheduler.total_steps=60",
]
HALF = "--training.local_batch_size=4"


def distance(result: dict[str, Any], expected: dict[str, Any]) -> float:
    """Of all gradients, relative to their norm."""
    there = expected["gradients"]
    assert set(result["gradients"]) == set(there)
    squares = sum((result["gradients"][key] - value).square().sum() for key, value in there.items())
    return float(squares / sum(value.square().sum() for value in there.values())) ** 0.5


@pytest.mark.matrix
def test_a_step_in_float8_is_the_same_under_every_layout(tmp_path: Path) -> None:
    """But for a few numbers that another order of sums rounds to another neighbour, which is 6 % away."""
    jobs: dict[str, list[str]] = {"olmo-untied+heads": [], "olmo2+heads": ["--mtp.enable"]}

    def step(name: str, layout: str, *options: str) -> dict[str, dict[str, Any]]:
        return steps(tmp_path, tmp_path / name, layout, jobs, *options)[0]

    exact, spared = step("exact", "single"), f"--{FLOAT8}.filter_fqns=mlp"
    for name, options, layouts in (
        ("rowwise", [*ROWWISE, spared], ("fsdp2", "ddp2", "cp2", "tp2")),
        ("tensorwise", EMULATED, ("tp2",)),  # of another split, other tensors have a scale
    ):
        single = step(name, "single", *options)
        for job in jobs:
            assert 0.02 < distance(single[job], exact[job]) < 0.5, "float8 is not what is compared with"
        for layout in layouts:
            found = step(name, layout, *options)
            for job in jobs:
                for loss in (part for part in single[job]["parts"] if part.startswith("loss")):
                    value = single[job]["parts"][loss]
                    assert found[job]["parts"][loss] == pytest.approx(value, rel=1e-3), (name, layout, loss)
                assert distance(found[job], single[job]) < 0.05, (name, layout, job)
    by_fsdp, by_ddp = step("tensorwise", "fsdp2", *EMULATED), step("tensorwise", "ddp2", *EMULATED)
    gathered = step("gathered", "fsdp2", *GATHERED)
    for job in jobs:
        for other in (by_ddp, gathered):
            assert distance(other[job], by_fsdp[job]) < 1e-6
            assert other[job]["parts"] == pytest.approx(by_fsdp[job]["parts"], rel=1e-6)


def weights(run: TrainRun, step: int) -> dict[str, torch.Tensor]:
    folder = run.dump_folder / "hf" / f"step-{step}"
    return load_file(folder / "model.safetensors") | load_file(folder / "future_heads" / "model.safetensors")


def test_a_run_exports_its_master_weights_and_heads_stay_in_high_precision(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *EMULATED, *FEW, "--training.steps=2", "--model.print_after_conversion")
    said, exported = run.ranks[0].output, weights(run, 2)
    assert "28 of 29 linear layers compute in float8" in said, "its output embedding has 264 rows"
    backbone, _, heads = said.partition("(future_predictor)")
    assert "Float8Linear(" in backbone and "Linear(" in heads and "Float8Linear(" not in heads
    step = open_source(tmp_path / "run" / "checkpoint" / "step-2")
    for key, value in exported.items():
        assert value.dtype == torch.float32 and torch.equal(value, read_tensor(step, key)), key


@pytest.mark.matrix
@pytest.mark.parametrize("options", [[], ["--optimizer.name=Muon"], [*COMPILE]], ids=["adamw", "muon", "compiled"])
def test_weights_that_are_gathered_in_float8_are_saved_as_others_are(tmp_path: Path, options: list[str]) -> None:
    """And a run that was interrupted ends as one that was not: scales that were computed after a step are those before the next."""
    precompute = f"--{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp"
    job = [*GATHERED, *FEW, HALF, *options, precompute, "--checkpoint.allow_config_change=training.steps"]
    whole = train(tmp_path / "whole", *job, "--training.steps=3", world_size=2, timeout=280)
    plain = [*EMULATED, ON_CPU, *FEW, HALF, *options, "--training.steps=3"]
    plain = train(tmp_path / "plain", *plain, world_size=2, timeout=280)
    train(tmp_path / "broken", *job, "--training.steps=2", world_size=2, timeout=280)
    broken = train(tmp_path / "broken", *job, "--training.steps=3", world_size=2, timeout=280)
    assert whole.values("loss") == plain.values("loss") and len(whole.values("loss")) == 3
    for run in (broken, plain):
        assert all(torch.equal(weights(run, 3)[key], value) for key, value in weights(whole, 3).items())
    step = tmp_path / "whole" / "checkpoint" / "step-3"
    assert not any(b"torchao" in file.read_bytes() for file in step.glob("*.distcp"))
    read = open_source(step)
    assert all(torch.equal(read_tensor(read, key), value) for key, value in weights(whole, 3).items())


@pytest.mark.matrix
def test_training_in_float8_loses_what_it_loses_in_bfloat16(tmp_path: Path) -> None:
    job = ["--training.seq_len=64", "--training.steps=20", HALF, "--training.mixed_precision_param=bfloat16"]
    runs = [train(tmp_path / str(len(o)), *job, *o, world_size=2, timeout=280) for o in ([], EMULATED)]
    plain, float8 = ({name: run.values(name) for name in ("loss_ce", "loss_future")} for run in runs)
    for name, values in plain.items():
        assert float8[name] != values
        assert sum(float8[name][-5:]) == pytest.approx(sum(values[-5:]), rel=0.01), name
    assert runs[1].metrics[0].keys() == runs[0].metrics[0].keys()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, ["--parallelism.pipeline_parallel_degree=2"]),
        (1, [*COMPILE, ON_CPU]),
        (2, [*COMPILE, ON_CPU, TP2]),
        (1, ["--data.document_attention", "--validation.enable", "--validation.dataset=python_stdlib", "--validation.freq=1"]),
        (1, ["--future_encoder.summary_method=attention", "--training.freeze=model.embed_tokens.weight"]),
        (1, ["--action_layer.enable", "--mtp.enable", "--token_order.enable", "--next_latent.enable"]),
        (1, ["--training.global_batch_size=16", "--activation_checkpoint.mode=full"]),
        (2, ["--training.enable_cpu_offload", HALF]),
    ],
)  # fmt: skip
def test_what_goes_beside_it(tmp_path: Path, size: int, options: list[str]) -> None:
    job = ["--training.seq_len=64", "--training.steps=2", "--validation.steps=1", "--validation.seq_len=64"]
    runs = [
        train(tmp_path / str(len(o)), *job, *o, *options, world_size=size, timeout=280)
        for o in ([ON_CPU], [*EMULATED, ON_CPU])
    ]
    plain, float8 = ([line for line in run.metrics if "loss_ce" in line] for run in runs)
    assert len(plain) == 2
    for there, here in zip(plain, float8, strict=True):
        assert here["loss_ce"] != there["loss_ce"] and here["loss_ce"] == pytest.approx(there["loss_ce"], rel=0.01)
