"""Proves at step 0 that the model in the trainer computes what the model on disk computes."""

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.tools.logging import logger
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flame_ext.distributed import failing_together, gathered, is_main_rank
from flame_ext.errors import SeedError
from flame_ext.model.attention import attention_options
from flame_ext.seeding.names import Rule, rename, unwrapped
from flame_ext.seeding.sources.source import Source, read_entry

# Plain text and a little code, long enough for any tokenizer.
PROBE_TEXT = (
    "The library sorts a list of records by the value of a key, and returns a new list. If two records have the same "
    "key, their order is kept. This is what most people expect, and it makes it possible to sort by several keys.\n\n"
    "def sort_by(records, key):\n    return sorted(records, key=lambda record: record[key])\n\n"
    "When a key is missing, an error is raised that names the record and the key. The caller decides what to do. "
    "Nothing is sorted in place, so that the original list can be used again after the call has returned.\n"
)
PROBE_LENGTH = 128

# Relative tolerance of loss and logits (against the largest logit). In float32 the arithmetic is the same and on CPU
# the results are bit-equal; kernels may differ between a sharded and a whole model on a GPU. bfloat16 has 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Probe:
    """A fixed text, and how the distributed model is run on it."""

    tokens: Tensor  # (1, T) int64 on CPU, the same on every rank
    forward: Callable[[Tensor], Tensor]
    """(1, T) tokens to (1, T, V) logits of the distributed model, in evaluation mode; collective."""
    autocast: Callable[[], AbstractContextManager[Any]]  # torchtitan's autocast, in which the reference model runs too
    dtype: torch.dtype  # Dtype of the reference model's parameters: the one that the distributed model's layers see
    compute_dtype: torch.dtype  # Dtype of the matrix products, a key of :data:`TOLERANCE`
    device: torch.device
    vocab_size: int
    seq_len: int = 0  # Training's sequence length, on which the kind of masks and the attention kernel depend
    logits_in_parts: Callable[[Tensor], Tensor] | None = None
    """As ``forward``, by ranks that have a part of the sequence each; None without context parallelism."""
    summaries: Callable[[Tensor], Tensor] | None = None
    """(1, T) tokens to (1, T, D) anti-causal summaries of one document, if the run has them; collective."""
    summaries_remedy: str = ""  # What to do if ``summaries`` are not anti-causal
    rounds_alike: bool = True
    """Whether a position's ``summaries`` are rounded alike whatever the others are; not so where routes cannot be kept."""


