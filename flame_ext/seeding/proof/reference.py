"""Computes what the model on disk computes: transformers' own model, by its own loading, a few weights in memory at a time.

What makes it independent of the trainer: the model, its buffers (RoPE) and its tied weights are what ``from_pretrained`` makes;
files are read tensor by tensor, as the library that wrote them does; keys are renamed, tensors converted and cast by the function
with which ``from_pretrained`` does it. Of the seeding's own it takes which files there are, and which stored tensors belong to
which block; what is missing then is noticed.
"""

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.tools.logging import logger
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flame_ext.errors import SeedError
from flame_ext.model.attention import attention_options, choose_kernels
from flame_ext.seeding.names import Rule, rename, unwrapped
from flame_ext.seeding.proof.blocks import weights_by_blocks
from flame_ext.seeding.proof.parity import Probe, not_compiled
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

        Raises SeedError if the memory does not suffice: for a block of the model, or all of it where it cannot run by blocks.
        """
        try:
            return self.logits_by_blocks(probe)
        except SeedError:
            raise
        except Exception as e:  # what foreign code makes of absent weights may be anything
            reason = (str(e).strip().splitlines() or [""])[0]
            logger.info(
                f"seed.verify = 'parity' loads all of the model, not a block at a time ({type(e).__name__}: {reason})"
            )
        return self.logits_of_whole(probe)

    def logits_by_blocks(self, probe: Probe) -> Tensor:
        """Return the logits with two blocks in memory; raise whatever a model does that cannot run so."""

        def read(names: Collection[str]) -> dict[str, Tensor]:
            entries = [self._entries[name] for name in names]
            self._require_memory(entries, probe.dtype, probe.device, "a part")
            return self._state(entries)

        model = self._on_meta(probe.dtype)
        held = {name: tensor for name, tensor in model.state_dict().items() if name in self._entries}
        # from_pretrained computes everything else; these take no memory.
        stand_ins = {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in held.items()}
        model = self._loaded(model, stand_ins, probe.dtype)
        with weights_by_blocks(model, held, read, probe.dtype, probe.device):
            return _run(model, probe)

    def logits_of_whole(self, probe: Probe) -> Tensor:
        """Return the logits of a whole second model, which ``from_pretrained`` loads from the folder itself if it can."""
        entries = self._entries.values()
        self._require_memory(entries, probe.dtype, torch.device("cpu"), "all")
        stored = (tensor.key for entry in entries for tensor in entry.stored_tensors)
        if self.source.is_stock and not self.source.wrappers and all(rename(key, self.rules) == key for key in stored):
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.source.path, config=deepcopy(self.config), local_files_only=True, **self._options(probe.dtype)
            )
        else:
            model = self._loaded(self._on_meta(probe.dtype), self._state(entries), probe.dtype)
        if probe.device.type != "cpu":
            self._require_memory(entries, probe.dtype, probe.device, "all")
        return _run(model.to(probe.device), probe)

    @cached_property
    def _entries(self) -> dict[str, TensorEntry]:
        return {name: entry for name, entry in self.source.entries.items() if name in self.backbone}

    def _state(self, entries: Collection[TensorEntry]) -> dict[str, Tensor]:
        """Read what tensors are made of, by the keys that ``from_pretrained`` takes."""
        stored = {tensor.key: tensor for entry in entries for tensor in entry.stored_tensors}
        nesting, wrappers = self.source.nesting, self.source.wrappers
        return {
            unwrapped(rename(key, self.rules, nesting), wrappers).removeprefix(nesting): tensor
            for key, tensor in self.source.independent_state(stored.values()).items()
        }

    def _options(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"dtype": dtype, "trust_remote_code": self.trust_remote_code, **attention_options(self.config)}

    def _on_meta(self, dtype: torch.dtype) -> PreTrainedModel:
        config = deepcopy(self.config)
        if self.source.is_stock:
            config.name_or_path = str(self.source.path)  # where its code is, if it brings any
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **self._options(dtype))
        return model

    def _loaded(self, model: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
        attention = attention_options(self.config)
        return type(model).from_pretrained(None, config=model.config, state_dict=state, dtype=dtype, **attention)

    def _require_memory(
        self, entries: Collection[TensorEntry], dtype: torch.dtype, device: torch.device, what: str
    ) -> None:
        """Raise SeedError if tensors do not fit the memory that ``device`` has left."""
        nbytes = sum(entry.nbytes // entry.dtype.itemsize * dtype.itemsize for entry in entries)
        left = memory_left(device)
        if left is not None and nbytes > left:
            place = "this machine" if device.type == "cpu" else str(device)
            raise SeedError(
                f"{self.source.path}: seed.verify = 'parity' loads {what} of a second model ({nbytes / 2**30:.1f} GiB), but {place} has "
                f"{left / 2**30:.1f} GiB of memory left; use seed.verify = 'finite', or run the proof once where there is more"
            )


def _run(model: PreTrainedModel, probe: Probe) -> Tensor:
    model.eval()
    choose_kernels(model.config, None, probe.tokens.shape[1])  # as before a forward of the trainer's
    with not_compiled(), probe.autocast():
        logits: Tensor = model(probe.tokens.to(probe.device), use_cache=False).logits
        return logits.float().cpu()


def memory_left(device: torch.device) -> int | None:
    """Return the bytes that a device has left, the machine's for "cpu"; None if the system does not tell."""
    if device.type == "cuda":  # what torch has taken from the driver and holds free is left as well
        free, held = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
        return free + held - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    values = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(values["MemAvailable"].split()[0]) * 1024
