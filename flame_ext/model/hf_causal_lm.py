"""Any decoder-only causal LM of transformers, with its own modelling code, as a torchtitan model.

The model *is* the Hugging Face module: its class gets :class:`HFCausalLM` mixed in, so parameter names are exactly the
Hugging Face ones and every architecture's own ``forward`` runs. What the mixin adds is what the host's trainer asks
for (meta initialisation, ``layers``, ``init_weights``), the state that no state dict holds, and the heads.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightTransform, revert_weight_conversion

from flame_ext.config.sections import HeadOptimization
from flame_ext.errors import ConfigError
from flame_ext.hf_config import load_hf_config
from flame_ext.model.attention import BOOLEAN_ATTENTION, attention_options
from flame_ext.model.context_parallel import ContextParallel
from flame_ext.model.initialisation import ParameterInit

POISON_VARIABLE = "FLAME_EXT_POISON_PARAMETERS"


@dataclass
class HFModelArgs(BaseModelArgs):
    """The model's arguments are its ``config.json``; the host logs this dataclass as JSON."""

    hf_assets_path: str = ""
    trust_remote_code: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        self.hf_assets_path = job_config.model.hf_assets_path
        self.trust_remote_code = job_config.seed.trust_remote_code
        self.config = json.loads(self.load().to_json_string())

    def load(self) -> PreTrainedConfig:
        """A fresh configuration object, as transformers reads it."""
        return load_hf_config(self.hf_assets_path, self.trust_remote_code)

    def get_nparams_and_flops(self, model: HFCausalLM, seq_len: int) -> tuple[int, int]:
        """Parameters (tied ones once), and floating point operations per token of forward and backward.

        6 for each weight that multiplies, plus the attention scores and values, causal sparsity not counted (PaLM,
        https://arxiv.org/abs/2204.02311, appendix B, as the host counts). The output embedding multiplies even where
        it is tied; the input embedding does not. The gradient-free forward of the future encoder is not counted.
        """
        config = self.load().get_text_config()
        nparams = sum(p.numel() for p in model.parameters())
        lookup = model.get_input_embeddings().weight
        output = model.get_output_embeddings()
        multiplying = nparams - (0 if output is not None and output.weight is lookup else lookup.numel())
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return nparams, 6 * multiplying + 12 * config.num_hidden_layers * heads * head_dim * seq_len


@dataclass(frozen=True)
class Stage:
    """Which stage of a pipeline a model is."""

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


