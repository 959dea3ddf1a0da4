"""Parameters that stay as the source has them (``training.freeze``); ``HFCausalLM.frozen`` says which, and by which option."""

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torchtitan.tools.logging import logger

from flame_ext.errors import ConfigError
from flame_ext.model.hf_causal_lm import HFCausalLM

OPTION = "training.freeze"


def freeze_parameters(model: HFCausalLM, patterns: Iterable[str]) -> None:
    """Freezes the parameters of a whole model on meta, heads included, whose names match a pattern (fnmatch), in place.

    A tied parameter is frozen by any of its names. Raises a ConfigError if a pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    found: list[str] = []
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"{OPTION}: no parameter matches {pattern!r}{_near(pattern, named)}")
        found += matched
    if not found:
        return
    for name in found:
        named[name].requires_grad_(False)
    chosen = {id(named[name]) for name in found}
    # Of a tied parameter every name, since seeding asks by the one that the state dict keeps.
    model.frozen |= {name: OPTION for name, parameter in named.items() if id(parameter) in chosen}
    every = {id(parameter): parameter.numel() for parameter in named.values()}
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError(f"{OPTION} leaves nothing to train: {len(every)} parameters have no gradient; freeze fewer")
    elements = sum(every[key] for key in chosen)
    logger.info(
        f"{OPTION}: {len(chosen)} of {len(every)} parameters ({elements:,} of {sum(every.values()):,} elements) stay as the source has "
        "them, without gradients and moments"
    )


def _near(pattern: str, names: Iterable[str]) -> str:
    """Says which names are like the pattern, with * for the numbers of layers."""
    alike = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    close = difflib.get_close_matches(pattern, alike, n=3, cutoff=0.3) or [*alike][:3]
    return f"; names are {', '.join(close)}"
