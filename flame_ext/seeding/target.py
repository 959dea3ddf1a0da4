"""Describes a model to the seeding: tensors by name, with what files and initialisations need to know of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.loading_report import LoadStateDictInfo

from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.seeding.names import KeyNames


@dataclass(frozen=True)
class SeedTarget:
    state: Mapping[str, Tensor]
    """Key to parameter or persistent buffer, DTensor or plain, each tied parameter once. Written in place."""
    whole: Mapping[str, Tensor]
    """The whole model's state, for shapes and dtypes; on a pipeline stage ``state`` has a part of its keys."""
    model: HFCausalLM  # The model that ``whole`` is the state of
    part: int  # Index of the pipeline stage of ``state``
    names: KeyNames
    config: PreTrainedConfig


def seed_target(model: HFCausalLM, state: Mapping[str, Tensor], config: PreTrainedConfig) -> SeedTarget:
    """Describe a model with its heads, parallelised or on meta, or the last of a rank's stages; ``state`` has no tied name.

    The description has the names of sources, which adapters change in the model.
    """
    whole, full, state = model.whole, whole_state(model, state), in_source_names(model, state)
    shapes = {key: tuple(tensor.shape) for key, tensor in full.items()}
    names = key_names(whole, shapes | {name: shapes[key] for name, key in whole.tied_keys.items()})
    return SeedTarget(state, full, whole, model.stage.index, names, config)


def whole_state(model: HFCausalLM, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return ``state``, or on a pipeline stage the whole model's on meta, by source names; each tied parameter stands once."""
    whole = model.whole
    if whole is not model:
        state = {key: tensor for key, tensor in whole.state_dict().items() if key not in whole.tied_keys}
    return in_source_names(model, state)


def in_source_names(model: HFCausalLM, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of a model, or of its stages, by the names that sources have."""
    return {model.whole.source_name(key): tensor for key, tensor in state.items()}


def key_names(model: HFCausalLM, shapes: dict[str, tuple[int, ...]]) -> KeyNames:
    """Return the model's key names; ``shapes`` has the full tensors' by every name."""

    def ignored(names: set[str]) -> set[str]:
        info = LoadStateDictInfo(set(), set(names), set(), [], {}, set())
        model._adjust_missing_and_unexpected_keys(info)
        return names - info.unexpected_keys

    return KeyNames(shapes, model.weight_transforms, model.base_model_prefix, ignored, model.config)
