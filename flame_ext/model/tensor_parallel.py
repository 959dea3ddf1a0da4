"""Tensor parallelism for :class:`HFCausalLM`, by the plan that transformers has for the architecture.

A plan names linear layers and embeddings, and how each is split. Between them the architecture's own code runs on plain
local tensors, as it would on one device: with fewer heads, with a slice of the MLP, and, under sequence parallelism,
between the blocks with a slice of the sequence. What no plan names has all its values on every rank.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torchtitan.tools.logging import logger
from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

from flame_ext.model.hf_causal_lm import HFCausalLM


@dataclass(frozen=True)
class PlanStyle:
    """What one word of a transformers plan means."""

    build: Callable[[Placement], ParallelStyle] | None
    """The layout of activations between blocks to torch's style; None = its values are on every rank."""
    splits: str | None = None
    """The attribute of the module with the size that has to be divisible."""
    gradient_is_partial: bool = False
    """Of a module on every rank: whether each rank sees only a part of the activations."""


_colwise = PlanStyle(lambda _: ColwiseParallel(), "out_features")
_gathered = PlanStyle(lambda _: ColwiseParallel(output_layouts=Replicate()), "out_features")
_rowwise = PlanStyle(lambda between: RowwiseParallel(output_layouts=between), "in_features")
_split_input = PlanStyle(
    lambda between: RowwiseParallel(input_layouts=Replicate(), output_layouts=between), "in_features"
)
_embedding = PlanStyle(lambda _: RowwiseParallel(input_layouts=Replicate()), "num_embeddings")

# The plans' words; those of experts, packed parameters and multi-head latent attention have no counterpart here.
PLAN_STYLES: dict[str, PlanStyle] = {
    "colwise": _colwise,
    "colwise_gather_output": _gathered,
    "colwise_rep": _gathered,
    "rowwise": _rowwise,
    "rowwise_split_input": _split_input,
    "rowwise_rep": _split_input,
    "embedding_rowwise": _embedding,
    "embedding_colwise": PlanStyle(lambda _: ColwiseParallel(output_layouts=Replicate()), "embedding_dim"),
    "replicate": PlanStyle(None),
    "replicated_with_grad_allreduce": PlanStyle(None, gradient_is_partial=True),
}

# How attention code spells sizes that are not those of its part under tensor parallelism.
_HEAD_COUNT = re.compile(
    r"\bself\.(num_heads|num_attention_heads|n_heads?|num_key_value_heads|num_kv_heads|hidden_size|embed_dim|inner_dim)\b"
    r"|\bconfig\.(num_attention_heads|num_key_value_heads|hidden_size)\b"
)

# Layers that take each position by itself, by the end of their class's name: they may see a slice of the sequence.
_POSITIONWISE = ("Norm", "Linear", "Dropout", "Activation", "Identity", "SiLU", "GELU", "ReLU")


def tensor_parallel_problems(model: HFCausalLM, degree: int) -> list[str]:
    """Why a model can not be split over ``degree`` ranks, one sentence each; from its shapes, names and code alone.

    Args:
        model: whole, on meta, before any parallelism.
        degree: > 1.
    """
    where = f"parallelism.tensor_parallel_degree = {degree} with {type(model).__name__.removeprefix('Titan')}"
    # Layers are alike: what is wrong with one is said once.
    problems = dict.fromkeys(replace_layer_number_by_wildcard(problem) for problem in _problems(model, degree))
    return [f"{where}: {problem}; or scale with data_parallel_shard_degree (FSDP)" for problem in problems]


