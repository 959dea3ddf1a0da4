"""Tensor parallelism by transformers' plan, which names linear layers and embeddings, and how each is split.

Between them the architecture's own code runs on plain local tensors: with fewer heads, a slice of the MLP, and, under sequence
parallelism, a slice of the sequence between the blocks. Modules that no plan names are replicated.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torchtitan.tools.logging import logger
from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

from flame_ext.model.experts import stacked_experts
from flame_ext.model.hf_causal_lm import BASE_LAYER, HFCausalLM
from flame_ext.model.local_parameters import with_local_parameters


@dataclass(frozen=True)
class PlanStyle:
    """The meaning of one word of a transformers plan."""

    # Maps the placement of activations between blocks to torch's style; None = the module is replicated.
    build: Callable[[Placement], ParallelStyle] | None
    splits: str | None = None  # the attribute of the module that holds the size to be divided
    gradient_is_partial: bool = False  # whether each rank sees only a part of the activations of this replicated module


_colwise = PlanStyle(lambda _: ColwiseParallel(), "out_features")
_gathered = PlanStyle(lambda _: ColwiseParallel(output_layouts=Replicate()), "out_features")
_rowwise = PlanStyle(lambda between: RowwiseParallel(output_layouts=between), "in_features")
_split_input = PlanStyle(
    lambda between: RowwiseParallel(input_layouts=Replicate(), output_layouts=between), "in_features"
)
_embedding = PlanStyle(lambda _: RowwiseParallel(input_layouts=Replicate()), "num_embeddings")

_ADAPTED = (_colwise, _rowwise)  # the styles of layers that can have adapters

# The words of plans; those for experts, packed parameters and multi-head latent attention are not supported.
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

# Sizes of the whole attention, as its code may read them, are wrong for a rank's part of it.
_HEAD_COUNT = re.compile(
    r"\bself\.(num_heads|num_attention_heads|n_heads?|num_key_value_heads|num_kv_heads|hidden_size|embed_dim|inner_dim)\b"
    r"|\bconfig\.(num_attention_heads|num_key_value_heads|hidden_size)\b"
)

# Class names of layers that treat each position by itself end so; they may be given a slice of the sequence.
_POSITIONWISE = ("Norm", "Linear", "Dropout", "Activation", "Identity", "SiLU", "GELU", "ReLU")


def tensor_parallel_problems(model: HFCausalLM, degree: int, without_experts: bool = False) -> list[str]:
    """Lists the reasons why a whole model on meta cannot be split over ``degree`` ranks, judged by shapes, names and code.

    ``without_experts`` leaves the experts to expert parallelism.
    """
    where = f"parallelism.tensor_parallel_degree = {degree} with {model.architecture}"
    # A problem of every layer is reported once.
    problems = dict.fromkeys(
        replace_layer_number_by_wildcard(problem) for problem in _problems(model, degree, without_experts)
    )
    return [f"{where}: {problem}; or scale with data_parallel_shard_degree (FSDP)" for problem in problems]


def _problems(model: HFCausalLM, degree: int, without_experts: bool) -> Iterator[str]:
    styles, blocks = _styles(model), _blocks(model)
    if not blocks:
        yield "transformers has no tensor-parallel plan for its layers (base_model_tp_plan of its configuration)"
        return
    spread = {replace_layer_number_by_wildcard(name) for name in stacked_experts(model)} if without_experts else set()
    names = {replace_layer_number_by_wildcard(name) for name, _ in model.named_modules()} - spread
    parameters = {replace_layer_number_by_wildcard(name) for name, _ in model.named_parameters()}
    for name, word in _plan(model).items():
        if name in names and word not in PLAN_STYLES:
            yield f"the plan of {name!r} is {word!r}, which is not supported (known: {', '.join(PLAN_STYLES)})"
        elif name in parameters and name.rpartition(".")[0] not in spread:
            yield f"the plan of the parameter {name!r} is {word!r}; only plans of modules are supported"
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, style in styles.items():
        module = model.get_submodule(name)
        size = getattr(module, style.splits) if style.splits else 0
        if size % degree and module in vocabulary:
            remedy = f"pad it: seed.resize_vocabulary = true with seed.pad_vocabulary_to_multiple_of = {degree}"
            yield f"the vocabulary ({size}) is not divisible; {remedy}"
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
    """Splits a model, or a stage of one, on meta over a one-dimensional ``mesh``, in place; all parameters become DTensors.

    Heads are split by their own plans; a head's other modules are replicated, and have to see whole activations.
    ``loss_parallel`` leaves logits a DTensor that is sharded over the vocabulary, if the plan splits the output embedding so.
    """
    blocks, obstacle = _blocks(model), _no_sequence_parallel(model)
    layers = list(model.layers.children())
    between: Placement = Replicate() if obstacle else Shard(1)
    output = model.get_output_embeddings()
    # A rank that sees a part of the activations of a replicated module has only a part of its gradient.
    partial = {module: obstacle is None for layer in layers for module in layer.modules()}
    for block in blocks:
        partial |= dict.fromkeys(block.module.modules(), block.is_split_inside)
    for name, style in _styles(model).items():
        module = model.get_submodule(name)
        if style.build is None:
            partial[module] = style.gradient_is_partial
            continue
        built = style.build(Replicate() if module is output else between)
        if module is output and style is _gathered and loss_parallel:
            built = ColwiseParallel(use_local_output=False)
        parallelize_module(getattr(module, BASE_LAYER, module), mesh, built, src_data_rank=None)
        if hasattr(module, BASE_LAYER):
            partial |= _split_adapter(module, style, mesh, between)
        if module is model.get_input_embeddings():
            # Compiled code loses the gradient of the asynchronous result; the copy waits for it.
            _on_output(module, torch.clone)
    for block in blocks:
        # One collective for all linear layers of the block, in the backward as well.
        _on_input(block.module, _redistribution(mesh, between, Replicate(), local=False))
    if obstacle is None and layers:
        _on_input(layers[0], _redistribution(mesh, Replicate(), Shard(1), local=True))
        _on_output(layers[-1], _redistribution(mesh, Shard(1), Replicate(), local=True))
    for name, head in model.heads.items():
        if head.tensor_parallel_plan:
            parallelize_module(model.get_submodule(name), mesh, dict(head.tensor_parallel_plan), src_data_rank=None)
    for module in list(model.modules()):
        _replicate(module, mesh, partial.get(module, False))
    model.restore_ties()
    kinds = "sequence parallelism" if obstacle is None else f"without sequence parallelism: {obstacle}"
    logger.info(f"Applied tensor parallelism to the model ({kinds})")


def _split_adapter(layer: Any, style: PlanStyle, mesh: DeviceMesh, between: Placement) -> dict[nn.Module, bool]:
    """Splits the adapter of a linear layer as the layer itself is: B over its rows, or A over its columns, and the other is replicated.
    Returns that one, and whether each rank sees only a part of its activations.
    """
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    if style is _colwise:
        _on_input(a, lambda states: states.to_local() if isinstance(states, DTensor) else states)
        parallelize_module(b, mesh, ColwiseParallel(), src_data_rank=None)
        return {a: False}  # the gradient of what B takes is summed over ranks
    parallelize_module(a, mesh, RowwiseParallel(output_layouts=between), src_data_rank=None)
    return {b: between.is_shard()}


def adapter_problems(model: HFCausalLM) -> Iterator[str]:
    """Yields a reason for each kind of layer with an adapter that cannot be split."""
    styles = _styles(model)
    layers = (name for name, module in model.named_modules() if hasattr(module, BASE_LAYER))
    for name in dict.fromkeys(replace_layer_number_by_wildcard(n) for n in layers if styles.get(n) not in _ADAPTED):
        yield f"parallelism.tensor_parallel_degree > 1: {name!r} has an adapter, and is not split by its rows or its columns alone"


def sizes_of_parts(model: HFCausalLM, degree: int) -> dict[str, int]:
    """Maps the names of the modules that are split to the size of a rank's part."""
    splits = ((name, style.splits) for name, style in _styles(model).items() if style.splits)
    return {name: getattr(model.get_submodule(name), size) // degree for name, size in splits}


def _plan(model: HFCausalLM) -> dict[str, str]:
    """Maps names of modules, with ``*`` for layer numbers, to the words of the plan, which always splits the embeddings."""
    words = dict(getattr(model, "_tp_plan", None) or {})
    for name, module in model.named_modules():
        if module is model.get_input_embeddings():
            words.setdefault(name, "embedding_rowwise")
        elif module is model.get_output_embeddings():
            words.setdefault(name, "colwise_gather_output")
    return words


def _styles(model: HFCausalLM) -> dict[str, PlanStyle]:
    words, found = _plan(model), {}
    for name, module in model.named_modules():
        style = PLAN_STYLES.get(words.get(replace_layer_number_by_wildcard(name), ""))
        # On a stage of a pipeline, modules of other stages are replaced by ones without these sizes.
        if style is not None and (style.splits is None or hasattr(module, style.splits)):
            found[name] = style
    return found


@dataclass(frozen=True)
class _Block:
    """An attention or MLP of a decoder layer whose linear layers are split."""

    name: str
    module: nn.Module
    linears: dict[str, PlanStyle]
    named: frozenset[nn.Module]  # all modules of the model that the plan names

    @property
    def is_split_inside(self) -> bool:
        """Whether the block's code works on a slice of the heads or of the hidden width."""
        return _colwise in self.linears.values()

    @property
    def has_heads(self) -> bool:
        return self.is_split_inside and ("attn" in self.name or "attention" in self.name)

    def problems(self, hidden_size: int) -> Iterator[str]:
        """Names code and parameters of the block that may be wrong on a part of the activations."""
        if self.has_heads and (name := _head_count_in_code(attention := type(self.module))) is not None:
            yield f"the code of {attention.__name__} uses {name}, which is of all heads, where a rank has some"
        for inner, module in self.module.named_modules():
            name, parameters = f"{self.name}.{inner}".rstrip("."), list(module.parameters(recurse=False))
            if module in self.named or not parameters:
                continue
            sizes = {size for parameter in parameters for size in parameter.shape}
            if not type(module).__name__.endswith("Norm"):
                yield f"the plan says nothing of {name!r} inside of {self.name!r}, which it splits"
            elif self.is_split_inside and (_gathered in self.linears.values() or hidden_size in sizes):
                yield f"the plan does not say what part of the activations {name!r} sees"


def _head_count_in_code(attention: type[nn.Module]) -> str | None:
    """Finds where an attention's methods read the number or width of all heads; None if they take it from tensor shapes."""
    for cls in attention.__mro__:
        for name, method in vars(cls).items() if cls.__module__ != nn.Module.__module__ else ():
            if name == "__init__" or not inspect.isfunction(method):
                continue
            with suppress(OSError):  # a class defined in a shell has no source
                if found := _HEAD_COUNT.search(inspect.getsource(method)):
                    return found.group()
    return None


def _blocks(model: HFCausalLM) -> list[_Block]:
    styles, layers = _styles(model), model.layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    parents: dict[str, dict[str, PlanStyle]] = {}
    for name, style in styles.items():
        if style.build is not None and name.startswith(f"{prefix}."):
            parents.setdefault(name.rpartition(".")[0], {})[name] = style
    named = frozenset(map(model.get_submodule, styles))
    return [_Block(name, model.get_submodule(name), linears, named) for name, linears in parents.items()]


def _no_sequence_parallel(model: HFCausalLM) -> str | None:
    """Says why layers cannot run on slices of the sequence between their blocks; None if they can."""
    blocks = {block.module for block in _blocks(model)}
    for layer in model.layers.children():
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


def _redistribution(mesh: DeviceMesh, source: Placement, target: Placement, local: bool) -> Callable[[Tensor], Tensor]:
    """Returns a function that moves (B, T, D) activations from one placement to another, and their gradients back."""

    def redistribute(states: Tensor) -> Tensor:
        if not isinstance(states, DTensor):
            states = DTensor.from_local(states, mesh, [source], run_check=False)
        redistributed = states.redistribute(placements=[target])
        return redistributed.to_local() if local else redistributed

    return redistribute


def _on_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Applies ``change`` to the hidden states that ``module`` is called with, by that keyword or as the first argument."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
        return (change(args[0]), *args[1:]), kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Applies ``change`` to the hidden states that ``module`` returns, alone or first in a tuple."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.register_forward_hook(hook)


def _replicate(module: nn.Module, mesh: DeviceMesh, gradient_is_partial: bool) -> None:
    """Makes a module's plain parameters replicated DTensors, of which its code sees the local tensors."""
    plain = {name: p for name, p in module._parameters.items() if p is not None and not isinstance(p, DTensor)}
    if not plain:
        return
    for name, parameter in plain.items():
        replicated = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(replicated, requires_grad=parameter.requires_grad))
    module_class: Any = type(module)
    module.__class__ = with_local_parameters(module_class, tuple(plain), gradient_is_partial)
