"""The options that every head has, and the names of the heads. It imports neither torch nor torchtitan: tools need the names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

HEAD_NAMES: list[str] = []  # of the known heads, in the order of their registration (heads/registry.py)


@dataclass
class HeadOptimization:
    """How a head's parameters are optimised: they are a parameter group, which is saved and restored as such."""

    lr_scale: float = 1.0
    """Learning rate of this head's parameters, as a multiple of `optimizer.lr`."""

    weight_decay: float | None = None
    """Weight decay of this head's parameters; by default `optimizer.weight_decay`."""

    warmup_steps: int | None = None
    """Warm-up of this head's learning rate; by default `lr_scheduler.warmup_steps`."""

    freeze: bool = False
    """Keep this head's parameters as the source has them. Its losses still train the backbone and other heads."""


def is_head_key(key: str) -> bool:
    """Whether a state-dict key is that of a head's parameter or buffer."""
    return key.split(".")[0] in HEAD_NAMES


def at_least(name: str, section: Any, limits: Mapping[str, tuple[float, str]]) -> Iterator[str]:
    """One sentence for each option of ``[name]`` that is below its limit, given with the meaning of the limit."""
    for option, (least, meaning) in limits.items():
        if not (value := getattr(section, option)) >= least:  # NaN is not
            yield f"{name}.{option} must be >= {least}{f' ({meaning})' if meaning else ''}, got {value}"