def _problems(model: HFCausalLM, degree: int) -> Iterator[str]:
    plan, blocks = _Plan.of(model), _blocks(model)
    if not blocks:
        yield "transformers has no tensor-parallel plan for its layers (base_model_tp_plan of its configuration)"
        return
    yield from plan.unknown(model)
    styles, vocabulary = plan.modules(model), _vocabulary_modules(model)
    for name, style in styles.items():
        size = getattr(model.get_submodule(name), style.splits) if style.splits else 0
        if size % degree and name in vocabulary:
            yield (
                f"the vocabulary ({size}) is not divisible; set vocab_size to a multiple of {degree} in config.json (of the source "
                "as well: resize_token_embeddings)"
            )
        elif size % degree:
            yield f"{style.splits} of {name!r} ({size}) is not divisible; lower the degree"
    text = model.config.get_text_config()
    if any(block.has_heads for block in blocks):
        for field in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(text, field, None)
            if isinstance(heads, int) and heads % degree:
                yield f"{field} ({heads}) is not divisible, and a head is computed by one rank; lower the degree"
    for key, owner in model.tied_keys.items():
        if not {styles.get(name.rpartition(".")[0]) for name in (key, owner)} <= {_gathered, _embedding}:
            yield f"{key!r} and {owner!r} are tied, but the plan splits them in different ways"
    for block in blocks:
        yield from block.problems(text.hidden_size)


def apply_tensor_parallel(model: HFCausalLM, mesh: DeviceMesh, loss_parallel: bool) -> None:
    """Split a model, or a part of one, over ``mesh``; in place, on meta. Every parameter is a DTensor on ``mesh`` after.

    Args:
        model: any of embeddings, layers and output embedding may be missing.
        mesh: of one dimension.
        loss_parallel: leave the logits split over the vocabulary, as a DTensor, where the plan splits the output
            embedding so.
    """
    blocks, obstacle = _blocks(model), _no_sequence_parallel(model)
    between: Placement = Replicate() if obstacle else Shard(1)
    output = model.get_output_embeddings()
    partial = _partial_gradients(model, blocks, obstacle is None)
    for name, style in _Plan.of(model).modules(model).items():
        module = model.get_submodule(name)
        if style.build is None:
            partial[module] = style.gradient_is_partial
            continue
        built = style.build(Replicate() if module is output else between)
        if module is output and style is _gathered and loss_parallel:
            built = ColwiseParallel(use_local_output=False)
        parallelize_module(module, mesh, built, src_data_rank=None)
        if module is model.get_input_embeddings():
            # Compiled code loses the gradient of a result that is still on its way; a copy has arrived.
            _on_output(module, torch.clone)
    for block in blocks:
        # One collective for all linear layers of the block, in the backward as well.
        _on_input(block.module, _redistribution(mesh, between, Replicate(), local=False))
    layers = _layers(model)
    if obstacle is None and layers:
        _on_input(layers[0], _redistribution(mesh, Replicate(), Shard(1), local=True))
        _on_output(layers[-1], _redistribution(mesh, Shard(1), Replicate(), local=True))
    for module in list(model.modules()):
        _replicate(module, mesh, partial.get(module, False))
    model.restore_ties()
    kinds = "sequence parallelism" if obstacle is None else f"without sequence parallelism: {obstacle}"
    logger.info(f"Applied tensor parallelism to the model ({kinds})")


# -- the plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    words: dict[str, str]
    """Name of a module, layer numbers as ``*``, to its word."""

    @classmethod
    def of(cls, model: HFCausalLM) -> _Plan:
        words = dict(getattr(model, "_tp_plan", None) or {})
        # The vocabulary is shared out whatever the plan says: tied embeddings have to be split alike.
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        for name, module in model.named_modules():
            if module is embedding:
                words.setdefault(name, "embedding_rowwise")
            elif module is output:
                words.setdefault(name, "colwise_gather_output")
        return cls(words)

    def modules(self, model: HFCausalLM) -> dict[str, PlanStyle]:
        """Name of each module of this model that the plan names to its style."""
        found = {}
        for name, module in model.named_modules():
            style = PLAN_STYLES.get(self.words.get(replace_layer_number_by_wildcard(name), ""))
            # A stage of a pipeline has something else in the place of what lies on another one.
            if style is not None and (style.splits is None or hasattr(module, style.splits)):
                found[name] = style
        return found

    def unknown(self, model: HFCausalLM) -> Iterator[str]:
        names = {replace_layer_number_by_wildcard(name) for name, _ in model.named_modules()}
        parameters = {replace_layer_number_by_wildcard(name) for name, _ in model.named_parameters()}
        for name, word in self.words.items():
            if name in names and word not in PLAN_STYLES:
                yield f"the plan of {name!r} is {word!r}, which is not supported (known: {', '.join(PLAN_STYLES)})"
            elif name in parameters:
                yield f"the plan of the parameter {name!r} is {word!r}; only plans of modules are supported"


