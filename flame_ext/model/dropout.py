"""Random numbers that a model draws while it is trained, which ranks with other tokens draw for themselves."""

import torch
from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from flame_ext.hf_config import random_fields
from flame_ext.model.hf_causal_lm import HFCausalLM


def has_dropout(model: HFCausalLM, with_heads: bool = True) -> bool:
    """Returns whether a whole model draws random numbers while it is trained; ``with_heads``: it or its heads."""
    heads = () if with_heads else tuple(f"{name}." for name in model.heads)
    modules = (module for name, module in model.named_modules() if not f"{name}.".startswith(heads))
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules) or bool(random_fields(model.config))


def separate_generators(model: HFCausalLM, parallel_dims: ParallelDims) -> None:
    """Seeds this rank's default generators by its place among the ranks that have other tokens, if the model has dropout.

    torchtitan seeds all ranks of a pipeline stage alike, as those of tensor parallelism have to be. Call it once.
    """
    tokens = parallel_dims.get_optional_mesh("loss")  # data and context parallelism
    if tokens is None or not has_dropout(model):
        return
    logger.info(f"Dropout: each of {tokens.size()} ranks with other tokens draws masks of its own")
    # Seeds of the stages of a pipeline lie side by side.
    torch.manual_seed((torch.initial_seed() + tokens.get_local_rank() * 65_537) % 2**64)
