"""The sections that flame_ext adds to torchtitan's ``JobConfig``. The string under a field is its ``--help``.

No ``from __future__ import annotations`` here: the host's ConfigManager reads ``field.type`` and needs types, not strings.
"""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from torchtitan.config import JobConfig
from torchtitan.config.job_config import Checkpoint as HostCheckpoint
from torchtitan.config.job_config import Training as HostTraining
from torchtitan.config.job_config import Validation as HostValidation


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

    key_map: list[str] = field(default_factory=list)
    """
    'old=new' for keys of the source that begin with `old`: `new` takes its place. For heads that were saved under other
    names, such as 'ln.=future_predictor.norm.'. Each has to fit a key.
    """

    allow_pickle: bool = False
    """Read a source that has `.bin` files only. They are pickles; they are read with `weights_only`, memory-mapped."""

    trust_remote_code: bool = False
    """Run the modelling code that lies in the model's folder, as transformers does under the same name."""

    dry_run: bool = False
    """Build the distributed model, seed it, prove it, write `seed_report.json` and stop before step 1."""


@dataclass
class HeadOptimization:
    """How a head's parameters are optimised: a parameter group of their own, saved and restored as such."""

    lr_scale: float = 1.0
    """Learning rate of this head's parameters, as a multiple of `optimizer.lr`."""

    weight_decay: float | None = None
    """Weight decay of this head's parameters; by default `optimizer.weight_decay`."""

    warmup_steps: int | None = None
    """Warm-up of this head's learning rate; by default `lr_scheduler.warmup_steps`."""


@dataclass
class OwnHead(HeadOptimization):
    """Base of the section of a user's own head (``flame_ext.heads.own.register_head``, docs/heads.md)."""

    enable: bool = False
    """Whether the head is attached. Needs the model converter 'future_prediction'."""

    loss_weight: float = 0.1
    """Weight of the head's loss beside the cross-entropy. At 0 it is not computed."""


@dataclass
class FutureEncoder(HeadOptimization):
    """What summarises the future: the target F_t (batch, sequence, hidden size) of the prediction."""

    enable: bool = False
    """Whether there is a future objective. Needs the model converter 'future_prediction'."""

    summary_method: Literal["anticausal", "mean", "max", "attention"] = "anticausal"
    """
    'anticausal': the last hidden states of a second, gradient-free forward of the backbone in which position t attends
    to positions after t only. 'mean', 'max', 'attention': the causal hidden states of the positions after t, pooled; no
    second forward, but these states have read the past.
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
    """Weight of the contrastive loss beside the cross-entropy. At 0 it is not computed."""

    loss_weight_warmup_steps: int = 0
    """Steps over which `loss_weight` rises linearly from 0."""

    loss_weight_decay_steps: int = 0
    """Steps at the end of the run over which `loss_weight` falls linearly to 0."""

    negatives: Literal["global", "local"] = "global"
    """
    'global': the summaries of all data-parallel ranks and, with the anticausal encoder, of all micro-batches of the step
    are the negatives: the loss depends on the global batch alone, however it is spread over ranks and accumulation.
    'local': only this rank's micro-batch; no communication.
    """

    detach_targets: bool = True
    """
    Whether pooled summaries are constants to the loss. If not, the gradient also goes through them into the backbone, and
    into the projections of 'attention', which otherwise stay as they were initialised. Anticausal ones always are.
    """

    teacher_fraction: float = 1.0
    """
    Share of each micro-batch's sequences, drawn anew each time, that the anticausal teacher runs on and the future is
    predicted in. Unbiased; `training.local_batch_size` times this has to be an integer.
    """

    teacher_interval: int = 1
    """Run the anticausal teacher on every n-th step only, with n times the weights. Unbiased."""

    teacher_attention: Literal["auto", "sdpa", "flex"] = "auto"
    """
    Attention of the anticausal forward: 'flex' (FlexAttention with a BlockMask), 'sdpa' (a boolean mask of all pairs of
    positions), 'auto': flex on CUDA where the backbone supports it, else sdpa, block by block where the window is short.
    """


@dataclass
class FuturePredictor(HeadOptimization):
    """The head that predicts the future summary from the causal hidden state h_t."""

    enable: bool = False
    """Whether there is a predictor. Needs `future_encoder.enable`."""

    head_type: Literal["linear", "mlp", "gated"] = "linear"
    """LayerNorm, then one linear map, or a GELU MLP, or a SiLU-gated MLP (both of twice the hidden size)."""

    dropout: float = 0.0
    """Dropout on the normalised input of the head."""

    freeze_backbone: bool = False
    """Train the heads alone: a probe of what the backbone already knows about the future."""


@dataclass
class ActionLayer(HeadOptimization):
    """The head that predicts the future summary after each candidate for the next token, and rewards the candidates by it."""

    enable: bool = False
    """Whether there is an action layer. Needs `future_encoder.enable`."""

    head_type: Literal["mlp", "tower"] = "mlp"
    """
    'mlp': a GELU MLP on h_t and the candidate's embedding side by side. 'tower': a residual SwiGLU tower for each, that
    meet in a product.
    """

    use_rms_norm: bool | None = None
    """RMSNorm on the inputs, else LayerNorm; by default what the backbone has."""

    ffn_hidden_size: int | None = None
    """Width of the hidden layers; by default the backbone's `intermediate_size`."""

    top_k: int = 8
    """Candidates: the k likeliest next tokens, and the true one."""

    tau: float = 0.1
    """Temperature of the rewards: softmax(cosine / tau) over the candidates."""

    loss_weight: float = 0.1
    """Weight of the policy loss, -sum_a r_a log p(a), in which the rewards are constants."""

    loss_weight_warmup_steps: int = 0
    """Steps over which `loss_weight` rises linearly from 0; rewards mean nothing before the head has learned."""

    loss_weight_decay_steps: int = 0
    """Steps at the end of the run over which `loss_weight` falls linearly to 0."""

    model_loss_weight: float = 0.1
    """Weight of the loss that trains the head: to predict F_t from the true token, against other candidates and positions."""


