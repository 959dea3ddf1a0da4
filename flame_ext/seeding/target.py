"""The state that is to be seeded, as seeding sees it: tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.initialisation import ParameterInit
from flame_ext.seeding.key_names import KeyNames


@dataclass(frozen=True)
class SeedTarget:
    """The state to be seeded."""

    state: Mapping[str, Tensor]
    """Key to parameter or persistent buffer, DTensor or plain, each tied parameter once. Written in place."""
    whole: Mapping[str, Tensor]
    """The same of all of the model, for shapes and dtypes; a stage of a pipeline has but a part of it in ``state``."""
    part: int
    """Which part ``state`` is of: ranks of one part have the same keys."""
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
        model: with its heads; parallelised, or on meta; or the last of a rank's stages of it.
        state: its state dict, each tied parameter once.
        config: the configuration that it was built from.
    """
    whole, full = model.whole, whole_state(model, state)
    shapes = {key: tuple(tensor.shape) for key, tensor in full.items()}
    return SeedTarget(
        state=state,
        whole=full,
        part=0 if model.stage is None else model.stage.index,
        tied=whole.tied_keys,
        computed_buffers=whole.computed_buffers,
        inits=whole.parameter_inits,
        vocabulary=frozenset(whole.vocabulary_keys),
        names=key_names(whole, shapes | {name: shapes[key] for name, key in whole.tied_keys.items()}),
        config=config,
    )


def whole_state(model: HFCausalLM, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state``, or if it is a pipeline stage's that of the whole model, on meta; each tied parameter once."""
    whole = model.whole
    if whole is model:
        return state
    return {key: tensor for key, tensor in whole.state_dict().items() if key not in whole.tied_keys}


def key_names(model: HFCausalLM, shapes: dict[str, tuple[int, ...]]) -> KeyNames:
    """How a model's keys are spelled in files.

    Args:
        model: see above.
        shapes: of the full tensors, by every name that they have.
    """
    architecture = type(model).__name__.removeprefix("Titan")
    return KeyNames(architecture, shapes, model.weight_transforms, model.base_model_prefix)
