"""The state that is to be seeded, as seeding sees it: tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from flame_ext.heads.initialisation import ParameterInit
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.seeding.key_names import KeyNames


@dataclass(frozen=True)
class SeedTarget:
    """The state to be seeded."""

    state: Mapping[str, Tensor]
    """Key to parameter or persistent buffer, DTensor or plain, each tied parameter once. Written in place."""
    tied: Mapping[str, str]
    """Other name of a tied parameter to its key in ``state``."""
    computed_buffers: list[str]
    """Names of buffers outside ``state``."""
    inits: Mapping[str, ParameterInit]
    """The initialisation of those keys that have one: the heads'."""
    vocabulary: frozenset[str]
    """Keys whose first dimension is the vocabulary."""
    names: KeyNames
    """How the model's keys are spelled in files."""
    config: PreTrainedConfig
    """The configuration that the model was built from."""


def seed_target(model: HFCausalLM, state: Mapping[str, Tensor], config: PreTrainedConfig) -> SeedTarget:
    """What of a model is to be seeded.

    Args:
        model: with its heads; parallelised, or on meta.
        state: its state dict, each tied parameter once.
        config: the configuration that it was built from.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    return SeedTarget(
        state=state,
        tied=model.tied_keys,
        computed_buffers=model.computed_buffers,
        inits=model.parameter_inits,
        vocabulary=frozenset(model.vocabulary_keys),
        names=key_names(model, shapes | {name: shapes[key] for name, key in model.tied_keys.items()}),
        config=config,
    )


def key_names(model: HFCausalLM, shapes: dict[str, tuple[int, ...]]) -> KeyNames:
    """How a model's keys are spelled in files.

    Args:
        model: see above.
        shapes: of the full tensors, by every name that they have.
    """
    architecture = type(model).__name__.removeprefix("Titan")
    return KeyNames(architecture, shapes, model.weight_transforms, model.base_model_prefix)
