"""Every numeric option of torchtitan's sections has a range, whose edges are tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from flame_ext.config.sections import FlameJobConfig
from flame_ext.preflight.ranges import RANGES, check_ranges
from tests.preflight.refusals import refusal

UNUSED = {
    "process_group_timeout_ms",
    "replica_id",
    "group_size",
    "min_replica_size",
}  # fault_tolerance.enable is refused
OUTSIDE = {
    "activation_checkpoint.memory_budget": [-0.1, 1.5],
    "checkpoint.keep_latest_k": [-1],
    "checkpoint.load_step": [-2],
    "comm.train_timeout_seconds": [0, -5],
    "data.rng_seed": [-1],
    "lr_scheduler.decay_ratio": [-0.5, 1.1],
    "lr_scheduler.min_lr_factor": [-0.1, 3.0],
    "lr_scheduler.total_steps": [0],
    "lr_scheduler.warmup_steps": [-1],
    "moe.aux_loss_coef": [-0.1],
    "moe.bias_update_rate": [-0.001],
    "optimizer.beta1": [-0.1, 1.0],
    "optimizer.beta2": [1.0, 2.0],
    "optimizer.eps": [0.0, -1e-8],
    "optimizer.lr": [-1e-3],
    "optimizer.weight_decay": [-0.1],
    "parallelism.data_parallel_shard_degree": [0, -2],
    "profiling.profile_freq": [0],
    "training.gc_freq": [0],
    "training.global_batch_size": [0, -2],
    "training.max_norm": [0, -1.0],
    "training.steps": [0],
    "validation.freq": [0],
    "validation.local_batch_size": [0],
}


def set_option(config: Any, name: str, value: Any) -> None:
    *sections, option = name.split(".")
    for section in sections:
        config = getattr(config, section)
    setattr(config, option, value)


def numeric(section: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(section)
    for field in fields(section):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from numeric(hint, f"{prefix}{field.name}.")
        elif {int, float} & {hint, *get_args(hint)} and field.name not in UNUSED:
            yield prefix + field.name


def test_every_number_has_a_range_and_its_default_is_inside() -> None:
    assert set(numeric(FlameJobConfig)) == set(RANGES)
    assert list(check_ranges(FlameJobConfig())) == []


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_a_number_outside_is_refused_by_name(name: str, value: float) -> None:
    config = FlameJobConfig()
    set_option(config, name, value)
    (problem,) = check_ranges(config)
    assert problem.startswith(f"{name} must be >") and problem.endswith(f", got {value}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_refused(value: float) -> None:
    for name in ("optimizer.lr", "lr_scheduler.min_lr_factor"):
        config = FlameJobConfig()
        set_option(config, name, value)
        assert list(check_ranges(config)) == [f"{name} must be a finite number, got {value}"]


@pytest.mark.parametrize(
    "name", ["future_encoder.loss_weight", "future_encoder.temperature", "future_predictor.lr_scale"]
)
def test_options_of_heads_are_finite_too(name: str) -> None:
    assert f"{name} must be a finite number, got nan" in refusal(f"--{name}=nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training.max_norm", math.inf), ("training.max_norm", 1e9), ("training.global_batch_size", -1), ("optimizer.lr", 0.0),
        ("validation.steps", -1), ("lr_scheduler.min_lr_factor", 1), ("lr_scheduler.decay_ratio", None), ("debug.seed", None),
    ],
)  # fmt: skip
def test_the_edges_are_allowed(name: str, value: float | None) -> None:
    config = FlameJobConfig()
    set_option(config, name, value)
    assert list(check_ranges(config)) == []


def test_a_range_is_refused_before_what_is_calculated_with_it() -> None:
    message = refusal("--training.local_batch_size=0", "--training.max_norm=-1")
    assert "2 problems" in message and "training.local_batch_size must be >= 1, got 0" in message
    assert (
        "training.max_norm must be > 0 (the norm that gradients are clipped to; for no clipping take 1e9), got -1"
        in message
    )


def test_what_torchtitan_asserts_is_one_line() -> None:
    assert "validation steps must be positive or -1" in refusal("--validation.steps=0")
