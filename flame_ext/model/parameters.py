"""Counts the parameters of modules, and builds modules whose parameters take no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig


def parameters_of(module: nn.Module) -> int:
    """The number of a module's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def attention_multiplications(config: PreTrainedConfig, seq_len: int) -> int:
    """A layer's attention scores and values for each token, in multiplications of a forward, without causal sparsity."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * heads * head_dim * seq_len


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Lets modules be built with their parameters on meta, and their buffers, which may be in no state dict, real on the CPU."""
    handle = register_module_parameter_registration_hook(_to_meta)
    try:
        with torch.device("cpu"):
            yield
    finally:
        handle.remove()


def _to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
    """Moves a parameter to the meta device as it is registered; buffers stay on their device."""
    if parameter is None or parameter.is_meta:  # a tied parameter is registered again and must stay one object
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
