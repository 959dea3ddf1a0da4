"""Refusals of the options of checkpoints and training."""

from __future__ import annotations

import pytest
import torch

from flame_ext.train import parse
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint.no-enable"], "checkpoint.enable must be true"),
        (["--checkpoint.initial_load_path", "None"], "checkpoint.initial_load_path is not set, and training never starts from random"),
        (["--checkpoint.create_seed_checkpoint"], "create_seed_checkpoint has no use here"),
        (["--checkpoint.keep_latest_k=1"], "keep_latest_k must be 0 (keep all) or at least 2"),
        (["--checkpoint.async_mode=async_with_pinned_mem"], "needs an accelerator"),
        (["--training.dataloader.num_workers=-1"], "num_workers must be >= 0"),
        (["--training.epochs=-1"], "training.epochs must be >= 0"),
        (["--training.global_batch_size=12"], "must be a positive multiple of training.local_batch_size (8)"),
        (["--loss.ce_weight=-1"], "loss.ce_weight must be >= 0"),
        (["--loss.mix_ce=0.5"], "loss.mix_ce = 0.5 mixes the plain cross-entropy with a weighted one: set loss.weighting"),
        (["--loss.ce_weight=0", "--future_encoder.loss_weight=0"], "leaves nothing to train by"),
        (["--action_layer.enable", "--action_layer.gt_bias=1", "--action_layer.reward=label"], "gt_bias is added to cosines"),
        (["--action_layer.label_smoothing=2"], "action_layer.label_smoothing must be in 0..1"),
        (["--lr_scheduler.total_steps=59"], "lr_scheduler.total_steps (59) must be at least the steps of the run (60)"),
        (["--optimizer.lr=0.5", "--optimizer.weight_decay=4"], "optimizer.lr times optimizer.weight_decay must be below 1, got 2"),
        (["--memory_estimation.enable"], "memory_estimation.enable has no effect"),
        (["--optimizer.muon_momentum=0.9"], "optimizer.muon_momentum = 0.9 has no effect with optimizer.name = 'AdamW'; take 'Muon'"),
        (["--optimizer.name=Muon", "--optimizer.early_step_in_backward"], "step_in_backward does not go with optimizer.name = 'Muon'"),
        (["--optimizer.name=Muon", "--future_predictor.freeze_backbone"], "which future_predictor.freeze_backbone keeps as it is"),
        (["--optimizer.name=Muon", "--training.enable_cpu_offload"], "enable_cpu_offload does not go with optimizer.name = 'Muon'"),
        (["--profiling.enable_profiling", "--profiling.profile_freq=3"], "profiling.profile_freq (3) must be at least profiler_warmup (3)"),
        (["--profiling.enable_memory_snapshot"], "profiling.enable_memory_snapshot records the allocator of an accelerator"),
        (["--activation_checkpoint.mode=memory_budget"], "'memory_budget' needs compile.enable with 'model'"),
        (["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=abc"], "'op', or a number n >= 1"),
        (["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=0"], "'op', or a number n >= 1"),
        (["--activation_checkpoint.determinism_check=x"], "determinism_check must be 'default' or 'none'"),
        (["--compile.components=modle"], "compile.components: unknown component 'modle' (known: model, loss)"),
        (["--compile.enable", "--compile.backend=inducktor"], "compile.backend must be one of"),
    ],
)  # fmt: skip
def test_values_that_can_not_be_right(monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    if "accelerator" in message and torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert message in refusal(*options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("exclude_from_loading=optimizer", "the next step takes the schedule's first learning rate"),
        ("exclude_from_loading=lr_scheduler", "the schedule starts over while the step goes on"),
        ("exclude_from_loading=dataloader", "the data start over while the step goes on"),
        ("exclude_from_loading=train_state", "the step starts over while schedule and data go on"),
        ("exclude_from_loading=model", "the weights would be random"),
        ("exclude_from_loading=optimiser", "there is no such part (model, optimizer,"),
        ("exclude_from_loading=dataloader,lr_scheduler", "2 problems in the configuration"),
        ("max_nonfinite_steps=0", "checkpoint.max_nonfinite_steps must be >= 1 (1 = stop at the first"),
    ],
)
def test_options_that_would_take_a_run_apart_are_refused(option: str, message: str) -> None:
    assert message in refusal(f"--checkpoint.{option}")


@pytest.mark.parametrize("section", ["training", "validation"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "num_workers=3",
            "num_workers (3) must divide the sequences that a rank has in a step (8), which its workers share",
        ),
        ("persistent_workers", "persistent_workers is for workers, and {}.dataloader.num_workers is 0"),
        ("prefetch_factor=2", "prefetch_factor is for workers, and {}.dataloader.num_workers is 0"),
    ],
)
def test_workers_of_both_dataloaders_fit_their_batches(section: str, option: str, message: str) -> None:
    found = refusal("--validation.enable", "--validation.seq_len=64", f"--{section}.dataloader.{option}")
    assert f"{section}.dataloader.{message.format(section)}" in found


@pytest.mark.parametrize("section", ["training", "validation"])
def test_sequences_of_both_are_within_the_models_length(section: str) -> None:
    message = refusal("--validation.enable", "--validation.seq_len=64", f"--{section}.seq_len=4096")
    assert f"{section}.seq_len (4096) is beyond the model's max_position_embeddings" in message


def test_workers_share_what_a_rank_has_of_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--training.local_batch_size=2", "--training.global_batch_size=8"]
    parse([f"--job.config_file={DEBUG_TOML}", *options, "--training.dataloader.num_workers=4"])
    assert "that a rank has in a step (4)" in refusal(*options, "--training.dataloader.num_workers=3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.local_batch_size=4"], None),
        (["--training.local_batch_size=4", "--training.global_batch_size=16"], "here 2 times in a step (training.global_batch_size 16)"),
        (["--parallelism.data_parallel_replicate_degree=2"], "before DDP (parallelism.data_parallel_replicate_degree > 1)"),
        (["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"], "before DDP"),
    ],
)  # fmt: skip
def test_an_update_in_the_backward_is_made_once_and_of_all_gradients(
    monkeypatch: pytest.MonkeyPatch, options: list[str], message: str | None
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--optimizer.early_step_in_backward", *options]
    if message is None:
        parse([f"--job.config_file={DEBUG_TOML}", *options])
    else:
        assert message in refusal(*options)


@pytest.mark.parametrize(
    "options", [["replicate_degree=3"], ["shard_degree=4"], ["replicate_degree=2", "shard_degree=2"]]
)
def test_replicas_and_shards_make_up_the_processes(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refusal(*(f"--parallelism.data_parallel_{option}" for option in options))
    assert "the number of data-parallel ranks (2: 2 processes by the other degrees)" in message
