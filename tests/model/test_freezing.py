"""``training.freeze``: parameters that stay as the source has them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import OlmoForCausalLM

from flame_ext.checkpoint.run_hooks import RunHooks
from flame_ext.model.freezing import OPTION
from flame_ext.model.parameters import parameters_on_meta
from tests.layouts import LAYOUTS
from tests.preflight.refusals import refusal
from tests.ranks import TINY_OLMO, TrainRun, train
from tests.seeding.test_vocabulary import grown_folder
from tests.tiny_models import CONFIGS, save_tiny

FREEZE = "--training.freeze=model.embed_tokens.weight,*.mlp.*"
STEPS = (
    "--training.steps=2",
    "--training.seq_len=64",
    "--checkpoint.export_dtype=float32",
    "--lr_scheduler.total_steps=60",
)


def is_frozen(key: str) -> bool:
    return key == "model.embed_tokens.weight" or ".mlp." in key


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def with_moments(run: TrainRun, step: int) -> set[str]:
    """The parameters of which a step holds moments."""
    keys = FileSystemReader(run.dump_folder / "checkpoint" / f"step-{step}").read_metadata().state_dict_metadata
    return {key.removeprefix("optimizer.state.").removesuffix(".exp_avg") for key in keys if key.endswith(".exp_avg")}


def assert_kept(run: TrainRun, source: Path) -> None:
    before, after = weights(source), weights(run.dump_folder / "hf" / "step-2")
    assert {key for key, value in before.items() if torch.equal(after[key], value)} == set(filter(is_frozen, before))
    moments = with_moments(run, 2)
    assert moments and not any(map(is_frozen, moments)) and {*before} - set(filter(is_frozen, before)) <= moments


def test_what_is_frozen_is_the_source_bit_for_bit_after_training(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *STEPS, FREEZE)
    assert_kept(run, TINY_OLMO)
    said = run.ranks[0].output
    assert "training.freeze: 13 of 35 parameters" in said and "source keys ignored, 13 frozen" in said


@pytest.mark.matrix
def test_a_resumed_run_keeps_frozen_what_was(tmp_path: Path) -> None:
    unbroken = train(tmp_path / "run", *STEPS, FREEZE, "--checkpoint.interval=1")
    more = ("--checkpoint.interval=1", "--checkpoint.allow_config_change=training.steps")
    train(tmp_path / "broken", *STEPS, FREEZE, "--training.steps=1", *more)
    again = train(tmp_path / "broken", *STEPS, FREEZE, *more)
    assert_kept(again, TINY_OLMO)
    now, then = (weights(run.dump_folder / "hf" / "step-2") for run in (again, unbroken))
    assert all(torch.equal(now[key], value) for key, value in then.items())
    other = train(tmp_path / "broken", *STEPS, "--training.steps=3", *more, check=False)
    assert other.exit_codes == [1] and "training.freeze: then [" in other.ranks[0].output
    allowed = "--checkpoint.allow_config_change=training.steps,training.freeze"
    other = train(tmp_path / "broken", *STEPS, "--training.steps=3", more[0], allowed, check=False)
    assert other.exit_codes == [1]
    assert "has no moments of model.embed_tokens.weight, model.layers.0" in other.ranks[0].output


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["fsdp2", "ddp2", "tp2", "fsdp2-tp2", "pp2"])
@pytest.mark.parametrize("name", ["olmo-untied", "olmo-tied"])
def test_under_every_parallelism(tmp_path: Path, layout: str, name: str) -> None:
    pipeline = (2, ["--training.local_batch_size=4", "--parallelism.pipeline_parallel_degree=2"])
    ranks, options = {**LAYOUTS, "pp2": pipeline}[layout]
    source = save_tiny(name, tmp_path / "model")
    options = [*options, f"--model.hf_assets_path={source}", f"--checkpoint.initial_load_path={source}"]
    run = train(tmp_path / "run", *STEPS, FREEZE, "--seed.verify=parity", *options, world_size=ranks)
    assert_kept(run, source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.freeze=model.layer.*"], "training.freeze: no parameter matches 'model.layer.*'; names are model.layers.*."),
        (["--training.freeze=*"], "training.freeze leaves nothing to train: 35 parameters"),
        ([FREEZE, "--optimizer.early_step_in_backward"], "optimizer.early_step_in_backward does not go with training.freeze"),
        (
            ["--training.freeze=model.embed_tokens.*,model.layers.[01].*", "--parallelism.pipeline_parallel_degree=2"],
            "training.freeze leaves stage 0 of 2 (layers [0, 1]) nothing to train",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_frozen(options: list[str], message: str) -> None:
    assert message in refusal("--training.seq_len=64", *options)


def test_a_part_of_a_head_that_no_source_has_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *STEPS, "--training.freeze=future_predictor.norm.*", check=False)
    assert run.exit_codes == [1] and not (tmp_path / "run" / "checkpoint").exists()
    said = run.ranks[0].output
    assert "training.freeze keeps a head as the source has it, but 'future_predictor.norm." in said
    assert "or narrow the pattern, or drop training.freeze" in said


def test_rows_of_new_tokens_are_not_left_untrained(tmp_path: Path) -> None:
    folder = grown_folder(TINY_OLMO, tmp_path / "new")
    run = train(
        tmp_path / "run", *STEPS, FREEZE, f"--model.hf_assets_path={folder}", "--seed.resize_vocabulary", check=False
    )
    assert run.exit_codes == [1]
    assert "which lacks the rows of 2 tokens (seed.resize_vocabulary)" in run.ranks[0].output


@pytest.mark.parametrize(("now", "thawed"), [([], ["model.embed_tokens.weight"]), (["model.embed_tokens.*"], [])])
def test_a_tied_parameter_is_thawed_by_whichever_name_it_was_frozen(now: list[str], thawed: list[str]) -> None:
    with parameters_on_meta():
        model: Any = OlmoForCausalLM(CONFIGS["olmo-tied"])
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    frozen = dict.fromkeys([*tied, *tied.values()], OPTION) if now else {}
    whole = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    hooks: Any = SimpleNamespace(
        _target=lambda: SimpleNamespace(whole=whole),
        _model=SimpleNamespace(whole=SimpleNamespace(tied_keys=tied, frozen=frozen)),
    )
    assert RunHooks._thawed(hooks, ["lm_head.weight"]) == thawed