class HFCausalLM(nn.Module):
    """Mixin over a transformers ``...ForCausalLM``; see :func:`build_hf_causal_lm`.

    Attributes:
        model_args: the host's arguments.
        head_names: children that are not the backbone's, in the order they were added.
        head_optimization: name of a head to how its parameters are optimised, where that is not as the backbone's.
        parameter_inits: name of a head's parameter to its initialisation.
        tied_keys: name of a tied parameter to the name that the state dict keeps, e.g. lm_head to the embedding.
        computed_buffers: names of the buffers that are in no state dict (RoPE frequencies and the like).
        weight_transforms: what transformers does to the keys of this architecture's files while loading.
        own_attention: name of transformers' attention that the backbone runs with where it makes its own masks.
        context: the parts of sequences that ranks have; None = whole ones.
        stage: of a pipeline; None = the whole model.
        of_whole: the model, on meta, that this is a stage of, in a tuple, since it is no child.
    """

    # Of the class that this one is mixed into.
    config: PreTrainedConfig
    base_model: Any
    base_model_prefix: str
    get_input_embeddings: Callable[[], Any]
    get_output_embeddings: Callable[[], Any]
    set_requires_gradient_sync: Callable[[bool], None]  # of torch's DDP and FSDP

    # Heads; those that there are stand in head_names.
    future_encoder: Any
    future_predictor: Any
    action_layer: Any

    model_args: HFModelArgs
    weight_transforms: tuple[WeightTransform, ...]
    head_names: list[str]
    head_optimization: dict[str, HeadOptimization]
    parameter_inits: dict[str, ParameterInit]
    tied_keys: dict[str, str]
    computed_buffers: list[str]
    own_attention: str
    context: ContextParallel | None = None
    stage: Stage | None = None
    of_whole: tuple[HFCausalLM, ...] = ()

    @property
    def whole(self) -> HFCausalLM:
        """All of the model, for names, shapes and configuration: itself, or on a pipeline's stage the model on meta."""
        return self.of_whole[0] if self.of_whole else self

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, where the host applies activation checkpointing and compilation."""
        depth = self.config.get_text_config().num_hidden_layers
        for module in self.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise ConfigError(
            f"{type(self).__name__} has no list of {depth} decoder layers; this architecture is not supported"
        )

    @property
    def vocabulary_keys(self) -> set[str]:
        """Names of the parameters with one row for each token: the embeddings' weights, and a bias of the output's."""
        modules = [m for m in (self.get_input_embeddings(), self.get_output_embeddings()) if m is not None]
        owned = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
        return {name for name, parameter in self.named_parameters() if id(parameter) in owned}

    def file_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """The model's keys to those that its architecture's files have, as ``save_pretrained`` writes them."""
        marked = {key: torch.tensor(number) for number, key in enumerate(keys)}
        names = {
            int(number): name for name, number in revert_weight_conversion(cast(PreTrainedModel, self), marked).items()
        }
        return {key: names[int(number)] for key, number in marked.items()}

    def add_head(self, name: str, head: nn.Module, inits: dict[str, ParameterInit]) -> None:
        """Attach a module beside the backbone; its parameters are named ``name.…`` and initialised by ``inits``.

        Raises:
            ConfigError: if a parameter has no initialisation, or the backbone has something of this name.
        """
        missing = [n for n, _ in head.named_parameters() if n not in inits]
        if missing:
            raise ConfigError(f"head {name!r}: parameter_inits() has no initialisation for {', '.join(missing)}")
        if hasattr(self, name):
            raise ConfigError(f"head {name!r}: {type(self).__name__} has an attribute of this name; rename the head")
        self.add_module(name, head)
        self.head_names.append(name)
        self.parameter_inits.update({f"{name}.{n}": init for n, init in inits.items()})

    def remember_state(self) -> None:
        """Note, before parallelisation, what the host's ``to_empty`` is going to lose: ties, and buffers by value.

        Modules are noted rather than names, because wrappers change the names; values rather than recipes, because
        which buffers there are, and how they are computed, differs between architectures and versions.
        """
        owners: dict[int, tuple[str, nn.Module, str]] = {}
        self._ties = []
        self._buffer_values = []
        self.tied_keys = {}
        self.computed_buffers = []
        for prefix, module in self.named_modules():
            for name, parameter in module._parameters.items():
                key = f"{prefix}.{name}".lstrip(".")
                owner = owners.setdefault(id(parameter), (key, module, name)) if parameter is not None else None
                if owner is not None and owner[0] != key:
                    self._ties.append((module, name, owner[1], owner[2]))
                    self.tied_keys[key] = owner[0]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self._buffer_values.append((module, name, buffer.clone()))
                    if name in module._non_persistent_buffers_set:
                        self.computed_buffers.append(f"{prefix}.{name}".lstrip("."))

    @property
    def tied_modules(self) -> set[nn.Module]:
        """Modules that share a parameter with another one."""
        return {module for tie in self._ties for module in (tie[0], tie[2])}

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Called by the host after ``to_empty``: put buffers and ties back.

        Parameters are left as they are: seeding or resuming writes every element and accounts for it, so a random
        initialisation of the backbone would only be overwritten. With the environment variable
        ``FLAME_EXT_POISON_PARAMETERS`` set they are NaN first, so that tests see anything that was not written.
        """
        if os.environ.get(POISON_VARIABLE):
            for parameter in self.parameters():
                parameter.detach().fill_(float("nan"))
        device = buffer_device or next(self.parameters()).device
        for module, name, value in self._buffer_values:
            module._buffers[name] = value.to(device=device, copy=True)
        self.restore_ties()

    def restore_ties(self) -> None:
        """Make tied parameters one again, after each was replaced by itself."""
        for module, name, owner, owner_name in self._ties:
            module._parameters[name] = owner._parameters[owner_name]

    def get_attention_masks(self, *args: Any, **kwargs: Any) -> Any:
        """The host's validator takes a TypeError for "this model makes its own masks"."""
        raise TypeError("masks are made by the model's own forward")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output: Literal["logits", "hidden_states"] = "logits",
        compute: Callable[[Tensor, Tensor], Any] | None = None,
        part_of_sequence: bool = False,
    ) -> Any:
        """One forward of the backbone, and of what ``compute`` does with its results.

        FSDP gathers the parameters of heads and embeddings only while the root module's forward runs, so whatever uses
        them has to run in here.

        Args:
            input_ids: (B, T); on a later stage of a pipeline (B, T, D), what the stage before gave.
            attention_mask: None = causal; or (B or 1, 1, T, T), true where attention is allowed, as a bool tensor or a
                ``BlockMask``; or (B or 1, n, C, K) bool, see :func:`flame_ext.model.attention.boolean_attention`; or a
                dict of them by layer type, no ``BlockMask`` beside a tensor.
            position_ids: (B, T); None = 0..T-1.
            output: "logits" (B, T, V), or "hidden_states" (B, T, D), after the final norm, without running the output
                embedding.
            compute: called with logits and hidden states; what it returns is returned. A stage that is not the last one
                gives hidden states (B, T, D), whatever is asked of the whole.
            part_of_sequence: of context parallelism. T is the number of this rank's positions, which ``position_ids`` are; the
                columns of ``attention_mask`` are for all positions, in the order of :meth:`ContextParallel.order`. Collective.
        """
        stage = self.stage
        inputs = {
            "input_ids" if stage is None or stage.is_first else "inputs_embeds": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": False,
        }
        name = self._attention_for(attention_mask)
        # It stays until the next forward: activation checkpointing runs the layers again in the backward.
        self.base_model.config._attn_implementation = ContextParallel.attention_name(name) if part_of_sequence else name
        if output == "hidden_states" or (stage is not None and not stage.is_last):
            return self.base_model(**inputs).last_hidden_state
        if compute is None:
            return super().forward(**inputs).logits
        # The architecture's own forward does more than lm_head(hidden) (soft-capping, scaling): run it as it is, and
        # pick up the last hidden state on its way from the base model.
        captured: list[Tensor] = []
        hook = self.base_model.register_forward_hook(lambda _m, _i, result: captured.append(result.last_hidden_state))
        try:
            logits = super().forward(**inputs).logits
        finally:
            hook.remove()
        return compute(logits, captured.pop())

    def _attention_for(self, mask: Any) -> str:
        """The attention that understands ``mask``: the backbone's own for None."""
        masks = mask.values() if isinstance(mask, dict) else [mask]
        if any(isinstance(mask, BlockMask) for mask in masks):
            return "flex_attention"
        if any(mask is not None and (self.own_attention != "sdpa" or mask.shape[1] > 1) for mask in masks):
            return BOOLEAN_ATTENTION
        return self.own_attention


