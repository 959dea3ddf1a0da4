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

name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.13
all_gather, from_recipe_name = getattr(dist, name), Float8LinearConfig.from_recipe_name


def gathered_as_bytes(output: torch.Tensor, given: torch.Tensor, **options: Any) -> Any:
    """Gloo does not know float8."""
    if given.dtype.itemsize == 1:
        output, given = output.view(torch.uint8), given.view(torch.uint8)
    return all_gather(output, given, **options)


def emulated(recipe: Any) -> Any:
    return dataclasses.replace(from_recipe_name(recipe), emulate=True)


setattr(dist, name, gathered_as_bytes)
Float8LinearConfig.from_recipe_name = staticmethod(emulated)
float8.has_cuda_capability = lambda *_: True
flame_ext.preflight.quantized.torch = SimpleNamespace(accelerator=SimpleNamespace(is_available=lambda: True))
