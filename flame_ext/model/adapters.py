"""Adapters of low rank (LoRA, https://arxiv.org/abs/2106.09685), which peft puts around linear layers of the decoder layers, in place.

A layer's own weight is then called ``….base_layer.weight``; :meth:`HFCausalLM.source_name` takes that out again.
"""

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchtitan.tools.logging import logger

from flame_ext.config.sections import ALL_LINEAR, Lora
from flame_ext.errors import ConfigError
from flame_ext.model.hf_causal_lm import BASE_LAYER, Adapters, HFCausalLM
from flame_ext.model.initialisation import Constant, Uniform
from flame_ext.model.parameters import parameters_of, parameters_on_meta

CONVERTER_NAME = "lora"
"""The model converter that adds the adapters."""

OPTION = f"model.converters {CONVERTER_NAME!r}"
PEFT_PREFIX = "base_model.model."  # of keys in peft's files
KEY_A, KEY_B = "lora_A.default.weight", "lora_B.default.weight"


def import_peft() -> Any:
    """Returns the module; raises a ConfigError where it is not installed."""
    try:
        import peft
    except ImportError as e:
        raise ConfigError(f"{OPTION} needs peft ({e}): pip install 'flame_ext[lora]'") from e
    return peft


def add_adapters(model: HFCausalLM, options: Lora) -> None:
    """Adds adapters to a whole model on meta, before its heads are attached, and freezes everything else, in place.

    Raises a ConfigError if a name in ``options.target_modules`` is not that of linear layers in the decoder layers.
    """
    peft = import_peft()
    config = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        target_modules=_targets(model, options.target_modules, peft),
        task_type="CAUSAL_LM",
    )
    base = dict(model.named_parameters(remove_duplicate=False))
    if taken := [name for name in base if f".{BASE_LAYER}." in name or ".lora_" in name]:
        raise ConfigError(f"{OPTION}: {model.architecture} has parameters of such names itself: {taken[0]}")
    try:
        with parameters_on_meta():
            peft.inject_adapter_in_model(config, model)
    except ImportError as e:  # which it raises at the first layer, of a torchao that it cannot use
        raise ConfigError(f"{OPTION}: peft: {str(e).rstrip('.')}; update or uninstall it") from e
    except ValueError as e:
        raise ConfigError(f"lora.target_modules {options.target_modules} with {model.architecture}: peft: {e}") from e
    layers = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    _require_linear(model, layers, peft.tuners.lora.Linear)
    keys = []
    for name, layer in layers.items():
        # peft's: Kaiming-uniform with a = sqrt(5), and zeros, with which step 0 is the source.
        for key, init in ((KEY_A, Uniform(1 / math.sqrt(layer.in_features))), (KEY_B, Constant(0.0))):
            keys.append(f"{name}.{key}")
            model.parameter_inits[keys[-1]] = init
    (scaling,) = {layer.scaling["default"] for layer in layers.values()}
    model.adapters = Adapters(tuple(keys), scaling, _as_data(config), OPTION)
    model.frozen |= dict.fromkeys(base, OPTION)
    model.remember_state()
    count = sum(model.get_parameter(key).numel() for key in keys)
    logger.info(
        f"Added adapters of rank {options.r} to {len(layers)} linear layers: {count:,} parameters, beside which the "
        f"{parameters_of(model) - count:,} of {model.architecture} stay as the source has them"
    )


def _targets(model: HFCausalLM, names: list[str], peft: Any) -> list[str]:
    """Returns the names of layers to give to peft, which takes ends of full names; raises a ConfigError if one fits no linear layer of
    the decoder layers, or stacked experts as well.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    within = {id(module) for layer in model.layers for module in layer.modules()}
    inside = {name for name in linear if id(model.get_submodule(name)) in within}
    known, others = ({name.rpartition(".")[2] for name in some} for some in (inside, linear - inside))
    if not inside:
        raise ConfigError(
            f"{OPTION}: {model.architecture} has no nn.Linear in its decoder layers, and others are not supported"
        )
    stacked = _names_of_experts(model, known, peft)
    usable = known - stacked
    if names == [ALL_LINEAR]:
        if left_out := sorted(name for name in inside if name.rpartition(".")[2] in stacked):
            logger.info(
                f"lora.target_modules: {len(left_out)} linear layers of {model.architecture} get no adapter, such as {left_out[0]}: "
                f"peft takes {', '.join(sorted(stacked))} for the stacked experts"
            )
        return sorted(inside - {*left_out} if usable & others else usable)
    if taken := [name for name in names if name.rpartition(".")[2] in stacked]:
        raise ConfigError(
            f"lora.target_modules: peft takes {', '.join(taken)} of {model.architecture} for its stacked experts, which cannot have "
            f"adapters here; lora.target_modules = {json.dumps(sorted(usable))} works"
        )
    for name in names:
        if not any(f".{full}".endswith(f".{name}") for full in inside):
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)
            raise ConfigError(
                f"lora.target_modules: no linear layer in the decoder layers of {model.architecture} is called {name!r}; names are "
                f"{', '.join(close)}"
            )
    return list(names)


def _names_of_experts(model: HFCausalLM, names: set[str], peft: Any) -> set[str]:
    """Returns the names that peft changes into those of stacked experts, by whatever path: each expert had such layers before
    transformers 5. It would do so again to the export.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_kept(name: str) -> bool:
        config = peft.LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # layers that are stacked as one, such as gate_proj and up_proj, go together
            return False
        return set(config.target_modules) == {name}

    return {name for name in names if not is_kept(name)}


def _require_linear(model: HFCausalLM, layers: Mapping[str, nn.Module], kind: Any) -> None:
    """Raises a ConfigError if peft has put adapters around what is no plain linear layer of a decoder layer."""
    within = {id(module) for layer in model.layers for module in layer.modules()}
    for name, layer in layers.items():
        why = "" if id(layer) in within else "it lies outside of the decoder layers"
        if type(layer) is not kind or not isinstance(layer.base_layer, nn.Linear):
            why = f"it is no plain linear layer ({type(layer).__name__})"
        if why:
            raise ConfigError(
                f"lora.target_modules: {name!r} of {model.architecture} cannot have an adapter here: {why}"
            )


def _as_data(config: Any) -> dict[str, Any]:
    """Returns the content of ``adapter_config.json``, but for the name of the base model."""
    data = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return data | {"inference_mode": True}


def is_adapter(key: str) -> bool:
    """Returns whether a key is that of an adapter's parameter, in a model that has adapters."""
    return key.endswith((f".{KEY_A}", f".{KEY_B}"))


def name_in_peft(key: str) -> str:
    """Returns the name under which peft's files have an adapter's parameter."""
    return f"{PEFT_PREFIX}{key.replace('.default.', '.')}"
