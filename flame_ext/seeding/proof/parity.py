"""The proof at step 0: the model in the trainer computes what the model on disk computes."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.tools.logging import logger

from flame_ext.distributed import failing_together, is_main_rank
from flame_ext.errors import SeedError

# Relative tolerance of loss and logits (against the largest logit). In float32 the arithmetic is the same and on CPU
# the results are bit-equal; kernels may differ between a sharded and a whole model on a GPU. bfloat16 has 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# A model that has learned anything about its language is far below ln(V); a fraction above this is worth an alarm.
SUSPICIOUS_SHARE_OF_CHANCE = 0.8


@dataclass(frozen=True)
class Probe:
    """A fixed text, and how the distributed model is run on it."""

    tokens: Tensor
    """(1, T) int64 on CPU, the same on every rank."""
    forward: Callable[[Tensor], Tensor]
    """(1, T) tokens to (1, T, V) logits of the distributed model, in evaluation mode; collective."""
    context: AbstractContextManager[Any]
    """Autocast, where the host uses it; the stock model runs in it too."""
    dtype: torch.dtype
    """Of the stock model's parameters: those that the distributed model's layers see."""
    compute_dtype: torch.dtype
    """Of the matrix products: a key of :data:`TOLERANCE`."""
    device: torch.device
    vocab_size: int


@dataclass
class Verification:
    """As it stands in the report; ``None`` where the mode does not measure it."""

    mode: str
    passed: bool = True
    loss: float | None = None
    """Mean next-token cross-entropy of the probe, in nats."""
    reference_loss: float | None = None
    max_abs_diff: float | None = None


def verify(mode: str, probe: Probe, load_stock: Callable[[], nn.Module], source: Path) -> Verification:
    """Measure the seeded model on the probe; in mode "parity" compare it with the stock model.

    Args:
        mode: "finite", "parity" or "none". In each, a loss near chance is warned of.
        probe: the distributed model and what it is run on.
        load_stock: the model of the same weights by transformers' own code, on CPU; called on the main rank.
        source: for messages.

    Collective. Raises on all ranks:
        SeedError: loss or logits differ from the stock model's by more than :data:`TOLERANCE`, or are not finite.
    """
    reference = None
    if mode == "parity":
        with failing_together(SeedError):
            if is_main_rank():
                reference = stock_logits(probe, load_stock())
                gc.collect()  # the host has switched automatic collection off
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
            logits_bound, loss_bound = (
                TOLERANCE[probe.compute_dtype] * value for value in (reference.abs().max().item(), expected)
            )
            # Written so that NaN fails.
            if not (difference <= logits_bound and abs(loss - expected) <= loss_bound):
                raise SeedError(
                    f"{source}: the seeded model does not compute what from_pretrained computes: loss {loss:.6f} against "
                    f"{expected:.6f}, logits differ by up to {difference:.3g} (allowed: {logits_bound:.3g}); "
                    "the weights were read exactly and the configurations agree, so a buffer or the modelling code differs"
                )
    if mode == "parity" and dist.is_initialized():
        results = [result]
        dist.broadcast_object_list(results, src=0)
        (result,) = results
    _warn_if_near_chance(loss, probe.vocab_size)
    return result


def stock_logits(probe: Probe, stock: nn.Module) -> Tensor:
    """(1, T, V) float32 on CPU: what the stock model computes on the probe, on the trainer's device in the same dtype.

    Raises:
        SeedError: the device has not the memory for a second copy.
    """
    nbytes, left = sum(p.nbytes for p in stock.parameters()), _device_memory_left(probe.device)
    if left is not None and nbytes > left:
        raise SeedError(
            f"seed.verify = 'parity' puts a second copy of the model ({nbytes / 2**30:.1f} GiB) on {probe.device}, which has "
            f"{left / 2**30:.1f} GiB of memory left; shard the model further for the proof, or use seed.verify = 'finite'"
        )
    stock.to(probe.device).eval()
    with torch.no_grad(), probe.context:
        return stock(probe.tokens.to(probe.device), use_cache=False).logits.float().cpu()


def _device_memory_left(device: torch.device) -> int | None:
    """Bytes; None on a CPU, whose memory was looked at before the model was loaded."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def next_token_loss(logits: Tensor, tokens: Tensor) -> float:
    """Mean cross-entropy in nats of (1, T, V) logits at the next of (1, T) tokens."""
    return F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:].to(logits.device)).item()


def _warn_if_near_chance(loss: float, vocab_size: int) -> None:
    chance = math.log(vocab_size)
    if not loss <= SUSPICIOUS_SHARE_OF_CHANCE * chance:  # NaN included
        logger.warning(
            f"The seeded model's loss on plain text is {loss:.3f}, chance is ln({vocab_size}) = {chance:.3f}. A trained "
            "language model is far below; 4 to 5 where 2 is usual means that only a part of it is at work. Usually the "
            "source is not the trained model, its tokenizer is not this one, or a part (RoPE, an embedding, a norm) is dead."
        )
