"""Checks of ``[moe]`` against the model."""

from collections.abc import Iterator

import torch
import transformers
from torchtitan.config import TORCH_DTYPE_MAP
from transformers import PreTrainedConfig

from flame_ext.config.sections import FlameJobConfig, Moe
from flame_ext.errors import ConfigError
from flame_ext.model.routing import CORRECTION_BIAS
from flame_ext.preflight.model import model_on_meta
from flame_ext.preflight.parallelism import sharding_ranks

_SIZES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_mixture(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    """Yields one sentence for each finding; a mixture, or any model with options for one, is built on the meta device."""
    moe, text = config.moe, hf_config.get_text_config()
    if moe == Moe() and not any(getattr(text, size, None) for size in _SIZES):
        return
    try:
        model = model_on_meta(config)
    except ConfigError as e:
        yield str(e)
        return
    if moe.bias_update_rate:
        name = f"moe.bias_update_rate = {moe.bias_update_rate} with {model.architecture}"
        if not any(key.endswith(f".{CORRECTION_BIAS}") for key, _ in model.named_buffers()):
            yield f"{name}: its routers have no {CORRECTION_BIAS}; leave it out"
        elif model.routing.problem:
            yield f"{name}: {model.routing.problem}; leave it out"
    compiled = config.compile.enable and "model" in config.compile.components
    how = model.base_model.config.get_text_config()._experts_implementation
    if compiled and model.routing.of_mixture and how == "eager":
        yield (
            f"compile.enable with {model.architecture}: its experts are run by 'eager', a loop over those that have tokens, which cannot "
            "be compiled: take moe.experts_implementation = 'auto' if that is another one here, or leave 'model' out of compile.components"
        )
    options = config.training
    weights = options.mixed_precision_param if sharding_ranks(config) > 1 else options.dtype
    if compiled and how == "grouped_mm" and weights != "bfloat16" and not _compiles_grouped_mm():
        yield (
            f"compile.enable with {model.architecture}: transformers {transformers.__version__} cannot compile the backward of "
            f"'grouped_mm' with weights in {weights}: take moe.experts_implementation = 'batched_mm', update transformers, or leave "
            "'model' out of compile.components"
        )
    trained = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(trained) > 1 and sharding_ranks(config) > 1:
        other = next(name for dtype, name in trained.items() if dtype != TORCH_DTYPE_MAP[config.training.dtype])
        yield (
            f"training.dtype = {config.training.dtype!r} with {model.architecture}: it keeps {other} in float32, and FSDP takes parameters "
            "of one dtype: set training.dtype = 'float32', and take training.mixed_precision_param for the rest"
        )
    if moe.balance_over == "micro_batch" and config.parallelism.pipeline_parallel_degree > 1:
        yield (
            "moe.balance_over = 'micro_batch' does not go with parallelism.pipeline_parallel_degree > 1, where backwards begin before "
            "a micro-batch's last forward: take 'step'"
        )


def _compiles_grouped_mm() -> bool:
    """Whether the backward that stands in for grouped_mm's, of other weights than bfloat16, is an operator as its forward is."""
    return hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")
