"""The range of every numeric option of torchtitan, and of those that flame_ext adds to its sections."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from flame_ext.config.resume_record import flat
from flame_ext.config.sections import FlameJobConfig


class Range(NamedTuple):
    """The values from ``least`` to ``most``; an option may also be absent where its type says so."""

    least: float
    most: float = math.inf
    note: str = ""  # what a value at the edge means, or what to do instead
    above: bool = False  # whether ``least`` itself is too little
    below: bool = False  # whether ``most`` itself is too much
    also: int | None = None  # a value outside that has a meaning of its own

    def problem(self, name: str, value: Any) -> str | None:
        """What is wrong with the value of an option; None if nothing is."""
        enough = value > self.least if self.above else value >= self.least
        if (enough and (value < self.most if self.below else value <= self.most)) or value == self.also:
            return None
        limits = f"{'>' if self.above else '>='} {self.least:g}"
        limits += "" if self.most == math.inf else f" and {'<' if self.below else '<='} {self.most:g}"
        other = "" if self.also is None else f", or {self.also}"
        return f"{name} must be {limits}{other}{f' ({self.note})' if self.note else ''}, got {value}"


_ANY = Range(-(2**63), 2**63 - 1)  # a seed
_COUNT = Range(1)
_OR_NONE = Range(0)
_BETA = Range(0, 1, "a moving average keeps this share", below=True)

RANGES = {
    "activation_checkpoint.memory_budget": Range(0, 1, "0 = recompute all, 1 = keep all"),
    "checkpoint.interval": _COUNT,
    "checkpoint.keep_latest_k": Range(0, note="0 = all"),
    "checkpoint.load_step": Range(0, note="-1 = the newest", also=-1),
    "checkpoint.max_nonfinite_steps": Range(1, note="1 = stop at the first step whose gradient norm is not finite"),
    "comm.init_timeout_seconds": _COUNT,
    "comm.trace_buf_size": Range(0, note="0 = no flight recorder"),
    "comm.train_timeout_seconds": _COUNT,
    "data.rng_seed": _OR_NONE,
    "debug.seed": _ANY,
    "evaluation.batch_size": _COUNT,
    "evaluation.interval": Range(0, note="0 = only the last step's export"),
    "evaluation.limit": Range(0, note="leave it out for all examples", above=True),
    "evaluation.num_fewshot": _OR_NONE,
    "export.interval": Range(0, note="0 = only the last step"),
    "loss.ce_weight": Range(0, note="0 = the heads alone are trained by"),
    "loss.mix_ce": Range(0, 1, "the share of the plain cross-entropy"),
    "lr_scheduler.decay_ratio": Range(0, 1, "the share of the steps in which the rate falls; leave it out to fall from the warm-up on"),
    "lr_scheduler.min_lr_factor": Range(0, 1, "a share of optimizer.lr; more would raise the rate instead of lowering it"),
    "lr_scheduler.total_steps": Range(1, note="leave it out for training.steps"),
    "lr_scheduler.warmup_steps": Range(0, note="0 = none"),
    "lora.lora_alpha": _COUNT,
    "lora.lora_dropout": Range(0, 1, "the share of inputs that are dropped", below=True),
    "lora.r": _COUNT,
    "metrics.log_freq": _COUNT,
    "moe.aux_loss_coef": Range(0, note="0 = no auxiliary loss; leave it out for that of config.json"),
    "moe.bias_update_rate": Range(0, note="0 = the biases stay as they are"),
    "optimizer.beta1": _BETA,
    "optimizer.beta2": _BETA,
    "optimizer.eps": Range(0, note="a gradient that is always 0 would be divided by 0", above=True),
    "optimizer.lr": Range(0, note="below 0 the loss would rise"),
    "optimizer.muon_momentum": _BETA,
    "optimizer.weight_decay": Range(0, note="0 = none"),
    "parallelism.context_parallel_degree": Range(1, note="1 = whole sequences"),
    "parallelism.data_parallel_replicate_degree": Range(1, note="1 = no replicas"),
    "parallelism.data_parallel_shard_degree": Range(1, note="-1 = all ranks that are left", also=-1),
    "parallelism.expert_parallel_degree": _COUNT,
    "parallelism.expert_tensor_parallel_degree": _COUNT,
    "parallelism.pipeline_parallel_degree": Range(1, note="1 = no pipeline"),
    "parallelism.pipeline_parallel_first_stage_less_layers": _OR_NONE,
    "parallelism.pipeline_parallel_last_stage_less_layers": _OR_NONE,
    "parallelism.pipeline_parallel_layers_per_stage": _COUNT,
    "parallelism.pipeline_parallel_microbatch_size": _COUNT,
    "parallelism.tensor_parallel_degree": _COUNT,
    "profiling.profile_freq": _COUNT,
    "profiling.profiler_active": _COUNT,
    "profiling.profiler_warmup": _OR_NONE,
    "seed.pad_vocabulary_to_multiple_of": Range(1, 2**20, "1 = no padding"),
    "seed.rng_seed": _ANY,
    "training.dataloader.num_workers": _OR_NONE,
    "training.dataloader.prefetch_factor": Range(1, note="leave it out without workers"),
    "training.epochs": Range(0, note="0 = training.steps"),
    "training.gc_freq": _COUNT,
    "training.global_batch_size": Range(1, note="-1 = one local batch for each data-parallel rank", also=-1),
    "training.local_batch_size": _COUNT,
    "training.max_norm": Range(0, note="the norm that gradients are clipped to; for no clipping take 1e9", above=True),
    "training.seq_len": _COUNT,
    "training.steps": _COUNT,
    "validation.dataloader.num_workers": _OR_NONE,
    "validation.dataloader.prefetch_factor": Range(1, note="leave it out without workers"),
    "validation.freq": _COUNT,
    "validation.local_batch_size": _COUNT,
    "validation.seq_len": _COUNT,
    "validation.steps": Range(1, note="-1 = all", also=-1),
}  # fmt: skip


def check_ranges(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each number that is out of its range, or that is none: heads' options as well may not be NaN."""
    for name, value in flat(config):
        if isinstance(value, float) and not (math.isfinite(value) or (name == "training.max_norm" and value > 0)):
            yield f"{name} must be a finite number, got {value}"
        elif name in RANGES and value is not None and (problem := RANGES[name].problem(name, value)):
            yield problem
