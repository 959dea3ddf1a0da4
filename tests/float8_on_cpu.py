"""For ``experimental.custom_import``: what float8 does on a GPU, emulated: gathered weights, recipes, compiled layers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torchao.float8 import Float8LinearConfig
from torchtitan.components.quantization import float8

import flame_ext.preflight.quantized

all_gather, from_recipe_name = dist.all_gather_single, Float8LinearConfig.from_recipe_name


def gathered_as_bytes(output: torch.Tensor, given: torch.Tensor, **options: Any) -> Any:
    """Gloo does not know float8."""
    if given.dtype.itemsize == 1:
        output, given = output.view(torch.uint8), given.view(torch.uint8)
    return all_gather(output, given, **options)


def emulated(name: Any) -> Any:
    return dataclasses.replace(from_recipe_name(name), emulate=True)


dist.all_gather_single = gathered_as_bytes
Float8LinearConfig.from_recipe_name = staticmethod(emulated)
float8.has_cuda_capability = lambda *_: True
flame_ext.preflight.quantized.torch = SimpleNamespace(accelerator=SimpleNamespace(is_available=lambda: True))
