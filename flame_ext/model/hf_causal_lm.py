"""Any decoder-only causal LM of transformers as a torchtitan model: the Hugging Face module itself, with a mixin.

Parameter names and ``forward`` are the architecture's own. The mixin adds what torchtitan asks for, and the heads.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightTransform

from flame_ext.config.head_options import HeadOptimization
from flame_ext.config.model_config import grown_vocabulary
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.hf_config import load_hf_config
from flame_ext.host.names import BaseModelArgs
from flame_ext.model.attention import BOOLEAN_ATTENTION, attention_options, choose_kernels, positions_in_order
from flame_ext.model.context_parallel import WHOLE, ContextParallel, SequenceParts
from flame_ext.model.initialisation import ParameterInit
from flame_ext.model.parameters import attention_multiplications, parameters_of, parameters_on_meta
from flame_ext.model.routing import RouteListener, Routing, first_router, prepare_routers, resting_parameters

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


@dataclass
class HFModelArgs(BaseModelArgs):
    """The model's ``config.json``; torchtitan logs this dataclass as JSON."""

    hf_assets_path: str = ""
    trust_remote_code: bool = False
    experts_implementation: str = "auto"  # these three are those of the options [moe]
    aux_loss_coef: float | None = None
    freeze_router: bool = False
    vocab_size: int | None = None  # of a vocabulary that has grown; None = that of config.json
    config: dict[str, Any] = field(default_factory=dict)
    option: str = "model.hf_assets_path"  # that names the folder

    def update_from_config(self, job_config: FlameJobConfig, **kwargs: Any) -> None:
        self.hf_assets_path = job_config.model.hf_assets_path
        self.trust_remote_code, moe = job_config.seed.trust_remote_code, job_config.moe
        self.experts_implementation, self.aux_loss_coef = moe.experts_implementation, moe.aux_loss_coef
        self.freeze_router, self.vocab_size = moe.freeze_router, grown_vocabulary(job_config)
        self.config = json.loads(self.load().to_json_string())

    def load(self) -> PreTrainedConfig:
        config = load_hf_config(self.hf_assets_path, self.trust_remote_code, self.option)
        if self.experts_implementation != "auto":
            config._experts_implementation = self.experts_implementation
        if self.vocab_size is not None:
            config.get_text_config().vocab_size = self.vocab_size
        return config

    def get_nparams_and_flops(self, model: HFCausalLM, seq_len: int) -> tuple[int, int]:
        """Counts parameters (tied ones once) and floating point operations per token of the student's forward and backward.

        As in torchtitan, 6 for each weight that multiplies a token, which those of the input embedding and of the experts that the
        token does not go to do not, plus the attention scores and
        values without causal sparsity (PaLM, https://arxiv.org/abs/2204.02311, appendix B). Heads say themselves how often they
        multiply.
        """
        config = self.load().get_text_config()
        nparams = parameters_of(model)
        lookup, output = model.get_input_embeddings().weight, model.get_output_embeddings()
        multiplying = nparams - (0 if output is not None and output.weight is lookup else lookup.numel())
        multiplying -= sum(model.get_parameter(name).numel() for name in model.beside_text)
        multiplying -= resting_parameters(model)
        for name, head in model.heads.items():
            multiplying += head.multiplications - parameters_of(model.get_submodule(name))
        return nparams, 6 * (multiplying + config.num_hidden_layers * attention_multiplications(config, seq_len))


Unembed = Callable[[Tensor], Tensor]
"""(B, T, D) states after the final norm to (B, T, V) logits, a DTensor under loss parallelism, by the architecture's own code."""


@dataclass(frozen=True)
class Stage:
    """The place of a model in a pipeline."""

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


@dataclass(frozen=True)
class AttachedHead:
    """A head as parallelisms and optimizers see it."""

    optimization: HeadOptimization = field(default_factory=HeadOptimization)
    multiplications: int = 0  # of a forward of its loss, for each token
    uses_embedding: bool = False  # its loss looks tokens up in the input embedding
    uses_unembedding: bool = False  # its loss makes logits of states of its own
    needs_logits: bool = False  # its loss reads the logits, so tensor parallelism must not leave them sharded
    tensor_parallel_plan: Mapping[str, ParallelStyle] = field(default_factory=dict)  # modules left out are replicated


BASE_LAYER = "base_layer"  # the name that peft gives a layer inside of the one that it puts around it


