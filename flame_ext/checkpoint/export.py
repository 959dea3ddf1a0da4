"""Writes the model as a Hugging Face folder; heads lie in a subfolder, since readers take every file beside for the backbone."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchtitan.tools.logging import logger
from transformers import PreTrainedConfig

from flame_ext.checkpoint.assets import code_stays, with_former_names
from flame_ext.checkpoint.export_folder import ExportFolder, Origin
from flame_ext.checkpoint.gathering import BoxGatherer
from flame_ext.distributed import from_main_rank, is_main_rank, on_main_rank
from flame_ext.errors import CheckpointError
from flame_ext.fault_injection import fault_point
from flame_ext.files import parse_size, write_json
from flame_ext.hf_config import is_part_of_transformers, mark_direction
from flame_ext.model.adapters import PEFT_PREFIX
from flame_ext.seeding.sources.hf_safetensors import INDEX_NAME, read_header
from flame_ext.seeding.sources.source import HEADS_FOLDER, TensorEntry, same_bits
from flame_ext.seeding.sources.traced import TracedTensor

ADAPTER_FOLDER = "adapter"
"""The folder of an export with adapters as peft loads them, beside the merged weights."""


@dataclass(frozen=True)
class ExportSpec:
    """Everything that an export contains or depends on besides the weights."""

    config: PreTrainedConfig
    architecture: str  # name of the model's class, for config.json
    assets: Mapping[str, bytes]  # files to carry on, see read_assets; empty but on the main rank
    folder: Path  # the model's, which ``auto_map`` of ``config`` is relative to
    dtype: torch.dtype  # for config.json
    heads: dict[str, dict[str, Any]] | None  # name of each head to the arguments of build_head; None without heads
    max_shard_size: str = "5GB"  # maximum size of each file of the backbone
    card: str | None = None  # README.md
    reverse: bool | None = None  # whether it was trained with data.reverse; None = as ``config`` says
    origin: Origin | None = None  # the step that is exported
    adapter: Mapping[str, Any] | None = None  # peft's configuration of adapters; None without


Read = Callable[[str], "Tensor | None"]
"""Maps a key to its full tensor on the main rank; the other ranks may return None. Collective."""


@torch.no_grad()
def export_hf(
    tensors: Mapping[str, TracedTensor],
    head_names: list[str],
    folder: Path,
    spec: ExportSpec,
    gather: BoxGatherer,
) -> None:
    """Writes ``folder`` atomically; the main rank holds one file's tensors. Collective; a CheckpointError is raised on all ranks.

    Args:
        tensors: by their keys in files, each tied parameter once, in the dtypes to write; made of those that ``gather``
            brings. A head's keys begin with its name, an adapter's as peft writes them.
    """

    def read_for_file(key: str) -> Tensor | None:
        fault_point("during_export")
        full = gather(tensors[key])
        return full.cpu() if is_main_rank() else None

    described = on_meta(tensors, {key: tensor.dtype for key, tensor in tensors.items()})
    heads = {key: tensor for key, tensor in described.items() if key.startswith(tuple(f"{n}." for n in head_names))}
    adapters = {key: tensor for key, tensor in described.items() if key.startswith(PEFT_PREFIX)}
    backbone = {key: tensor for key, tensor in described.items() if key not in heads and key not in adapters}
    place = ExportFolder(folder, replace=True)
    try:
        temporary = from_main_rank(on_main_rank(place.open))
        assert temporary is not None
        write_hf(backbone, heads, read_for_file, temporary, spec, adapters)
        on_main_rank(place.publish, spec.origin)
    finally:
        place.close()
    logger.info(f"Exported {len(backbone)} tensors of the backbone and {len(heads)} of the heads to {folder}")


def on_meta(
    tensors: Mapping[str, Tensor] | Mapping[str, TensorEntry], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Returns tensors of the same shapes on meta, in other dtypes."""
    return {key: torch.empty(t.shape, dtype=dtypes[key], device="meta") for key, t in tensors.items()}


def write_hf(
    backbone: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
    read: Read,
    folder: Path,
    spec: ExportSpec,
    adapters: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Writes all files into an empty ``folder`` and reads the weights back. Collective; a CheckpointError is raised on all ranks.

    Args:
        backbone, heads, adapters: name to a tensor on meta.
        read: returns a tensor on CPU in the dtype to write; called on every rank in the same order.
    """
    on_main_rank(_write_small_files, folder, spec)
    _write_tensors(backbone, read, folder, parse_size(spec.max_shard_size, "max_shard_size"))
    if heads:
        _write_tensors(heads, read, folder / HEADS_FOLDER, 10**12)  # one file
    if adapters:
        _write_tensors(adapters, read, folder / ADAPTER_FOLDER, 10**12, "adapter_model")


def _write_small_files(folder: Path, spec: ExportSpec) -> None:
    spec.config.dtype = spec.dtype
    spec.config._auto_class = None  # type: ignore[misc]  # otherwise transformers would save the code that came with the configuration
    spec.config.architectures = [spec.architecture]
    spec.config.save_pretrained(folder)
    file = folder / "config.json"
    fields = code_stays(json.loads(file.read_text()), spec.folder, not is_part_of_transformers(spec.config))
    if spec.reverse is not None:
        mark_direction(fields, spec.reverse)
    write_json(file, dict(sorted(with_former_names(fields, spec.config).items())))
    for name, content in spec.assets.items():
        (folder / name).write_bytes(content)
    if spec.card is not None:
        (folder / "README.md").write_text(spec.card)
    if spec.heads is not None:
        write_json(folder / HEADS_FOLDER / "config.json", spec.heads)
    if spec.adapter is not None:
        write_json(folder / ADAPTER_FOLDER / "adapter_config.json", spec.adapter)


def _write_tensors(
    described: Mapping[str, Tensor], read: Read, folder: Path, max_shard_size: int, stem: str = "model"
) -> None:
    """Writes ``model.safetensors``, or several files of at most ``max_shard_size`` bytes and their index."""
    like = folder / ("config.json" if stem == "model" else "adapter_config.json")

    def write_file(file: Path, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, file, metadata={"format": "pt"})  # from_pretrained requires the framework
        require_written(file, read_header(file)[0], tensors, lambda key: same_bits(_read_one(file, key), tensors[key]))
        shutil.copymode(like, file)  # safetensors makes it private to its owner

    plan = split_state_dict_into_shards_factory(
        dict(described),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in plan.filename_to_tensors.items():
        values = ((key, read(key)) for key in keys)
        tensors = {key: tensor for key, tensor in values if tensor is not None}
        on_main_rank(write_file, folder / name, tensors)
        del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        on_main_rank(write_json, folder / INDEX_NAME, index)


def _read_one(file: Path, key: str) -> Tensor:
    """Opens the file for each tensor, since all of a mapping that was read counts as used memory."""
    with safe_open(file, framework="pt") as reader:
        return reader.get_tensor(key)


def require_written(
    place: Path, found: Collection[str], expected: Collection[str], same: Callable[[str], bool]
) -> None:
    """Raises a CheckpointError unless a file or folder has the keys ``expected``, and ``same`` holds for each."""
    if set(found) != set(expected):
        raise CheckpointError(f"{place}: was written with other keys than it was to have: {sorted(found)[:8]}")
    for key in expected:
        if not same(key):
            raise CheckpointError(f"{place}: {key!r} is not what was written; is the disk full or failing?")
