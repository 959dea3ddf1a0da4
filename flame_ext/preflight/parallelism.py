"""Checks of tensor, pipeline, context and expert parallelism: the options, then what the model allows."""

import math
import os
from collections.abc import Iterator

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import set_default_dtype
from transformers import PreTrainedConfig

from flame_ext.config.sections import FlameJobConfig, sequence_lengths
from flame_ext.errors import ConfigError
from flame_ext.heads.registry import enabled_heads
from flame_ext.model.context_parallel import LOAD_BALANCERS, not_context_parallel
from flame_ext.model.expert_parallel import expert_parallel_problems
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.model.pipeline_stages import SCHEDULES, layers_of_stages, not_pipelined
from flame_ext.model.tensor_parallel import tensor_parallel_problems


def check_parallelism(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each finding that needs no model."""
    degrees = config.parallelism
    if config.comm.mode != "default":
        yield f"comm.mode must be 'default', got {config.comm.mode!r}: without real communication there is nothing to seed"
    if config.fault_tolerance.enable:
        yield "fault_tolerance.enable is not supported: TorchFT replaces the checkpoint flow that seeding hooks into"
    kinds = (
        ("tensor", _check_tensor),
        ("pipeline", _check_pipeline),
        ("context", _check_context),
        ("expert", _check_expert),
    )
    for kind, check in kinds:
        if (degree := getattr(degrees, f"{kind}_parallel_degree")) > 1:
            yield from check(config, degree)
    yield from _check_data_parallel(config)
    name = "parallelism.expert_parallel"
    if (etp := degrees.expert_tensor_parallel_degree) != 1:
        yield f"parallelism.expert_tensor_parallel_degree must be 1, got {etp}: a rank computes whole experts; raise {name}_degree instead"
    if (backend := degrees.expert_parallel_comm_backend) != "standard":
        yield f"{name}_comm_backend must be 'standard', got {backend!r}: tokens travel by torch's all-to-all"
    if degrees.enable_async_tensor_parallel and degrees.tensor_parallel_degree <= 1:
        yield "parallelism.enable_async_tensor_parallel needs parallelism.tensor_parallel_degree > 1"


def check_parallelism_of_model(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    """Yields one sentence for each finding of the model, which is built on the meta device if its modules have to be known."""
    degrees, model_type = config.parallelism, repr(hf_config.model_type)
    reason: str | None
    if max(degrees.tensor_parallel_degree, degrees.pipeline_parallel_degree, degrees.expert_parallel_degree) > 1:
        path, vocab_size = config.model.hf_assets_path, hf_config.get_text_config().vocab_size
        args = HFModelArgs(hf_assets_path=path, trust_remote_code=config.seed.trust_remote_code, vocab_size=vocab_size)
        with set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model = build_hf_causal_lm(args)
        if degrees.tensor_parallel_degree > 1:
            without_experts = degrees.expert_parallel_degree > 1
            yield from tensor_parallel_problems(model, degrees.tensor_parallel_degree, without_experts)
        if (degree := degrees.expert_parallel_degree) > 1:
            shards = sharding_ranks(config) * max(1, degrees.tensor_parallel_degree) // degree
            yield from expert_parallel_problems(model, degree, max(1, shards))
        if degrees.pipeline_parallel_degree > 1 and (reason := not_pipelined(model)) is not None:
            yield f"parallelism.pipeline_parallel_degree > 1 cannot be right for {model_type}: {reason}; scale with FSDP"
        elif degrees.pipeline_parallel_degree > 1:
            try:
                layers_of_stages(degrees, len(model.layers))
            except ConfigError as e:
                yield str(e)
    if degrees.context_parallel_degree > 1 and (reason := not_context_parallel(hf_config)) is not None:
        yield f"parallelism.context_parallel_degree > 1 cannot be right for {model_type}: {reason}; take FSDP or tensor parallelism"


def data_parallel_ranks(config: FlameJobConfig) -> int | None:
    """Returns how many processes read different data; None if the other degrees do not divide the number of processes."""
    degrees = [getattr(config.parallelism, f"{kind}_parallel_degree") for kind in ("tensor", "pipeline", "context")]
    ranks, rest = divmod(_processes(), math.prod(max(1, degree) for degree in degrees))
    return None if rest else ranks


def is_launched() -> bool:
    """Returns whether this is a run, whose machine and processes are those that train; flame-ext reads configurations anywhere."""
    return "WORLD_SIZE" in os.environ


def _processes(otherwise: int = 1) -> int:
    """The number of processes, which is known under torchrun."""
    return int(os.environ.get("WORLD_SIZE", otherwise))


def _check_data_parallel(config: FlameJobConfig) -> Iterator[str]:
    options, ranks = config.parallelism, data_parallel_ranks(config)
    replicas, shards = options.data_parallel_replicate_degree, options.data_parallel_shard_degree
    unfit = ranks is not None and (ranks % replicas if shards == -1 else ranks != replicas * shards)
    if unfit and is_launched():
        rest = "" if shards == -1 else f" times data_parallel_shard_degree ({shards})"
        yield (
            f"parallelism.data_parallel_replicate_degree ({replicas}){rest} must {'divide' if shards == -1 else 'be'} the number of "
            f"data-parallel ranks ({ranks}: {_processes()} processes by the other degrees)"
        )


def replicated_alone(config: FlameJobConfig) -> bool:
    """Returns whether DDP replicates the model: FSDP neither shards it nor, under context parallelism, replicates it."""
    return config.parallelism.data_parallel_replicate_degree > 1 and sharding_ranks(config) <= 1


def sharding_ranks(config: FlameJobConfig) -> int:
    """Returns over how many ranks FSDP shards a copy of the model."""
    options, ranks = config.parallelism, data_parallel_ranks(config) or 1
    replicas, shards = options.data_parallel_replicate_degree, options.data_parallel_shard_degree
    return (ranks // replicas if shards == -1 else shards) * max(1, options.context_parallel_degree)


def _check_tensor(config: FlameJobConfig, degree: int) -> Iterator[str]:
    options, ranks = config.parallelism, data_parallel_ranks(config)
    replicas, shards = options.data_parallel_replicate_degree, options.data_parallel_shard_degree
    if ranks is None:
        yield f"parallelism.tensor_parallel_degree ({degree}) must divide the number of processes ({_processes()})"
    elif replicas > 1 and (ranks == replicas if shards == -1 else shards == 1):
        yield (
            f"parallelism.data_parallel_replicate_degree = {replicas} with tensor_parallel_degree = {degree}: torchtitan's DDP goes with "
            "no other parallelism; set data_parallel_shard_degree to 2 or more (HSDP), or data_parallel_replicate_degree to 1 (FSDP)"
        )
    for name, seq_len in sequence_lengths(config).items():
        if seq_len % degree:
            multiple = f"must be a multiple of parallelism.tensor_parallel_degree ({degree})"
            yield f"{name}.seq_len ({seq_len}) {multiple}: sequence parallelism gives each rank as many positions"
    if options.enable_async_tensor_parallel:
        if not (config.compile.enable and "model" in config.compile.components):
            yield "parallelism.enable_async_tensor_parallel needs compile.enable with 'model' in compile.components"
        if not torch.accelerator.is_available():
            yield "parallelism.enable_async_tensor_parallel overlaps kernels of an accelerator, and there is none; leave it out"


def _check_pipeline(config: FlameJobConfig, degree: int) -> Iterator[str]:
    options, batch = config.parallelism, config.training.local_batch_size
    schedule, size = options.pipeline_parallel_schedule, options.pipeline_parallel_microbatch_size
    name = "parallelism.pipeline_parallel"
    if (ranks := _processes(otherwise=degree)) % degree:
        yield f"{name}_degree ({degree}) must divide the number of ranks ({ranks})"
    if schedule not in SCHEDULES:
        yield f"{name}_schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}: the last stage's forward computes the losses"
    if options.pipeline_parallel_schedule_csv:
        yield f"{name}_schedule_csv is not supported: forward-only passes have no such schedule"
    count, rest = divmod(batch, size)
    if rest:
        yield f"{name}_microbatch_size must be >= 1 and divide training.local_batch_size ({batch}), got {size}"
    elif schedule == "1F1B" and count < degree:
        yield (
            f"{name}_schedule '1F1B' needs at least as many micro-batches as ranks in the pipeline ({degree}), but "
            f"training.local_batch_size {batch} in micro-batches of {size} makes {count}; raise it, lower "
            "pipeline_parallel_microbatch_size, or take 'GPipe'"
        )
    elif schedule == "Interleaved1F1B" and count % max(1, count // degree):
        yield (
            f"{name}_schedule 'Interleaved1F1B' runs micro-batches in rounds of {degree}, the ranks in the pipeline, and {count} "
            f"(training.local_batch_size {batch} in micro-batches of {size}) make no whole rounds: take a multiple of {degree}"
        )
    if config.optimizer.early_step_in_backward:
        reason = "a gradient is whole only after the backwards of all micro-batches"
        yield f"optimizer.early_step_in_backward does not go with {name}_degree > 1: {reason}"


def _check_expert(config: FlameJobConfig, degree: int) -> Iterator[str]:
    options, name = config.parallelism, "parallelism.expert_parallel"
    if torch.__version__ < "2.12":
        needed = "whose FSDP shards a layer's experts over other ranks than the rest of it"
        yield f"{name}_degree > 1 needs torch 2.12 or newer, {needed}, and this is {torch.__version__}; set it to 1, or update torch"
    tensor_degree = max(1, options.tensor_parallel_degree)
    if degree % tensor_degree:
        multiple = f"must be a multiple of parallelism.tensor_parallel_degree ({tensor_degree})"
        yield f"{name}_degree ({degree}) {multiple}, whose ranks share out the tokens that they have in common"
    elif data_parallel_ranks(config) is not None and (shards := sharding_ranks(config) * tensor_degree) % degree:
        yield (
            f"{name}_degree ({degree}) must divide the ranks that share one copy of the model or of a pipeline's stage ({shards}: "
            "data_parallel_shard_degree times context_parallel_degree times tensor_parallel_degree), since it takes them from these; "
            "lower it, or pipeline_parallel_degree or data_parallel_replicate_degree"
        )
    if config.optimizer.early_step_in_backward:
        yield f"optimizer.early_step_in_backward does not go with {name}_degree > 1: torchtitan has no such optimizers; leave it out"


def _check_context(config: FlameJobConfig, degree: int) -> Iterator[str]:
    options, name = config.parallelism, "parallelism.context_parallel"
    balancer, rotation = options.context_parallel_load_balancer, options.context_parallel_rotate_method
    tensor_degree = options.tensor_parallel_degree
    sharing = degree * max(1, tensor_degree)
    if data_parallel_ranks(config) is None:
        product = f"{name}_degree ({degree}) times parallelism.tensor_parallel_degree ({tensor_degree})"
        product += f" times parallelism.pipeline_parallel_degree ({options.pipeline_parallel_degree})"
        yield f"{product} must divide the number of processes ({_processes()})"
    if heads := [head for head, spec in enabled_heads(config).items() if not spec.takes_parts]:
        yield (
            f"{name}_degree > 1 gives a rank a part of each sequence, and the spec of {', '.join(heads)} does not say that its loss is "
            "right for one: set takes_parts = True if it is (docs/extending.md), disable it, or scale with FSDP or tensor_parallel_degree"
        )
    if balancer not in LOAD_BALANCERS:
        known = ", ".join(map(repr, LOAD_BALANCERS))
        yield f"{name}_load_balancer must be one of {known}, got {balancer!r}: all layers and micro-batches share one order of positions"
    if rotation != "allgather":
        yield f"{name}_rotate_method must be 'allgather', got {rotation!r}: with all keys and values, any backbone's mask can be used"
    divisor = sharing * (2 if balancer == "headtail" else 1)
    for section, seq_len in sequence_lengths(config).items():
        if seq_len % divisor:
            yield (
                f"{section}.seq_len ({seq_len}) must be a multiple of {divisor}: {name}_degree ({degree}) divides the sequence, into "
                "twice as many parts with context_parallel_load_balancer = 'headtail', and so does tensor_parallel_degree"
            )