@dataclass(frozen=True)
class Adapters:
    """Adapters at linear layers, as seeding, steps and exports see them."""

    keys: tuple[str, ...]  # of their parameters
    scaling: float  # a merged weight is W + scaling · B A
    config: Mapping[str, Any]  # as peft writes it
    option: str  # that freezes the backbone


class LossOutput(NamedTuple):
    """The result of the student's forward in training: () local sums over numbers of the whole step."""

    loss: Tensor  # optimised
    parts: dict[str, Tensor]  # detached, only reported


class HFCausalLM(nn.Module):
    """Mixin over a transformers ``...ForCausalLM``; see :func:`build_hf_causal_lm`."""

    # Attributes of the class that this one is mixed into, and of torch's DDP and FSDP.
    config: PreTrainedConfig
    base_model: Any
    base_model_prefix: str
    get_input_embeddings: Callable[[], Any]
    get_output_embeddings: Callable[[], Any]
    set_requires_gradient_sync: Callable[[bool], None]
    _adjust_missing_and_unexpected_keys: Callable[[Any], None]

    model_args: HFModelArgs
    beside_text: tuple[str, ...]  # names of a multimodal model's parameters that text does not reach; they are frozen
    weight_transforms: tuple[WeightTransform, ...]  # with which transformers loads files of this architecture
    heads: dict[str, AttachedHead]  # by name of the child module, in the order in which they were added
    parameter_inits: dict[str, ParameterInit]  # by name of a head's parameter
    frozen: dict[str, str]  # by name, the option that keeps a parameter as the source has it
    tied_keys: dict[str, str]  # a tied parameter's name, e.g. of lm_head, to the one that the state dict keeps
    computed_buffers: list[str]  # names of the buffers that are in no state dict (RoPE frequencies and the like)
    own_attention: str  # transformers' name of the attention that the backbone uses with its own masks
    context: SequenceParts = WHOLE  # a ContextParallel splits sequences over ranks
    routing: Routing = Routing()  # the routers of the whole model; none in a dense one
    adapters: Adapters | None = None  # beside which only heads are trained
    stage: Stage = Stage(0, 1)  # the whole model is the only stage
    of_whole: tuple[HFCausalLM, ...] = ()  # the whole model; in a tuple, so that it does not become a child

    @property
    def whole(self) -> HFCausalLM:
        """The whole model, for names, shapes and configuration; on a stage of a pipeline it is on meta."""
        return self.of_whole[0] if self.of_whole else self

    def source_name(self, key: str) -> str:
        """Returns the name by which sources have a parameter or buffer, which is its own but for the layers that have adapters."""
        return key if self.adapters is None else key.replace(f".{BASE_LAYER}.", ".")

    def is_left_to_source(self, key: str) -> bool:
        """Returns whether steps do not hold a parameter: one of the backbone, beside adapters."""
        return self.adapters is not None and self.frozen.get(self.source_name(key)) == self.adapters.option

    @property
    def architecture(self) -> str:
        """The name of the class in transformers, as in ``architectures`` of ``config.json``."""
        return type(self).__name__.removeprefix("Titan")

    @property
    def text_backbone(self) -> Any:
        """The part of the backbone that reads tokens: all of it, unless the model is multimodal."""
        if self.config.get_text_config() is self.config:
            return self.base_model
        return cast(PreTrainedModel, self).get_decoder()

    @property
    def _before_logits(self) -> nn.Module:
        """The module that the architecture's own forward calls before it makes logits: the backbone, or its decoder, as in OPT."""
        return getattr(self.base_model, "decoder", self.base_model)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the backbone."""
        depth = self.config.get_text_config().num_hidden_layers
        for module in self.text_backbone.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise ConfigError(f"{type(self).__name__} has no list of {depth} decoder layers; it is not supported")

    @property
    def layer_lists(self) -> list[nn.ModuleList]:
        """The decoder layers, and those of heads."""
        of_heads = (getattr(self.get_submodule(name), "layer_lists", ()) for name in self.heads)
        return [self.layers, *chain.from_iterable(of_heads)]

    @property
    def vocabulary_keys(self) -> set[str]:
        """Names of the parameters with a row for each token: the embeddings' weights, and the output embedding's bias."""
        modules = [m for m in (self.get_input_embeddings(), self.get_output_embeddings()) if m is not None]
        owned = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
        return {name for name, parameter in self.named_parameters() if id(parameter) in owned}

    def add_head(
        self, name: str, head: nn.Module, inits: dict[str, ParameterInit], attached: AttachedHead | None = None
    ) -> None:
        """Attaches a module beside the backbone; its parameters are named ``name.…`` and initialised by ``inits``.

        Raises a ConfigError if a parameter has no initialisation, or the backbone has an attribute of this name.
        """
        missing = [n for n, _ in head.named_parameters() if n not in inits]
        if missing:
            raise ConfigError(f"head {name!r}: parameter_inits() has no initialisation for {', '.join(missing)}")
        if hasattr(self, name):
            raise ConfigError(f"head {name!r}: {type(self).__name__} has an attribute of this name; rename the head")
        self.add_module(name, head)
        self.heads[name] = attached or AttachedHead()
        self.parameter_inits.update({f"{name}.{n}": init for n, init in inits.items()})

    def remember_state(self) -> None:
        """Records, before parallelisation, what torchtitan's ``to_empty`` will lose: ties, and the values of buffers.

        Ties are recorded by module, since wrappers change names, and buffers by value, since architectures and versions
        compute them differently.
        """
        owners: dict[int, tuple[str, nn.Module, str]] = {}
        self._ties, self._buffer_values, self.tied_keys, self.computed_buffers = [], [], {}, []
        for prefix, module in self.named_modules():
            for key, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                name = key.rpartition(".")[2]
                owner_key, owner, owner_name = owners.setdefault(id(parameter), (key, module, name))
                if owner_key != key:
                    self._ties.append((module, name, owner, owner_name))
                    self.tied_keys[key] = owner_key
            for key, buffer in module.named_buffers(prefix, recurse=False, remove_duplicate=False):
                name = key.rpartition(".")[2]
                self._buffer_values.append((module, name, buffer.clone()))
                if name in module._non_persistent_buffers_set:
                    self.computed_buffers.append(key)

    @property
    def tied_modules(self) -> set[nn.Module]:
        """The modules that share a parameter with another one."""
        return {module for tie in self._ties for module in tie if isinstance(module, nn.Module)}

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Restores buffers and ties; torchtitan calls it after ``to_empty``.

        Parameters are left to seeding or resuming; ``FLAME_EXT_POISON_PARAMETERS`` makes them NaN, to find what is not written.
        """
        if os.environ.get("FLAME_EXT_POISON_PARAMETERS"):
            for parameter in self.parameters():
                parameter.detach().fill_(float("nan"))
        device = buffer_device or next(self.parameters()).device
        for module, name, value in self._buffer_values:
            module._buffers[name] = value.to(device=device, copy=True)
        self.restore_ties()

    def restore_ties(self) -> None:
        """Makes tied parameters one object again, after each of them was replaced."""
        for module, name, owner, owner_name in self._ties:
            module._parameters[name] = owner._parameters[owner_name]

    def get_attention_masks(self, *args: Any, **kwargs: Any) -> Any:
        """Raises the TypeError that tells torchtitan's validator that the model makes its own masks."""
        raise TypeError("masks are made by the model's own forward")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output: Literal["logits", "hidden_states"] = "logits",
        compute: Callable[[Tensor, Tensor, Unembed], Any] | None = None,
        part_of_sequence: bool = False,
        routes: RouteListener | None = None,
    ) -> Any:
        """Runs the backbone, and ``compute`` on its results: FSDP gathers heads and embeddings only while this runs.

        Args:
            input_ids: (B, T); on a later stage of a pipeline the (B, T, D) hidden states of the stage before.
            attention_mask: None = causal; or (B or 1, 1, T, T), true where attention is allowed, as a bool tensor or a
                ``BlockMask``; or (B or 1, n, C, K) bool, see :func:`flame_ext.model.attention.boolean_attention`; or a
                dict of them by layer type, all tensors or all ``BlockMask``.
            position_ids: (B, T); None = 0..T-1.
            output: "logits" (B, T, V), or "hidden_states" (B, T, D) after the final norm, as on all stages but the last.
            compute: called with logits, hidden states and what maps such states to logits; its result is returned instead.
            part_of_sequence: whether the inputs are this rank's part of the sequences. Then the columns of
                ``attention_mask`` are in the order of :meth:`ContextParallel.order`, and the call is collective.
            routes: what the routers of a mixture report to; None = nothing.
        """
        with ExitStack() as entered:
            if routes is not None:
                entered.enter_context(routes.heard(first_router(self)))
            if attention_mask is None:
                entered.enter_context(positions_in_order())
            return self._run(input_ids, attention_mask, position_ids, output, compute, part_of_sequence)

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        output: str,
        compute: Callable[[Tensor, Tensor, Unembed], Any] | None,
        part_of_sequence: bool,
    ) -> Any:
        if attention_mask is not None and position_ids is None:
            # OPT would count them from a mask, which it takes for one of padding.
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        inputs = {
            "input_ids" if self.stage.is_first else "inputs_embeds": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": False,
        }
        name = self._attention_for(attention_mask)
        # Both settings stay until the next forward, since activation checkpointing runs the layers again in the backward.
        choose_kernels(self.config, attention_mask, input_ids.shape[1])
        self.base_model.config._attn_implementation = ContextParallel.attention_name(name) if part_of_sequence else name
        if output == "hidden_states" or not self.stage.is_last:
            return self.base_model(**inputs).last_hidden_state
        if compute is None:
            return super().forward(**inputs).logits
        # The architecture's own forward may do more than lm_head(hidden), e.g. soft-capping: run it, and capture the hidden.
        captured: list[Any] = []
        hook = self._before_logits.register_forward_hook(lambda _m, _i, result: captured.append(result))
        try:
            logits = super().forward(**inputs).logits
        finally:
            hook.remove()
        result = captured.pop()
        return compute(logits, result.last_hidden_state, functools.partial(self._unembed, type(result)))

    def _unembed(self, result_class: Any, hidden_states: Tensor) -> Tensor:
        """Runs the architecture's own forward with (B, T, D) states as what the backbone returns, in a ``result_class``."""
        with _replaced_forward(self._before_logits, result_class(last_hidden_state=hidden_states)):
            return super().forward(inputs_embeds=hidden_states, use_cache=False).logits

    def _attention_for(self, mask: Any) -> str:
        """Returns the name of the attention that takes ``mask``: the backbone's own for None."""
        masks = mask.values() if isinstance(mask, dict) else [mask]
        if any(isinstance(mask, BlockMask) for mask in masks):
            return "flex_attention"
        if any(mask is not None and (self.own_attention != "sdpa" or mask.shape[1] > 1) for mask in masks):
            return BOOLEAN_ATTENTION
        return self.own_attention


