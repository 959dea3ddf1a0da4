"""What can be known to be wrong with context parallelism before a process group exists."""

from __future__ import annotations

import os
from collections.abc import Iterator

from transformers import PreTrainedConfig

from flame_ext.config.sections import FlameJobConfig, sequence_lengths
from flame_ext.heads.own import enabled_heads
from flame_ext.model.context_parallel import LOAD_BALANCERS, not_context_parallel


def check_context_parallel(config: FlameJobConfig) -> Iterator[str]:
    """One sentence for each finding; the model's own are :func:`check_context_parallel_of_model`'s."""
    options = config.parallelism
    degree, balancer = options.context_parallel_degree, options.context_parallel_load_balancer
    name = "parallelism.context_parallel_degree"
    if degree < 1:
        yield f"{name} must be >= 1 (1 = whole sequences), got {degree}"
    if degree <= 1:
        return
    ranks, sharing = int(os.environ.get("WORLD_SIZE", "1")), degree * max(1, options.tensor_parallel_degree)
    if ranks % sharing:
        yield (
            f"{name} ({degree}) times parallelism.tensor_parallel_degree ({options.tensor_parallel_degree}) must divide the "
            f"number of processes ({ranks})"
        )
    heads = [*(["future_encoder"] if config.future_encoder.enable else []), *enabled_heads(config)]
    if heads:
        yield (
            f"{name} > 1 goes without heads ({', '.join(heads)} enabled): a rank has a part of each sequence, whose future "
            "lies on other ranks, while their losses take sequences whole; scale with tensor_parallel_degree, whose sequence "
            "parallelism shares out activations, or with FSDP"
        )
    if options.pipeline_parallel_degree > 1:
        yield f"{name} > 1 does not go with parallelism.pipeline_parallel_degree > 1; take tensor_parallel_degree or FSDP beside it"
    if balancer not in LOAD_BALANCERS:
        yield (
            f"parallelism.context_parallel_load_balancer must be one of {', '.join(map(repr, LOAD_BALANCERS))}, got {balancer!r}: "
            "all layers and micro-batches share one order of positions"
        )
    if options.context_parallel_rotate_method != "allgather":
        yield (
            f"parallelism.context_parallel_rotate_method must be 'allgather', got {options.context_parallel_rotate_method!r}: keys "
            "and values are gathered, so that any backbone's mask can be used on them"
        )
    divisor = sharing * (2 if balancer == "headtail" else 1)
    for section, seq_len in sequence_lengths(config).items():
        if seq_len % divisor:
            yield (
                f"{section}.seq_len ({seq_len}) must be a multiple of {divisor}: the sequence is shared out in equal parts by "
                f"{name} ({degree}), in twice as many by context_parallel_load_balancer = 'headtail', and by tensor_parallel_degree"
            )


def check_context_parallel_of_model(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    """Whether the backbone can have a part of the sequence."""
    if config.parallelism.context_parallel_degree > 1 and (reason := not_context_parallel(hf_config)) is not None:
        yield (
            f"parallelism.context_parallel_degree > 1 can not be right for {hf_config.model_type!r}: {reason}; scale with FSDP or "
            "tensor_parallel_degree"
        )
