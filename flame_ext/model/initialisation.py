"""How a new parameter is initialised, as data: the values themselves depend on the seed and the name (seeding/new_parameters.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float


@dataclass(frozen=True)
class Uniform:
    """Independent elements, uniform in [-bound, bound).

    Uniform rather than normal: its samples are exact multiples of a power of two before scaling, so that no
    vectorised transcendental function can make them differ between machines.
    """

    bound: float


ParameterInit = Constant | Uniform


def lecun_uniform(fan_in: int) -> Uniform:
    """Variance 1 / fan_in: a linear map keeps the scale of a normalised input (LeCun et al. 1998, "Efficient BackProp")."""
    return Uniform(math.sqrt(3.0 / fan_in))


def linear_inits(module: nn.Module) -> dict[str, ParameterInit]:
    """Of a module of norms and linear maps: norms at identity, biases at zero, linear maps LeCun-uniform (gain 1)."""
    inits: dict[str, ParameterInit] = {}
    for prefix, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            key = f"{prefix}.{name}".lstrip(".")
            if parameter.ndim == 2:
                inits[key] = lecun_uniform(parameter.shape[1])
            else:
                inits[key] = Constant(1.0 if name == "weight" else 0.0)
    return inits
