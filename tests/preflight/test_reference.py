"""docs/configuration.md says which of torchtitan's options are refused; each refusal is tried."""

from __future__ import annotations

import pytest

from flame_ext.preflight.reference import TORCHTITAN_OPTIONS
from tests.preflight.refusals import refusal
from tests.test_docs import options

REFUSED = {
    "model.name": ["--model.name=llama3"],
    "model.flavor": ["--model.flavor=1B"],
    "model.converters": ["--model.converters=future_predictor"],
    "checkpoint.enable": ["--checkpoint.no-enable"],
    "checkpoint.initial_load_model_only": ["--checkpoint.no-initial-load-model-only"],
    "checkpoint.initial_load_in_hf_quantized": ["--checkpoint.initial-load-in-hf-quantized"],
    "checkpoint.create_seed_checkpoint": ["--checkpoint.create-seed-checkpoint"],
    "checkpoint.exclude_from_loading": ["--checkpoint.exclude-from-loading=optimizer"],
    "checkpoint.keep_latest_k": ["--checkpoint.keep-latest-k=1"],
    "checkpoint.interval": ["--checkpoint.interval=0"],
    "training.dataloader.num_workers": ["--training.dataloader.num-workers=-1"],
    "training.global_batch_size": ["--training.global-batch-size=9"],
    "training.seq_len": ["--training.seq-len=4096"],
    "optimizer.early_step_in_backward": ["--optimizer.early-step-in-backward", "--future-predictor.lr-scale=2"],
    "parallelism.tensor_parallel_degree": ["--parallelism.tensor-parallel-degree=2"],
    "parallelism.enable_async_tensor_parallel": ["--parallelism.enable-async-tensor-parallel"],
    "parallelism.context_parallel_degree": ["--parallelism.context-parallel-degree=2"],
    "parallelism.context_parallel_load_balancer": [
        "--parallelism.context-parallel-degree=2",
        "--parallelism.context-parallel-load-balancer=ptrr",
    ],
    "parallelism.context_parallel_rotate_method": [
        "--parallelism.context-parallel-degree=2",
        "--parallelism.context-parallel-rotate-method=alltoall",
    ],
    "parallelism.expert_parallel_degree": ["--parallelism.expert-parallel-degree=2"],
    "parallelism.pipeline_parallel_schedule": [
        "--parallelism.pipeline-parallel-degree=2",
        "--parallelism.pipeline-parallel-schedule=ZBVZeroBubble",
    ],
    "parallelism.pipeline_parallel_schedule_csv": [
        "--parallelism.pipeline-parallel-degree=2",
        "--parallelism.pipeline-parallel-schedule-csv=schedule.csv",
    ],
    "training.max_norm": ["--training.max-norm=0"],
    "validation.dataloader.num_workers": ["--validation.enable", "--validation.dataloader.num-workers=3"],
    "validation.seq_len": ["--validation.enable", "--validation.seq-len=4096"],
    "lr_scheduler.total_steps": ["--lr-scheduler.total-steps=5"],
    "profiling.enable_memory_snapshot": ["--profiling.enable-memory-snapshot"],
    "fault_tolerance.enable": ["--fault-tolerance.enable"],
    "comm.mode": ["--comm.mode=fake_backend"],
    "metrics.log_freq": ["--metrics.log-freq=0"],
}
"""Name of an option to command-line options that are refused because of it, beside configs/debug.toml."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_said_to_be_refused_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert name in TORCHTITAN_OPTIONS and name in refusal(*REFUSED[name])


def test_options_of_torchtitan_exist() -> None:
    assert set(TORCHTITAN_OPTIONS) <= options()


def test_every_option_that_is_refused_is_tried() -> None:
    assert {name for name, here in TORCHTITAN_OPTIONS.items() if here in ("refused", "must be true")} <= set(REFUSED)