@dataclass(frozen=True)
class _Block:
    """A module in a decoder layer whose linear layers are split: attention, or an MLP."""

    name: str
    module: nn.Module
    linears: dict[str, PlanStyle]
    named: frozenset[nn.Module]
    """All its modules that the plan names."""

    @property
    def is_split_inside(self) -> bool:
        """Whether its own code works on a slice: of the heads, of the hidden width."""
        return _colwise in self.linears.values()

    @property
    def has_heads(self) -> bool:
        return self.is_split_inside and ("attn" in self.name or "attention" in self.name)

    def rest(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules with parameters of their own that the plan does not name."""
        for name, module in self.module.named_modules():
            if module not in self.named and any(True for _ in module.parameters(recurse=False)):
                yield f"{self.name}.{name}".rstrip("."), module

    def problems(self, hidden_size: int) -> Iterator[str]:
        """What of its own code or parameters can not be known to be right on a part of the activations."""
        if self.has_heads and (name := _head_count_in_code(type(self.module))) is not None:
            yield (
                f"the code of {type(self.module).__name__} uses {name}, which is of all heads, where a rank has some"
            )
        for name, module in self.rest():
            sizes = {size for p in module.parameters(recurse=False) for size in p.shape}
            if not type(module).__name__.endswith("Norm"):
                yield f"the plan says nothing of {name!r} inside of {self.name!r}, which it splits"
            elif self.is_split_inside and (_gathered in self.linears.values() or hidden_size in sizes):
                yield f"the plan does not say what part of the activations {name!r} sees"


def _head_count_in_code(attention: type[nn.Module]) -> str | None:
    """The number of heads or the width of all of them, as the methods of an attention spell it; None if they go by shapes."""
    for cls in attention.__mro__:
        for name, method in vars(cls).items() if cls.__module__ != nn.Module.__module__ else ():
            if name == "__init__" or not inspect.isfunction(method):
                continue
            try:
                found = _HEAD_COUNT.search(inspect.getsource(method))
            except OSError:  # typed into a shell: there is no source to look at
                continue
            if found is not None:
                return found.group()
    return None


def _blocks(model: HFCausalLM) -> list[_Block]:
    styles = _Plan.of(model).modules(model)
    prefix = _name_of(model, model.layers)
    parents: dict[str, dict[str, PlanStyle]] = {}
    for name, style in styles.items():
        if style.build is not None and name.startswith(f"{prefix}."):
            parents.setdefault(name.rpartition(".")[0], {})[name] = style
    return [
        _Block(name, model.get_submodule(name), linears, frozenset(model.get_submodule(n) for n in styles))
        for name, linears in parents.items()
    ]


def _layers(model: HFCausalLM) -> list[nn.Module]:
    """The decoder layers that are there."""
    return [layer for _, layer in model.layers.named_children()]


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _vocabulary_modules(model: HFCausalLM) -> set[str]:
    """Names of input and output embedding."""
    modules = {model.get_input_embeddings(), model.get_output_embeddings()}
    return {name for name, module in model.named_modules() if module in modules}


def _no_sequence_parallel(model: HFCausalLM) -> str | None:
    """Why layers can not run on slices of the sequence between their blocks; None if they can."""
    blocks = {block.module for block in _blocks(model)}
    for layer in _layers(model):
        if layer in blocks:
            return "linear layers lie in the decoder layer itself"
        if any(True for _ in layer.parameters(recurse=False)):
            return f"{type(layer).__name__} has parameters of its own"
        for name, module in layer.named_children():
            leaf = not any(True for _ in module.children())
            if getattr(module, "p", 0) and isinstance(module, nn.Dropout):
                return f"{name} drops activations, and ranks would draw the same for different positions"
            if module not in blocks and not (leaf and type(module).__name__.endswith(_POSITIONWISE)):
                return f"{name} ({type(module).__name__}) is not known to take each position by itself"
    return None


def _partial_gradients(model: HFCausalLM, blocks: list[_Block], sequence_parallel: bool) -> dict[nn.Module, bool]:
    """Modules of the layers to whether a rank has only a part of their gradient, having seen a part of the activations."""
    partial = {module: sequence_parallel for layer in _layers(model) for module in layer.modules()}
    for block in blocks:
        partial |= dict.fromkeys(block.module.modules(), block.is_split_inside)
    return partial


# -- activations -------------------------------------------------------------------------------------------------


def _redistribution(mesh: DeviceMesh, source: Placement, target: Placement, local: bool) -> Callable[[Tensor], Tensor]:
    """(B, T, D) activations from one layout to another; the backward takes gradients the other way."""

    def redistribute(states: Tensor) -> Tensor:
        if not isinstance(states, DTensor):
            states = DTensor.from_local(states, mesh, [source], run_check=False)
        redistributed = states.redistribute(placements=[target])
        return redistributed.to_local() if local else redistributed

    return redistribute


def _on_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """``change`` the hidden states that ``module`` is called with, which are named so or come first."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
        return (change(args[0]), *args[1:]), kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """``change`` the hidden states that ``module`` returns, alone or first."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.register_forward_hook(hook)


# -- parameters on every rank ------------------------------------------------------------------------------------


def _replicate(module: nn.Module, mesh: DeviceMesh, gradient_is_partial: bool) -> None:
    """Make what is left of a module's parameters DTensors with all values on every rank; its code sees plain tensors."""
    names = [name for name, p in module._parameters.items() if p is not None and not isinstance(p, DTensor)]
    if not names:
        return
    for name in names:
        parameter = module._parameters[name]
        assert parameter is not None
        replicated = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(replicated, requires_grad=parameter.requires_grad))
    module_class: Any = type(module)
    module.__class__ = _with_local_parameters(module_class, tuple(names), gradient_is_partial)


