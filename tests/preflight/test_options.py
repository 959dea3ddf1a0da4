"""Refusals of the options of checkpoints and training."""

from __future__ import annotations

import pytest
import torch

from tests.preflight.refusals import refusal


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
    ],
)  # fmt: skip
def test_values_that_can_not_be_right(options: list[str], message: str) -> None:
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
