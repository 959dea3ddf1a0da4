"""Write the model in the trainer as a Hugging Face folder, with the heads in a subfolder of their own.

``AutoModelForCausalLM.from_pretrained`` and vLLM load the folder as it is. They, and DCP's Hugging Face reader, take
every ``*.safetensors`` beside the base model's for a part of it, so the heads lie in ``future_heads/``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.tools.logging import logger
from transformers import GenerationConfig, PreTrainedConfig

from flame_ext.checkpoint.steps import put_in_place, start, temporary_path
from flame_ext.distributed import failing_together, is_main_rank
from flame_ext.errors import CheckpointError
from flame_ext.fault_injection import fault_point
from flame_ext.files import write_json
from flame_ext.seeding.sources.hf_safetensors import INDEX_NAME, read_header
from flame_ext.seeding.sources.source import HEADS_FOLDER
from flame_ext.seeding.sources.tensors import same_bits

# What belongs to a tokenizer or to generation. Named one by one: modelling code in the source must not be carried on.
_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ExportSpec:
    """What an export is made of beside the weights."""

    config: PreTrainedConfig
    assets: Path
    """The folder whose tokenizer and generation files go along."""
    dtype: torch.dtype
    heads: dict[str, dict[str, Any]] | None
    """``future_heads/config.json``: name of each head to the arguments that it is built from; None without heads."""
    max_shard_size: str = "5GB"
    card: str | None = None
    """``README.md``."""


Read = Callable[[torch.dtype, str], "Tensor | None"]
"""Dtype of the file and key to the full tensor on the main rank's CPU, None on the others. Collective."""


def export_hf(
    state: Mapping[str, Tensor], head_names: list[str], folder: Path, spec: ExportSpec, read: Read | None = None
) -> None:
    """Write ``folder``, atomically. Collective: tensors are gathered one by one, the main rank holds one file at a time.

    Args:
        state: key to parameter or buffer, each tied parameter once; keys that start with a head's name are the heads'.
            The backbone's are as files spell them (:func:`flame_ext.model.hf_causal_lm.HFCausalLM.file_keys`).
        head_names: names of the heads.
        folder: ``hf/step-N``.
        spec: the rest.
        read: where ``state``, then for shapes and dtypes alone, is spread over the stages of a pipeline.

    Raises:
        CheckpointError: on every rank, if a file can not be written.
    """
    prefixes = tuple(f"{name}." for name in head_names)
    backbone = (
        {key: tensor for key, tensor in state.items() if not key.startswith(prefixes)} if prefixes else dict(state)
    )
    heads = {key: tensor for key, tensor in state.items() if key not in backbone}
    with failing_together(CheckpointError):
        if is_main_rank():
            write_small_files(start(folder), spec)
    temporary = temporary_path(folder)
    fault_point("during_export")
    for tensors, place, size in ((backbone, temporary, spec.max_shard_size), (heads, temporary / HEADS_FOLDER, "1TB")):
        if tensors:
            described = {
                key: torch.empty(t.shape, dtype=_file_dtype(t, spec.dtype), device="meta") for key, t in tensors.items()
            }
            take = read or partial(_gathered, tensors)
            write_tensors(described, partial(take, spec.dtype), place, size)
    with failing_together(CheckpointError):
        if is_main_rank():
            put_in_place(folder)
    logger.info(f"Exported {len(backbone)} tensors of the backbone and {len(heads)} of the heads to {folder}")


