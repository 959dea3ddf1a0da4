"""Runs a stock model with the weights of two blocks in memory: the one that computes, and the next, which is read meanwhile."""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging


@contextmanager
def weights_by_blocks(
    model: PreTrainedModel,
    names: Collection[str],
    read: Callable[[Collection[str]], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[None]:
    """Leave the tensors ``names`` of a model on meta but while the block that they belong to computes, on ``device``.

    A block is a layer (a module in a list of modules) with all in it, or another module with its own tensors alone; the next one
    is the one that was defined next. ``read`` maps names to what ``from_pretrained`` takes to make these tensors; what it does with
    that is done here by its own function. Tied tensors stand once in ``names``, and are tied again.

    Raises LookupError if a tensor of the model is not among ``names``, or is not made of what was read. A model that uses the
    tensors of a block elsewhere fails with whatever torch raises for tensors on meta.
    """
    tensors = model.state_dict(keep_vars=True)
    first_names = {id(tensors[name]): name for name in names}
    sources = {name: first_names[id(tensor)] for name, tensor in tensors.items() if id(tensor) in first_names}
    if left := [name for name, _ in model.named_parameters() if name not in sources]:
        raise LookupError(f"{left[0]} is not in the source")
    absent = {name: _on_meta(tensors[name]) for name in sources}
    _put(model, absent)
    for module in model.modules():
        computed = {name: b for name, b in module._buffers.items() if b is not None and not b.is_meta}
        module._buffers.update({name: buffer.to(device) for name, buffer in computed.items()})
    mapping: Any = get_model_conversion_mapping(model)
    loading = LoadStateDictConfig(device_map={"": device}, dtype=dtype, weight_mapping=mapping)
    blocks = [
        (block, held) for block, all_of in _blocks(model) if (held := [name for name in all_of if name in sources])
    ]
    ahead: dict[int, Future[None]] = {}  # by the block's index; of one block, or of none

    def of(index: int) -> set[str]:
        return {sources[name] for name in blocks[index][1]}

    def load(index: int) -> None:
        held = blocks[index][1]
        convert_and_load_state_dict_in_model(model, read(of(index)), loading)
        loaded = {name: _get(model, sources[name]) for name in held}
        if lacking := [name for name, tensor in loaded.items() if tensor.is_meta]:
            raise LookupError(f"{lacking[0]} is not made of what the source has for it")
        # Of tensors with gradients autocast would keep what it casts.
        _put(model, {name: tensor.requires_grad_(False) for name, tensor in loaded.items()})

    def unload(index: int, *_: Any) -> None:
        held = blocks[index][1]
        _put(model, {name: absent[name] for name in {*held, *of(index)}})

    def begin(index: int, *_: Any) -> None:
        loaded = ahead.pop(index, None)
        for other in [*ahead]:
            ahead.pop(other).result()
            unload(other)
        (loaded or reader.submit(load, index)).result()
        if index + 1 < len(blocks) and of(index).isdisjoint(of(index + 1)):  # else unloading would take from both
            ahead[index + 1] = reader.submit(load, index + 1)

    hooks: list[RemovableHandle] = []
    for index, (block, _) in enumerate(blocks):
        hooks += [
            block.register_forward_pre_hook(partial(begin, index)),
            block.register_forward_hook(partial(unload, index)),
        ]
    with _without_progress_bars(), ThreadPoolExecutor(1) as reader:
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, list[str]]]:
    """Yield the blocks with the names of their tensors, in the order of definition."""
    yield module, [prefix + name for name in (*module._parameters, *module._buffers)]
    for name, child in module.named_children():
        if isinstance(module, nn.ModuleList):
            yield child, [f"{prefix}{name}.{key}" for key in child.state_dict()]
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _get(model: nn.Module, name: str) -> Tensor:
    module, _, own = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), own)
    return found


def _put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, tensor)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
