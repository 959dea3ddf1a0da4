"""How new parameters are initialised, as data; seeding/new_parameters.py draws the values, by seed and name."""

import math
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float


@dataclass(frozen=True)
class Uniform:
    """Independent elements, uniform in [-bound, bound): unlike normal ones, their bits are the same on every machine."""

    bound: float


ParameterInit = Constant | Uniform


def linear_inits(module: nn.Module) -> dict[str, ParameterInit]:
    """Initialises a module of norms and linear maps: norms to the identity, biases to 0, linear maps LeCun-uniform.

    Their variance 1 / fan_in keeps the scale of a normalised input (LeCun et al. 1998, "Efficient BackProp").
    """
    inits: dict[str, ParameterInit] = {}
    for key, parameter in module.named_parameters():
        is_linear, other = parameter.ndim == 2, Constant(1.0 if key.rpartition(".")[2] == "weight" else 0.0)
        inits[key] = Uniform(math.sqrt(3.0 / parameter.shape[1])) if is_linear else other
    return inits