def write_small_files(folder: Path, spec: ExportSpec) -> None:
    """Everything but weights: configuration, tokenizer, how generation goes, what the heads are built from."""
    spec.config.dtype = spec.dtype
    spec.config._auto_class = None  # type: ignore[misc]  # of a configuration that came with code: transformers would save the code, too
    spec.config.save_pretrained(folder)
    if (spec.assets / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(spec.assets).save_pretrained(folder)
    for name in _COPIED_FILES:
        if (spec.assets / name).is_file():
            shutil.copyfile(spec.assets / name, folder / name)
    if spec.card is not None:
        (folder / "README.md").write_text(spec.card)
    if spec.heads is not None:
        write_json(folder / HEADS_FOLDER / "config.json", spec.heads)


def write_tensors(
    described: Mapping[str, Tensor], read: Callable[[str], Tensor | None], folder: Path, max_shard_size: str
) -> None:
    """Write ``model.safetensors``, or several files of at most ``max_shard_size`` and their index, and read them back.

    Collective. One file's tensors are in memory at a time, on the main rank.

    Args:
        described: name to a tensor on meta.
        read: name to its values on the main rank's CPU, None on the others; called on every rank in one order.
        folder: is there, with its ``config.json``.
        max_shard_size: as in ``save_pretrained``.

    Raises:
        CheckpointError: on every rank, if a file can not be written, or is not what was written.
    """
    plan = split_state_dict_into_shards_factory(
        dict(described),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in plan.filename_to_tensors.items():
        values = ((key, read(key)) for key in keys)
        tensors = {key: tensor for key, tensor in values if tensor is not None}
        with failing_together(CheckpointError):
            if is_main_rank():
                # from_pretrained wants to know the framework that wrote the file.
                save_file(tensors, folder / name, metadata={"format": "pt"})
                _require_written(tensors, folder / name)
                shutil.copymode(folder / "config.json", folder / name)  # safetensors lets nobody else read it
        del tensors
    with failing_together(CheckpointError):
        if is_main_rank() and plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
            write_json(folder / INDEX_NAME, index)


def _require_written(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Compare what was written with what was to be, bit for bit.

    Raises:
        CheckpointError: naming file and key.
    """
    header, _ = read_header(file)
    if header.keys() != tensors.keys():
        raise CheckpointError(f"{file}: was written with other keys than it was to have: {sorted(header)[:8]}")
    for key, tensor in tensors.items():
        with safe_open(file, framework="pt") as reader:  # unmapped after each: what is mapped counts as memory in use
            if not same_bits(reader.get_tensor(key), tensor):
                raise CheckpointError(f"{file}: {key!r} is not what was written; is the disk full or failing?")


@torch.no_grad()
def _gathered(tensors: Mapping[str, Tensor], dtype: torch.dtype, key: str) -> Tensor | None:
    """See :data:`Read`."""
    full = _full(tensors[key])
    return full.to(device="cpu", dtype=_file_dtype(full, dtype)).contiguous() if is_main_rank() else None


class StagedReader:
    """A :data:`Read` of what the stages of a pipeline hold: whichever has a tensor sends it to the first rank. Collective.

    Args:
        state: this rank's part of the tensors.
        group: the ranks of this rank's pipeline.
    """

    def __init__(self, state: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
        self._state, self._group = state, group
        held: list[Mapping[str, tuple[torch.Size, torch.dtype, str]]] = [{}] * dist.get_world_size(group)
        mine = {key: (tensor.shape, tensor.dtype, tensor.device.type) for key, tensor in state.items()}
        dist.all_gather_object(held, mine, group=group)
        self._held = held

    @torch.no_grad()
    def __call__(self, dtype: torch.dtype, key: str) -> Tensor | None:
        owner = next(rank for rank, tensors in enumerate(self._held) if key in tensors)
        rank = dist.get_rank(self._group)
        full = _full(self._state[key]).contiguous() if rank == owner else None
        source, first = (dist.get_global_rank(self._group, r) for r in (owner, 0))
        # One pipeline has the main rank; its siblings have the same tensors.
        if owner != 0 and first == 0:
            if full is not None:
                dist.send(full, dst=first, group=self._group)
            elif rank == 0:
                shape, held_dtype, device = self._held[owner][key]
                full = torch.empty(shape, dtype=held_dtype, device=device)
                dist.recv(full, src=source, group=self._group)
        if not is_main_rank():
            return None
        assert full is not None
        return full.to(device="cpu", dtype=_file_dtype(full, dtype)).contiguous()


def _full(tensor: Tensor) -> Tensor:
    """Collective over the ranks that a DTensor is spread over."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _file_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Weights are cast; an integer buffer means its integers."""
    return dtype if tensor.is_floating_point() else tensor.dtype