def build_hf_causal_lm(model_args: HFModelArgs) -> HFCausalLM:
    """Builds the model of ``config.json``, with parameters on meta and real buffers on the CPU.

    Raises a ConfigError if the configuration is not that of a causal LM.
    """
    config = model_args.load()
    try:
        with parameters_on_meta():
            model: Any = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.get_default_dtype(),
                trust_remote_code=model_args.trust_remote_code,
                **attention_options(config),
            )
    except Exception as e:  # what an architecture makes of a value that it cannot take may be anything
        reason = next(iter(str(e).splitlines()), "no reason given")
        text = config.get_text_config()
        pad, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
            reason = f"pad_token_id {pad} is no row of its embedding (vocab_size {size}); set pad_token_id to null"
        raise ConfigError(
            f"{model_args.option} {model_args.hf_assets_path!r}: no causal LM can be built from config.json: {reason}"
        ) from e
    # Read before the class changes, since transformers knows no conversions for a class from outside.
    model.weight_transforms = tuple(get_model_conversion_mapping(model))
    # The transforms that save_pretrained reverts: without renamings of old files, and without prefixes.
    current = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [transform for transform in current if not isinstance(transform, PrefixChange)]
    model_class: Any = type(model)
    model.__class__ = _with_training_interface(model_class)
    model.own_attention = model.base_model.config._attn_implementation
    model.model_args, model.heads, model.parameter_inits, model.frozen = model_args, {}, {}, {}
    model.beside_text = _freeze_beside_text(model)
    model.routing = prepare_routers(model, model_args.aux_loss_coef, model_args.freeze_router)
    model.remember_state()
    return model


@contextmanager
def _replaced_forward(module: nn.Module, result: Any) -> Iterator[None]:
    """While this is entered, a call of ``module`` runs nothing and returns ``result``."""
    module.forward = lambda *_args, **_kwargs: result
    try:
        yield
    finally:
        del module.forward


def _freeze_beside_text(model: HFCausalLM) -> tuple[str, ...]:
    """Freezes the parameters that get no gradient from text, such as an image encoder's, and returns their names."""
    if (text := model.text_backbone) is model.base_model:
        return ()
    parts = (text, model.get_input_embeddings(), model.get_output_embeddings())
    reached = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    beside = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in reached}
    for parameter in beside.values():
        parameter.requires_grad_(False)
    return tuple(beside)


@functools.cache
def _with_training_interface(cls: type[PreTrainedModel]) -> type[HFCausalLM]:
    return type(f"Titan{cls.__name__}", (HFCausalLM, cls), {})
