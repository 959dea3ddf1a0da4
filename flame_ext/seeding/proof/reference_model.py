"""The model on disk as transformers itself makes it: what the model in the trainer is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flame_ext.errors import SeedError
from flame_ext.model.attention import attention_options
from flame_ext.seeding.key_map import Rule, rename
from flame_ext.seeding.sources.dcp import METADATA_NAME, NESTED_PREFIX, DcpSource, read_metadata
from flame_ext.seeding.sources.source import Source
from flame_ext.seeding.sources.tensors import read_tensor


def load_stock_model(
    source: Source,
    config: PreTrainedConfig,
    backbone: set[str],
    dtype: torch.dtype,
    trust_remote_code: bool,
    key_map: Sequence[Rule] = (),
) -> PreTrainedModel:
    """By ``from_pretrained``, on CPU. A DCP checkpoint is read by torch's own reader and goes through it as a state dict.

    Args:
        source: under the model's names.
        config: of the model; a Hugging Face folder has its own, which was compared with it.
        backbone: names in ``source`` that are not the heads'.
        dtype: of its parameters.
        trust_remote_code: as in transformers.
        key_map: renames keys of the files, which ``from_pretrained`` can then not read by itself.

    Raises:
        SeedError: there is not the memory for it.
    """
    entries = {name: entry for name, entry in source.entries.items() if name in backbone}
    _require_memory(
        sum(entry.nbytes // entry.dtype.itemsize * dtype.itemsize for entry in entries.values()), source.path
    )
    attention = attention_options(config)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **attention}
    if not isinstance(source, DcpSource) and all(rename(e.key, key_map) == e.key for e in entries.values()):
        return AutoModelForCausalLM.from_pretrained(source.path, local_files_only=True, **options)
    prefix = NESTED_PREFIX if source.layout == "dcp-nested" else ""
    if isinstance(source, DcpSource):
        state = {entry.key: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries.values()}
        dcp.load(state, storage_reader=_Reader(source.path), no_dist=True)
    else:
        state = {entry.key: read_tensor(source, name) for name, entry in entries.items()}
    weights = {rename(key, key_map, bool(prefix)).removeprefix(prefix): tensor for key, tensor in state.items()}
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config, **options))
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **attention)


class _Reader(dcp.FileSystemReader):
    """torch's, except that the metadata may not run code."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        metadata = read_metadata(Path(self.path) / METADATA_NAME)[1]
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _require_memory(nbytes: int, path: Path) -> None:
    """Raise if the second copy would not fit; where the system does not tell, go on."""
    available = available_memory()
    if available is not None and nbytes > available:
        raise SeedError(
            f"{path}: seed.verify = 'parity' loads a second copy of the model ({nbytes / 2**30:.1f} GiB), but this machine has "
            f"{available / 2**30:.1f} GiB of memory left; use seed.verify = 'finite', or run the proof once where there is more"
        )


def available_memory() -> int | None:
    """Bytes that processes may still take on this machine; None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    values = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(values["MemAvailable"].split()[0]) * 1024