@functools.cache  # one class for all layers: compiled code is guarded by it
def _with_local_parameters(cls: Any, names: tuple[str, ...], gradient_is_partial: bool) -> type[nn.Module]:
    """A subclass whose attributes ``names`` are the local tensors of the parameters of these names.

    ``nn.Module`` keeps parameters in ``_parameters``, where state dicts and optimizers find them as they are.
    """
    local = _local_with_partial_gradient if gradient_is_partial else _local
    attributes = {name: property(functools.partial(_get, name=name, local=local)) for name in names}
    return type(cls.__name__, (cls,), attributes)


def _get(module: nn.Module, *, name: str, local: Callable[[DTensor], Tensor]) -> Tensor | None:
    parameter = module._parameters[name]
    # On more dimensions than the one of tensor parallelism it is FSDP's shard, which FSDP alone asks for.
    return local(parameter) if isinstance(parameter, DTensor) and len(parameter.placements) == 1 else parameter


def _local(parameter: DTensor) -> Tensor:
    """Every rank computes the same with it, so every rank has the whole gradient."""
    return parameter.to_local()


def _local_with_partial_gradient(parameter: DTensor) -> Tensor:
    """The gradient is the sum over ranks: the backward of a redistribution to where it is takes it there."""
    return parameter.redistribute(placements=parameter.placements).to_local(grad_placements=[Partial()])
