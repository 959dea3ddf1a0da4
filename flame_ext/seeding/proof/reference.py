"""Computes what the model on disk computes: transformers' own model, by its own loading, a block of weights in memory at a time.

What makes it independent of the trainer: the model, its buffers (RoPE) and its tied weights are what ``from_pretrained`` makes;
files are read tensor by tensor as the library that wrote them does; keys are renamed, tensors converted and cast by the function
with which ``from_pretrained`` does it. Of the project's own it takes only which stored tensors belong to which block, and what is
missing then is noticed.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.tools.logging import logger
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from flame_ext.errors import SeedError
from flame_ext.model.attention import attention_options
from flame_ext.seeding.names import Rule, rename, unwrapped
from flame_ext.seeding.proof.parity import Probe
from flame_ext.seeding.sources.source import Source, TensorEntry


@dataclass(frozen=True)
class Reference:
    """The ``backbone`` names of a source as a stock model of ``config``; ``rules`` are those of ``seed.key_map``."""

    source: Source
    config: PreTrainedConfig
    backbone: Collection[str]
    trust_remote_code: bool = False
    rules: Sequence[Rule] = ()

    def logits(self, probe: Probe) -> Tensor:
        """Return (1, T, V) float32 logits of the probe, on CPU, computed on the trainer's device in ``probe.dtype``.

        Raises SeedError if the memory does not suffice for the largest block; or for all, where a model cannot run by blocks.
        """
        try:
            model = self._without_weights(probe.dtype)
            with _loaded_by_blocks(model, self, probe):
                return _run(model, probe)
        except SeedError:
            raise
        except Exception as e:  # what foreign code makes of absent weights may be anything
            reason = (str(e).strip().splitlines() or [""])[0]
            logger.info(f"seed.verify = 'parity' loads the whole stock model, not a block at a time: {type(e).__name__}: {reason}")
        return self._logits_of_whole(probe)

    @property
    def entries(self) -> dict[str, TensorEntry]:
        return {name: entry for name, entry in self.source.entries.items() if name in self.backbone}

    def state(self, entries: Collection[TensorEntry]) -> dict[str, Tensor]:
        """Read what tensors are made of, by the keys that ``from_pretrained`` takes."""
        stored = {tensor.key: tensor for entry in entries for tensor in entry.stored_tensors}
        return {self._given(key): tensor for key, tensor in self.source.independent_state(stored.values()).items()}

    def require_memory(self, entries: Collection[TensorEntry], dtype: torch.dtype, device: torch.device, what: str) -> None:
        """Raise SeedError if tensors do not fit the memory that ``device`` has left."""
        nbytes = sum(entry.nbytes // entry.dtype.itemsize * dtype.itemsize for entry in entries)
        left = memory_left(device)
        if left is not None and nbytes > left:
            raise SeedError(
                f"{self.source.path}: seed.verify = 'parity' puts {what} of a second model ({nbytes / 2**30:.1f} GiB) into the memory "
                f"of {device}, which has {left / 2**30:.1f} GiB left; use seed.verify = 'finite', or run the proof once where there "
                "is more"
            )

    def _given(self, key: str) -> str:
        nesting = self.source.nesting
        return unwrapped(rename(key, self.rules, nesting), self.source.wrappers).removeprefix(nesting)

    def _without_weights(self, dtype: torch.dtype) -> PreTrainedModel:
        """Return the model that ``from_pretrained`` makes of weights which take no memory."""
        model = self._on_meta(dtype)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items() if name in self.entries}
        return self._loaded(model, {name: torch.zeros((), dtype=dt).expand(shape) for name, (shape, dt) in shapes.items()})

    def _logits_of_whole(self, probe: Probe) -> Tensor:
        entries = self.entries
        self.require_memory(entries.values(), probe.dtype, torch.device("cpu"), "all")
        stored = (tensor.key for entry in entries.values() for tensor in entry.stored_tensors)
        if self.source.is_stock and not self.source.wrappers and all(rename(key, self.rules) == key for key in stored):
            options = {"dtype": probe.dtype, "trust_remote_code": self.trust_remote_code, **attention_options(self.config)}
            config = deepcopy(self.config)
            model = AutoModelForCausalLM.from_pretrained(self.source.path, config=config, local_files_only=True, **options)
        else:
            model = self._loaded(self._on_meta(probe.dtype), self.state(entries.values()))
        self.require_memory(entries.values(), probe.dtype, probe.device, "all")
        return _run(model.to(probe.device), probe)

    def _on_meta(self, dtype: torch.dtype) -> PreTrainedModel:
        config = deepcopy(self.config)
        if self.source.is_stock:
            config.name_or_path = str(self.source.path)  # where its code is, if it brings any
        options = {"dtype": dtype, "trust_remote_code": self.trust_remote_code, **attention_options(config)}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **options)

    def _loaded(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        options = {"dtype": model.dtype, **attention_options(self.config)}
        return type(model).from_pretrained(None, config=model.config, state_dict=state, **options)


@contextmanager
def _loaded_by_blocks(model: PreTrainedModel, reference: Reference, probe: Probe) -> Iterator[None]:
    """Put the weights of each block of ``model`` in its place while that block computes; else they are on meta."""
    held, tensors = reference.entries, model.state_dict(keep_vars=True)
    names_of = {id(tensors[name]): name for name in held}  # tied weights are one object
    stored = {name: names_of[id(tensor)] for name, tensor in tensors.items() if id(tensor) in names_of}
    absent = {name: _like_on_meta(tensors[name]) for name in stored}
    mapping = get_model_conversion_mapping(model)
    loading = LoadStateDictConfig(device_map={"": probe.device}, dtype=probe.dtype, weight_mapping=mapping)

    def load(names: list[str], *_: Any) -> None:
        entries = [held[owner] for owner in {stored[name] for name in names}]
        reference.require_memory(entries, probe.dtype, probe.device, "a block")
        convert_and_load_state_dict_in_model(model, reference.state(entries), loading)
        for name in names:
            tensor = _get(model, stored[name])
            if tensor.is_meta:
                raise LookupError(f"{name} is not made by loading {', '.join(entry.key for entry in entries)}")
            _put(model, name, tensor.requires_grad_(False))  # autocast would keep what it casts of those with gradients

    def unload(names: list[str], *_: Any) -> None:
        for name in {*names, *(stored[name] for name in names)}:
            _put(model, name, absent[name])

    for name, tensor in absent.items():
        _put(model, name, tensor)
    if left := [name for name, parameter in model.named_parameters() if name not in stored]:
        raise LookupError(f"{left[0]} is not in the source")
    for module in model.modules():
        module._buffers.update({k: b.to(probe.device) for k, b in module._buffers.items() if b is not None and not b.is_meta})
    hooks = []
    for block, all_names in _blocks(model):
        if names := [name for name in all_names if name in stored]:
            hooks.append(block.register_forward_pre_hook(partial(load, names)))
            hooks.append(block.register_forward_hook(partial(unload, names)))
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        for hook in hooks:
            hook.remove()


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, list[str]]]:
    """Yield the layers, each with the names of all its tensors, and every other module with the names of its own."""
    yield module, [prefix + name for name in (*module._parameters, *module._buffers)]
    for name, child in module.named_children():
        if isinstance(module, nn.ModuleList):
            yield child, [f"{prefix}{name}.{key}" for key in child.state_dict()]
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _like_on_meta(tensor: Tensor) -> Tensor:
    on_meta = torch.empty_like(tensor, device="meta")
    return nn.Parameter(on_meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else on_meta


def _get(model: nn.Module, name: str) -> Tensor:
    module, _, own = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), own)
    return found


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, own = name.rpartition(".")
    setattr(model.get_submodule(module), own, tensor)


def _run(model: PreTrainedModel, probe: Probe) -> Tensor:
    model.eval()
    with torch.no_grad(), probe.autocast():
        logits: Tensor = model(probe.tokens.to(probe.device), use_cache=False).logits
        return logits.float().cpu()


def memory_left(device: torch.device) -> int | None:
    """Return the bytes that a device has left, the machine for "cpu"; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    values = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(values["MemAvailable"].split()[0]) * 1024
