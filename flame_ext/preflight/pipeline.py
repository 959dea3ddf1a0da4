"""What can be known to be wrong with a pipeline before a process group exists."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import set_default_dtype

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.model.pipeline import SCHEDULES, layers_of_stages, not_pipelined


def check_pipeline(config: FlameJobConfig) -> Iterator[str]:
    """One sentence for each finding; the model's own are :func:`check_pipeline_of_model`'s."""
    options, training = config.parallelism, config.training
    degree, schedule, size = (
        options.pipeline_parallel_degree,
        options.pipeline_parallel_schedule,
        options.pipeline_parallel_microbatch_size,
    )
    if degree < 1:
        yield f"parallelism.pipeline_parallel_degree must be >= 1 (1 = no pipeline), got {degree}"
    if degree <= 1:
        return
    ranks = int(os.environ.get("WORLD_SIZE", degree))
    if ranks % degree:
        yield f"parallelism.pipeline_parallel_degree ({degree}) must divide the number of ranks ({ranks})"
    if schedule not in SCHEDULES:
        yield (
            f"parallelism.pipeline_parallel_schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}: the losses run in "
            "the last stage's forward, and forward-only passes go through the same stages"
        )
    if options.pipeline_parallel_schedule_csv:
        yield "parallelism.pipeline_parallel_schedule_csv is not supported: forward-only passes have no such schedule"
    for name in ("first", "last"):
        if getattr(options, f"pipeline_parallel_{name}_stage_less_layers") < 0:
            yield f"parallelism.pipeline_parallel_{name}_stage_less_layers must be >= 0"
    yield from _check_microbatches(schedule, degree, size, training.local_batch_size)
    if config.optimizer.early_step_in_backward:
        yield (
            "optimizer.early_step_in_backward does not go with parallelism.pipeline_parallel_degree > 1: a gradient is whole "
            "only after the backwards of all micro-batches"
        )
    if config.future_predictor.freeze_backbone:
        yield (
            "future_predictor.freeze_backbone does not go with parallelism.pipeline_parallel_degree > 1: only the last stage "
            "would have anything to train; use FSDP"
        )
    encoder = config.future_encoder
    if encoder.enable and encoder.summary_method != "anticausal" and not encoder.detach_targets:
        batch = training.local_batch_size
        if batch != size:
            yield (
                f"future_encoder.detach_targets = false: the gradient of {encoder.summary_method!r} summaries goes through the whole "
                f"local batch, which a pipeline cuts: set parallelism.pipeline_parallel_microbatch_size ({size}) to "
                f"training.local_batch_size ({batch}), with pipeline_parallel_schedule = 'GPipe', or detach_targets = true"
            )


def _check_microbatches(schedule: str, degree: int, size: int, batch: int) -> Iterator[str]:
    if size < 1 or batch % size:
        yield (
            f"parallelism.pipeline_parallel_microbatch_size must be >= 1 and divide training.local_batch_size ({batch}), got {size}"
        )
        return
    count = batch // size
    if schedule == "1F1B" and count < degree:
        yield (
            f"parallelism.pipeline_parallel_schedule '1F1B' needs at least as many micro-batches as ranks in the pipeline "
            f"({degree}), but training.local_batch_size {batch} in micro-batches of {size} makes {count}; raise "
            "local_batch_size, lower pipeline_parallel_microbatch_size, or take 'GPipe'"
        )
    if schedule == "Interleaved1F1B" and count % max(1, count // degree):
        yield (
            f"parallelism.pipeline_parallel_schedule 'Interleaved1F1B' runs micro-batches in rounds of {degree}, the ranks in the "
            f"pipeline, and {count} (training.local_batch_size {batch} in micro-batches of {size}) make no whole rounds: take a "
            f"multiple of {degree}"
        )


def check_pipeline_of_model(config: FlameJobConfig) -> Iterator[str]:
    """What only the model tells, which is built on meta for it."""
    if config.parallelism.pipeline_parallel_degree <= 1:
        return
    args = HFModelArgs(hf_assets_path=config.model.hf_assets_path, trust_remote_code=config.seed.trust_remote_code)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = build_hf_causal_lm(args)
    reason = not_pipelined(model)
    if reason is not None:
        yield (
            f"parallelism.pipeline_parallel_degree > 1 can not be right for {model.config.model_type!r}: {reason}; scale with "
            "data_parallel_shard_degree (FSDP)"
        )
        return
    try:
        layers_of_stages(config.parallelism, len(model.layers))
    except ConfigError as e:
        yield str(e)