def build_hf_causal_lm(model_args: HFModelArgs) -> HFCausalLM:
    """Build the model of ``config.json``: parameters on meta, buffers computed for real (on CPU).

    Raises:
        ConfigError: if the configuration is not one of a causal LM.
    """
    config = model_args.load()
    try:
        with torch.device("cpu"), parameters_on_meta():
            model: Any = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.get_default_dtype(),
                trust_remote_code=model_args.trust_remote_code,
                **attention_options(config),
            )
    except ValueError as e:
        raise ConfigError(f"model.hf_assets_path {model_args.hf_assets_path!r}: {str(e).splitlines()[0]}") from e
    # Asked for before the class changes: transformers takes a class from elsewhere for one that it knows nothing of.
    model.weight_transforms = tuple(get_model_conversion_mapping(model))
    # What save_pretrained takes back: not the renamings of old files, and no prefix that its files never had.
    model._weight_conversions = [
        transform
        for transform in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(transform, PrefixChange)
    ]
    model_class: Any = type(model)
    model.__class__ = _with_training_interface(model_class)
    model.model_args = model_args
    model.own_attention = model.base_model.config._attn_implementation
    model.head_names = []
    model.head_optimization = {}
    model.parameter_inits = {}
    model.remember_state()
    return model


@functools.cache
def _with_training_interface(cls: type[PreTrainedModel]) -> type[HFCausalLM]:
    return type(f"Titan{cls.__name__}", (HFCausalLM, cls), {})


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device as it is registered; buffers stay where they are made."""

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied parameter is registered again and must stay one object
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation has hooks return nothing; its documentation lets them return a parameter.
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