@dataclass
class DataSource:
    """A table `[[data.sources]]`: one source of documents."""

    path: str = ""
    """
    A file, a glob or a folder of `.jsonl`, `.json` (each also `.gz`, `.zst`), `.parquet`, `.arrow`, `.txt` or flat `.npy` token
    files; a folder of `save_to_disk`; a dataset on the Hub; or a name in the host's registry, such as 'c4'.
    """

    name: str = ""
    """Configuration of a dataset on the Hub."""

    split: str = "train"
    """Split of a dataset on the Hub, or of a saved dictionary of datasets."""

    data_files: list[str] = field(default_factory=list)
    """Files of a dataset on the Hub, or globs; empty = all."""

    text_field: str = "text"
    """The column that holds a document. Where it is absent, `input_ids` is taken, which holds tokens."""

    label: str = ""
    """Under which metrics report this source; by default the last part of its path."""

    weight: float = 1.0
    """Share of documents that are taken from this source, in proportion to the other weights."""

    streaming: bool = False
    """
    Read files from their beginning, without a copy in the cache of the datasets library. Documents are then permuted in
    blocks of 1,024, and files as a whole.
    """

    max_samples: int | None = None
    """Take only the first documents. Of a source that is streamed, they are kept in memory."""

    when_exhausted: Literal["repeat", "drop"] = "repeat"
    """At its end: begin again, in another order, or go on with the other sources. Without any left, the run ends."""

    skip_unreadable: bool = False
    """Pass over lines that can not be read, and count them, instead of stopping there."""

    tokens_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Of `.npy` files without a header, as OLMo's are."""

    @property
    def reported_as(self) -> str:
        """See `label`."""
        return self.label or PurePath(self.path).name or self.path


@dataclass
class Data:
    """Where text comes from and in which order; without `sources`, `training.dataset` and `training.dataset_path` name it."""

    sources: list[DataSource] = field(default_factory=list)
    """Tables `[[data.sources]]`: several are mixed by weight."""

    text_field: str = "text"
    """The column that holds the text of a sample of `training.dataset`."""

    shuffle: bool = True
    """Whether documents are permuted, anew for each epoch."""

    rng_seed: int = 0
    """The integer that determines the permutation, with the epoch."""

    document_attention: bool = False
    """
    Whether the causal attention stays within a document, whose positions then count from 0. By default it goes across, as the
    host's does. What the mask costs is noted in docs/data.md.
    """


@dataclass
class Training(HostTraining):
    """torchtitan's section, with an end that the data determine."""

    epochs: int = 0
    """
    End when every source has been read this often, to the last token, instead of after `steps`: these are then counted before
    step 1, for which each rank reads all of its own once. 0 = `steps`.
    """


@dataclass
class Validation(HostValidation):
    """torchtitan's section, with sources of its own."""

    sources: list[DataSource] = field(default_factory=list)
    """
    Tables `[[validation.sources]]`, evaluated one by one, in the order of their documents, the same batches every time, and
    reported by their labels. Empty: `validation.dataset`.
    """


@dataclass
class Checkpoint(HostCheckpoint):
    """torchtitan's section, with what a resumed run has to agree on and when a run gives up."""

    allow_config_change: list[str] = field(default_factory=list)
    """
    Full names of options, such as 'optimizer.lr', that may differ from those of the run that saved the step. A change of
    any other that determines the numbers of the run is an error.
    """

    max_nonfinite_steps: int = 10
    """Stop after this many steps in a row whose gradient norm is not finite."""


@dataclass
class Export:
    """Hugging Face folders of the run, `hf/step-N/` in `job.dump_folder`, beside the last one (`checkpoint.last_save_in_hf`)."""

    interval: int = 0
    """
    Export every so many steps, a multiple of `checkpoint.interval`: another process converts the saved step while training
    goes on. 0 = only the last step.
    """

    max_shard_size: str = "5GB"
    """Of the files of an export."""


@dataclass
class FlameJobConfig(JobConfig):
    """torchtitan's ``JobConfig`` and the sections of flame_ext."""

    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    seed: Seed = field(default_factory=Seed)
    future_encoder: FutureEncoder = field(default_factory=FutureEncoder)
    future_predictor: FuturePredictor = field(default_factory=FuturePredictor)
    action_layer: ActionLayer = field(default_factory=ActionLayer)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    export: Export = field(default_factory=Export)


def sequence_lengths(config: FlameJobConfig) -> dict[str, int]:
    """``seq_len`` of each section that has batches."""
    lengths = {"training": config.training.seq_len}
    return lengths | ({"validation": config.validation.seq_len} if config.validation.enable else {})