def probe_tokens(encode: Callable[[str], list[int]], seq_len: int, divisor: int) -> Tensor:
    """Return (1, T) tokens of the text; T <= ``seq_len`` is a multiple of ``divisor``, by which positions are sharded."""
    ids = encode(PROBE_TEXT)[: min(PROBE_LENGTH, seq_len)]
    return torch.tensor([ids[: len(ids) // divisor * divisor]])


@dataclass
class Verification:
    """Result of the proof, as in the report; None = not measured."""

    mode: str
    passed: bool = True
    loss: float | None = None  # Mean next-token cross-entropy of the probe, in nats
    reference_loss: float | None = None
    max_abs_diff: float | None = None

    def __str__(self) -> str:
        words = f"mode {self.mode}, loss on the probe text {self.loss:.4f}"
        if self.reference_loss is None:
            return words
        return f"{words}, from_pretrained {self.reference_loss:.4f}, logits differ by at most {self.max_abs_diff:.3g}"


def verify(mode: str, probe: Probe, load_reference: Callable[[], nn.Module], source: Path) -> Verification:
    """Run the probe through the distributed model and, for "parity", through the reference model on the first rank. Collective.

    ``mode`` "none" only measures the loss, "finite" requires it to be finite, "parity" also compares logits. Raises SeedError on
    all ranks if loss or logits are not finite, or differ by more than :data:`TOLERANCE`.
    """
    reference = None
    if mode == "parity":
        with failing_together(SeedError):
            if is_main_rank():
                reference = reference_logits(probe, load_reference())
                gc.collect()  # torchtitan has switched automatic collection off
    # Compiled at the probe's shape, the layers would be compiled again, with dynamic shapes, at the batch's.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = probe.forward(probe.tokens).float().cpu()
    loss = next_token_loss(logits, probe.tokens)
    result = Verification(mode, loss=loss)
    with failing_together(SeedError):
        if mode != "none" and not math.isfinite(loss):
            raise SeedError(f"{source}: the seeded model's loss on the probe text is {loss}; its weights are damaged")
        if reference is not None:
            expected, difference = next_token_loss(reference, probe.tokens), (logits - reference).abs().max().item()
            result.reference_loss, result.max_abs_diff = expected, difference
            tolerance = TOLERANCE[probe.compute_dtype]
            bound = tolerance * reference.abs().max().item()
            if not (difference <= bound and abs(loss - expected) <= tolerance * expected):  # NaN fails
                raise SeedError(
                    f"{source}: the seeded model does not compute what from_pretrained computes: loss {loss:.6f} against "
                    f"{expected:.6f}, logits differ by up to {difference:.3g} (allowed: {bound:.3g}); "
                    "the weights were read exactly and the configurations agree, so a buffer or the modelling code differs"
                )
    result = gathered(result)[0]
    chance = math.log(probe.vocab_size)
    if not loss <= 0.8 * chance:  # NaN included
        logger.warning(
            f"The seeded model's loss on plain text is {loss:.3f}, chance is ln({probe.vocab_size}) = {chance:.3f}. A trained "
            "language model is far below; 4 to 5 where 2 is usual means that only a part of it is at work. Usually the "
            "source is not the trained model, its tokenizer is not this one, or a part (RoPE, an embedding, a norm) is dead."
        )
    return result


def load_reference_model(
    source: Source,
    config: PreTrainedConfig,
    backbone: set[str],
    dtype: torch.dtype,
    trust_remote_code: bool,
    key_map: Sequence[Rule] = (),
) -> PreTrainedModel:
    """Load the ``backbone`` names of the source with ``from_pretrained``, on CPU; raise SeedError if the memory does not suffice."""
    entries = {name: entry for name, entry in source.entries.items() if name in backbone}
    nbytes = sum(entry.nbytes // entry.dtype.itemsize * dtype.itemsize for entry in entries.values())
    available = available_memory()
    if available is not None and nbytes > available:
        raise SeedError(
            f"{source.path}: seed.verify = 'parity' loads a second copy of the model ({nbytes / 2**30:.1f} GiB), but this machine "
            f"has {available / 2**30:.1f} GiB of memory left; use seed.verify = 'finite', or run the proof once where there is more"
        )
    attention = attention_options(config)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **attention}
    stored = {tensor.key: tensor for entry in entries.values() for tensor in entry.stored_tensors}
    state = source.independent_state(stored.values())
    if state is None and not source.wrappers and all(rename(key, key_map) == key for key in stored):
        return AutoModelForCausalLM.from_pretrained(
            source.path, config=deepcopy(config), local_files_only=True, **options
        )
    if state is None:
        state = {key: read_entry(source, tensor) for key, tensor in stored.items()}
    nesting = source.nesting
    given = {key: unwrapped(rename(key, key_map, nesting), source.wrappers).removeprefix(nesting) for key in state}
    weights = {given[key]: tensor for key, tensor in state.items()}
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config, **options))
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **attention)


def available_memory() -> int | None:
    """Return the bytes that this machine has left; None if the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    values = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(values["MemAvailable"].split()[0]) * 1024


def reference_logits(probe: Probe, reference: nn.Module) -> Tensor:
    """Return (1, T, V) float32 logits on CPU, computed on the trainer's device; raise SeedError if it lacks the memory."""
    nbytes, left = sum(p.nbytes for p in reference.parameters()), _device_memory_left(probe.device)
    if left is not None and nbytes > left:
        raise SeedError(
            f"seed.verify = 'parity' puts a second copy of the model ({nbytes / 2**30:.1f} GiB) on {probe.device}, which has "
            f"{left / 2**30:.1f} GiB of memory left; shard the model further for the proof, or use seed.verify = 'finite'"
        )
    reference.to(probe.device).eval()
    with torch.no_grad(), probe.autocast():
        return reference(probe.tokens.to(probe.device), use_cache=False).logits.float().cpu()


def _device_memory_left(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def next_token_loss(logits: Tensor, tokens: Tensor) -> float:
    """Return the mean cross-entropy in nats of (1, T, V) logits at the next of (1, T) tokens."""
    return F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:].to(logits.device)).item()
