"""Proves at step 0 that the model in the trainer computes what the model on disk computes."""

import gc
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.tools.logging import logger

from flame_ext.distributed import failing_together, gathered, is_main_rank
from flame_ext.errors import SeedError
from flame_ext.seeding.vocabulary import Growth

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
    growth: Growth | None = None
    """Of a vocabulary with more rows than the source's ``vocab_size``: the logits of these alone are compared and make the loss."""
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


def verify(mode: str, probe: Probe, reference_logits: Callable[[Probe], Tensor], source: Path) -> Verification:
    """Run the probe through the distributed model and, for "parity", the reference on the first rank, while the others wait. Collective.

    ``mode`` "none" only measures the loss, "finite" requires it to be finite, "parity" also compares logits. Raises SeedError on
    all ranks if loss or logits are not finite, or differ by more than :data:`TOLERANCE`.
    """
    reference = None
    if mode == "parity":
        with failing_together(SeedError):
            if is_main_rank():
                reference = reference_logits(probe)
                gc.collect()  # torchtitan has switched automatic collection off
    with not_compiled():
        logits = probe.forward(probe.tokens).float().cpu()
    if probe.growth is not None:
        with failing_together(SeedError):
            if mode != "none":
                require_silent_padding(logits, probe.growth.padding, TOLERANCE[probe.compute_dtype], source)
        logits = logits[..., : probe.vocab_size]
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


def require_silent_padding(logits: Tensor, padding: list[int], tolerance: float, source: Path) -> None:
    """Raise SeedError if one of the rows of ``padding`` is predicted: (1, T, V) logits are largest there. NaN is for the loss to find."""
    silent = torch.zeros(logits.shape[-1], dtype=torch.bool)
    silent[padding] = True
    bound = logits[..., ~silent].amax(-1) + tolerance * logits.abs().max()
    if padding and bool((logits[..., silent].amax(-1) > bound).any()):
        raise SeedError(
            f"{source}: the seeded model predicts rows of its vocabulary that have no token; seed.new_rows does not "
            "make such rows: its output embedding or the modelling code treats some rows unlike others"
        )


@contextmanager
def not_compiled() -> Iterator[None]:
    """How both models run, without gradients: layers that are compiled at the probe's shape would be compiled again, with dynamic
    shapes, at the batch's, and FlexAttention's compiled kernels do not round as its operators do.
    """
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


def next_token_loss(logits: Tensor, tokens: Tensor) -> float:
    """Return the mean cross-entropy in nats of (1, T, V) logits at the next of (1, T) tokens."""
    return F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:].to(logits.device)).item()
