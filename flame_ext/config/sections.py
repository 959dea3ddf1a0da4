"""The sections that flame_ext adds to torchtitan's ``JobConfig``. The string under a field is its ``--help``.

No ``from __future__ import annotations`` here: the host's ConfigManager reads ``field.type`` and needs types, not strings.
"""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config import JobConfig


@dataclass
class Seed:
    """How step 0 gets its weights from ``checkpoint.initial_load_path``."""

    new_parameters: list[str] = field(
        default_factory=lambda: ["future_encoder.*", "future_predictor.*", "action_layer.*"]
    )
    """
    Patterns (fnmatch) of parameters that may be missing from the source. Those that are missing are initialised from
    `rng_seed` and their name; a parameter that is missing without being declared here is an error.
    """

    rng_seed: int = 0
    """The integer that, with a parameter's name, determines the initial values of new parameters."""

    verify: Literal["finite", "parity", "none"] = "finite"
    """
    Proof after seeding. 'finite': every weight that was read is finite. 'parity': also, loss and logits on fixed tokens
    equal those of stock `from_pretrained` (rank 0 holds a second copy of the model for the time of the comparison).
    'none': neither. In all of them, every element is known to have been written once, and a loss near chance is warned of.
    """

    ignore_source_keys: list[str] = field(default_factory=list)
    """Patterns (fnmatch) of keys in the source that are not read. Any other key that the model lacks is an error."""

    allow_pickle: bool = False
    """Read a source that has `.bin` files only. They are pickles; they are read with `weights_only`, memory-mapped."""

    trust_remote_code: bool = False
    """Run the modelling code that lies in the model's folder, as transformers does under the same name."""

    dry_run: bool = False
    """Build the distributed model, seed it, prove it, write `seed_report.json` and stop before step 1."""


@dataclass
class FutureEncoder:
    """What summarises the future: the target F_t (batch, sequence, hidden size) of the prediction."""

    enable: bool = False
    """Whether there is a future objective. Needs the model converter 'future_prediction'."""

    summary_method: Literal["anticausal"] = "anticausal"
    """
    'anticausal': the last hidden states of a second, gradient-free forward of the backbone in which position t attends
    to positions after t only.
    """

    future_k: int = 0
    """How many following positions a summary may attend to; 0 = all the future."""

    shift_k: int = 1
    """
    The prediction at t is compared with F_{t+shift}; above 1, the shift is sampled from 1..shift_k for each step, the
    same on all ranks.
    """

    respect_doc_boundaries: bool = True
    """Whether summaries stop at the end of their document (the tokenizer's EOS)."""

    temperature: float = 0.1
    """Temperature of the contrastive loss: cosines are divided by it."""

    loss_weight: float = 0.1
    """Weight of the contrastive loss beside the cross-entropy. At 0 it is not computed: a plain CE run."""

    negatives: Literal["global", "local"] = "global"
    """
    'global': the summaries of all data-parallel ranks are the negatives, so the loss does not depend on how the batch
    is spread over ranks. 'local': only this rank's own; no communication.
    """


@dataclass
class FuturePredictor:
    """The head that predicts the future summary from the causal hidden state h_t."""

    enable: bool = False
    """Whether there is a predictor. Needs `future_encoder.enable`."""

    head_type: Literal["linear", "mlp", "gated"] = "linear"
    """LayerNorm, then one linear map, or a GELU MLP, or a SiLU-gated MLP (both of twice the hidden size)."""

    dropout: float = 0.0
    """Dropout on the normalised input of the head."""


@dataclass
class Data:
    """Where local text comes from; `training.dataset` and `training.dataset_path` name the source."""

    text_field: str = "text"
    """The column that holds the text of a sample."""

    shuffle: bool = True
    """Whether documents are permuted, anew for each epoch."""

    rng_seed: int = 0
    """The integer that determines the permutation, with the epoch."""


@dataclass
class FlameJobConfig(JobConfig):
    """torchtitan's ``JobConfig`` and the sections of flame_ext."""

    seed: Seed = field(default_factory=Seed)
    future_encoder: FutureEncoder = field(default_factory=FutureEncoder)
    future_predictor: FuturePredictor = field(default_factory=FuturePredictor)
    data: Data = field(default_factory=Data)
