"""The sections that flame_ext adds to torchtitan's ``JobConfig``. The string under a field is its ``--help``."""

# Without "from __future__ import annotations": torchtitan's ConfigManager needs types in field.type, not strings.
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from flame_ext.config.head_options import HEAD_NAMES
from flame_ext.host.names import JobConfig, job_config


@dataclass
class Seed:
    """How step 0 gets its weights from ``checkpoint.initial_load_path``."""

    new_parameters: list[str] = field(default_factory=lambda: [f"{name}.*" for name in HEAD_NAMES])
    """Patterns (fnmatch) of parameters that may be missing from the source. Those that are missing are initialised from `rng_seed`
    and their name; a parameter that is missing without being declared here is an error."""

    rng_seed: int = 0
    """This integer and a parameter's name determine the initial values of a new parameter."""

    verify: Literal["finite", "parity", "none"] = "finite"
    """What is proved after seeding. 'finite': every weight that was read is finite. 'parity': also, loss and logits on fixed tokens
    equal those of `from_pretrained` (rank 0 reads the source once more, and holds two layers of it at a time). 'none': neither. In
    all cases every element was written exactly once, and a loss near chance gives a warning."""

    ignore_source_keys: list[str] = field(default_factory=list)
    """Patterns (fnmatch) of keys in the source that are not read. Any other key that the model lacks is an error."""

    key_map: list[str] = field(default_factory=list)
    """'old=new' replaces `old` at the beginning of the source's keys, such as 'ln.=future_predictor.norm.'; a `*` on both sides is
    one part of a key, such as a layer's number. Each must match a key."""

    allow_config_difference: list[str] = field(default_factory=list)
    """Full names of fields of `config.json`, such as 'rope_parameters.rope_theta', that are meant to differ from the source's. A
    difference in any other field that determines what the weights compute is an error."""

    allow_pickle: bool = False
    """Read a source that has only `.bin` files. These are pickles; they are read with `weights_only`, memory-mapped."""

    trust_remote_code: bool = False
    """Run the modelling code in the model's folder, as the option of this name in transformers does."""

    follow_links: bool = False
    """Read files of `initial_load_path` and of `model.hf_assets_path` that are links out of their folder, such as into a store of
    weights beside it. Exports hold copies of the files behind the links. Links of the Hub's cache need no option."""

    resize_vocabulary: bool = False
    """Where the tokenizer at `model.hf_assets_path` has more ids than the source's embeddings have rows, add rows for them; nothing
    grows otherwise, unless `pad_vocabulary_to_multiple_of` asks for it. A vocabulary never becomes smaller."""

    new_rows: Literal["mean", "subwords", "random"] = "mean"
    """What the rows of new tokens are made of. 'mean': the mean of the source's rows. 'subwords': the mean of the rows of the pieces
    that the source's own tokenizer makes of the token; of special tokens, and where there is no piece, the mean of all. 'random':
    uniform, with the standard deviation `initializer_range` of `config.json`, by `rng_seed`."""

    pad_vocabulary_to_multiple_of: int = 1
    """With `resize_vocabulary`, round the rows of the embeddings up to a multiple of this: tensor parallelism wants one of its
    degree, and matrix products are faster with one of 64 or 128. Rows that no token has are the mean of the source's rows."""

    dry_run: bool = False
    """Build the distributed model, seed it, prove it, write `seed_report.json` and stop before step 1."""


@dataclass
class DataSource:
    """A table `[[data.sources]]`: one source of documents."""

    path: str = ""
    """A file, a glob or a folder of `.jsonl`, `.json` (each also `.gz`, `.zst`), `.parquet`, `.arrow`, `.txt` or flat `.npy` token
    files; a folder of `save_to_disk`; either in an object store, by its URL (`s3://`, `gs://`), but for `.npy`; a dataset on the Hub; or
    a name in torchtitan's registry, such as 'c4'."""

    name: str = ""
    """Configuration of a dataset on the Hub."""

    split: str = "train"
    """Split of a dataset on the Hub, or of a saved dictionary of datasets."""

    data_files: list[str] = field(default_factory=list)
    """Files of a dataset on the Hub, or globs; empty = all."""

    text_field: str = "text"
    """The column that holds a document's text. Where it is absent, token ids are read from `input_ids`."""

    label: str = ""
    """The name of this source in metrics; by default the last part of its path."""

    weight: float = 1.0
    """The share of documents that come from this source is this weight over the sum of all weights."""

    streaming: bool = False
    """Read files sequentially, without a copy in the datasets library's cache, and permute files, and documents in blocks of 1,024."""

    max_samples: int | None = None
    """Read only this many documents, the first ones. Those of a streamed source are kept in memory."""

    when_exhausted: Literal["repeat", "drop"] = "repeat"
    """At the source's end, begin again in another order, or go on with the other sources. The run ends when none is left."""

    skip_unreadable: bool = False
    """Skip and count lines, rows and text files that cannot be read, instead of stopping there."""

    tokens_dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None
    """Type of the tokens in `.npy` files without NumPy's header, which need it; OLMo's are 'uint16'."""

    @property
    def reported_as(self) -> str:
        """The label, or the last part of the path."""
        return self.label or PurePath(self.path).name or self.path


@dataclass
class Data:
    """Where text comes from and in which order. Without `sources`, `training.dataset` and `training.dataset_path` name it."""

    sources: list[DataSource] = field(default_factory=list)
    """Tables `[[data.sources]]`; several sources are mixed by weight."""

    text_field: str = "text"
    """The column that holds the text of a sample of `training.dataset`."""

    shuffle: bool = True
    """Whether documents are permuted, differently in each epoch."""

    rng_seed: int = 0
    """This integer and the epoch determine the permutation."""

    reverse: bool = False
    """Read every packed sequence of training and validation from its last token to its first: the model learns the text from right to
    left, and its exports say so. Such a model can be `future_encoder.reverse_model`."""

    document_attention: bool = False
    """Keep causal attention within a document, whose positions then count from 0 (docs/data.md). torchtitan's crosses documents."""


@dataclass
class Training(job_config.Training):
    """torchtitan's section, an end after whole epochs, and what is not trained."""

    epochs: int = 0
    """End after this many passes over every source, instead of after `steps`. Each rank then reads its data once before step 1 to
    count the steps. 0 = `steps`."""

    freeze: list[str] = field(default_factory=list)
    """Patterns (fnmatch) of parameters, heads' included, that stay as the source has them, without gradients and moments, such as
    'model.embed_tokens.*'. Names are those of the exports' files, or, where transformers renames or stacks, of its model. Each
    pattern must match one."""


@dataclass
class Optimizer(job_config.Optimizer):
    """torchtitan's section, and Muon."""

    name: Literal["AdamW", "Adam", "Muon"] = "AdamW"
    """'Muon': orthogonal updates of the backbone's linear layers, and AdamW for embeddings, vectors, stacks of experts and heads
    (docs/running.md)."""

    muon_momentum: float = 0.95
    """The share of its past that the momentum of Muon keeps in a step."""


@dataclass
class Validation(job_config.Validation):
    """torchtitan's section, and sources as those of `[data]`."""

    sources: list[DataSource] = field(default_factory=list)
    """Tables `[[validation.sources]]`. Each is evaluated separately, in the order of its documents, on the same batches every time,
    and reported by its label. Empty: `validation.dataset`."""


@dataclass
class Checkpoint(job_config.Checkpoint):
    """torchtitan's section, and which changes a resumed run may have and when a run gives up."""

    allow_config_change: list[str] = field(default_factory=list)
    """Full names of options, such as 'optimizer.lr', that may differ from the run that saved the step. A change of any other option
    that determines the numbers of the run is an error."""

    max_nonfinite_steps: int = 10
    """Stop after this many steps in a row whose gradient norm is not finite."""

    take_over_lock: bool = False
    """Take `job.dump_folder` over from a run that seems to use it, which you know to have ended; if it has not, it will end."""


@dataclass
class Metrics(job_config.Metrics):
    """torchtitan's section, and how trackers name a run."""

    enable_trackio: bool = False
    """Whether to log to trackio, which keeps records on this machine (`pip install 'flame_ext[trackio]'`; `trackio show`)."""

    project: str = ""
    """The project at W&B and trackio. Empty: `WANDB_PROJECT` or 'torchtitan' at W&B, 'flame_ext' at trackio."""

    run_name: str = ""
    """The run's name at W&B and trackio, which tells runs apart by name, so that an id follows it there. Empty: W&B makes a name, and
    at trackio it is that of `job.dump_folder`."""

    run_group: str = ""
    """Runs of one group are shown together at W&B and trackio, such as those of a sweep."""

    run_tags: list[str] = field(default_factory=list)
    """Tags at W&B; at trackio a part of the configuration. The whole configuration is recorded at both."""


@dataclass
class Moe:
    """Mixtures of experts: how experts are run, and what becomes of their routers. Dense models have neither."""

    experts_implementation: Literal["auto", "grouped_mm", "batched_mm", "eager"] = "auto"
    """How the experts of a layer are run, by transformers' names: one product for all experts, one for each token (which copies
    weights), or a loop. 'auto': 'grouped_mm' where the architecture has it, else 'eager'. On a device without a kernel for it
    'grouped_mm' is a loop as well, with one wait for the device in each layer."""

    aux_loss_coef: float | None = None
    """Coefficient of the routers' auxiliary loss, `load_balancing_loss_func` of the architecture in transformers. Absent: the
    `router_aux_loss_coef` of `config.json`, also where its `output_router_logits` is false. 0 = no such loss."""

    balance_over: Literal["step", "micro_batch"] = "step"
    """The tokens over which the auxiliary loss takes its means: those of the step on all ranks, or those of one micro-batch on all
    ranks. With accumulation or a pipeline 'step' runs one more forward, without gradients, to count the tokens of each expert."""

    bias_update_rate: float = 0.0
    """After each step, add this to the `e_score_correction_bias` of each expert with fewer tokens than the mean of its layer, and
    subtract it for those with more (DeepSeek-V3: 0.001). 0 = the biases stay as they are."""

    freeze_router: bool = False
    """Whether the routers' parameters stay as they are, without gradients and moments; the log names them. Their
    `e_score_correction_bias` is none of them."""


@dataclass
class Loss:
    """The cross-entropy of the next token, as a part of the loss. Metrics have it as it is (`loss_ce`)."""

    ce_weight: float = 1.0
    """Its weight. 0 leaves the training to the heads alone."""

    weighting: Literal["none", "dft"] = "none"
    """'dft': each token's cross-entropy times its own probability, which has no gradient (dynamic fine-tuning, arXiv 2508.05629);
    reported as `loss_dft`."""

    mix_ce: float = 0.0
    """With a `weighting`, the share of the plain cross-entropy in 0..1; the rest is weighted."""


ALL_LINEAR = "all-linear"


@dataclass
class Lora:
    """Adapters of low rank beside linear layers of the decoder layers, by `peft`, whose `LoraConfig` has options of these names. With
    `"lora"` in `model.converters`, before `"future_prediction"`, they and the heads alone are trained (docs/adapters.md)."""

    r: int = 16
    """Rank of the adapters."""

    lora_alpha: int = 32
    """The adapters' output is multiplied by this over `r`."""

    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""

    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Names of linear layers, or the ends of their full names, such as 'q_proj'; or 'all-linear' alone: every one in the decoder layers,
    but for those whose names peft takes for stacked experts."""

    use_rslora: bool = False
    """Multiply by `lora_alpha` over the square root of `r` (arXiv 2312.03732)."""


@dataclass
class Export:
    """Exports to Hugging Face folders, `hf/step-N/` in `job.dump_folder`, beside that of the last step (`checkpoint.last_save_in_hf`)."""

    interval: int = 0
    """Export every this many steps, a multiple of `checkpoint.interval`, in another process. 0 = only the last step."""

    max_shard_size: str = "5GB"
    """Maximum size of each file of an export."""

    upload: str = ""
    """Copy each export to `step-N` under this URL of an object store, such as 's3://bucket/prefix' (docs/running.md)."""

    push_to_hub: str = ""
    """Push exports to this repository of models on the Hugging Face Hub, 'org/name', each as a commit and the revision `step-N`, with
    the token in `HF_TOKEN`."""

    push: Literal["every", "last"] = "every"
    """Which exports are pushed."""

    hub_private: bool = True
    """Whether the repository is made private; one that is public is refused then."""


@dataclass
class Evaluation:
    """Evaluates exports by EleutherAI's lm-evaluation-harness (`pip install 'flame_ext[eval]'`), whose options have these names, in
    another process while training goes on ([evaluation.md](evaluation.md))."""

    tasks: list[str] = field(default_factory=list)
    """Names or patterns of tasks, groups and tags of lm-eval, and paths of YAML files or folders of tasks of your own, which contain
    a `/` or end in `.yaml`. Empty = no evaluation."""

    interval: int = 0
    """Evaluate the exports of every this many steps, a multiple of `export.interval`, and that of the last step. 0 = that alone."""

    include_path: list[str] = field(default_factory=list)
    """Folders of tasks of your own, to be named in `tasks`."""

    num_fewshot: int | None = None
    """Examples before each question. Absent: what each task says. A task that says 0 keeps to it."""

    limit: float | None = None
    """Take only this many examples of each task, the first ones; below 1, this share of them."""

    batch_size: int = 8
    """Requests that are computed at once."""

    apply_chat_template: bool = False
    """Whether to ask in the format of the tokenizer's chat template."""

    device: str = "cpu"
    """Where the model is put: 'cpu', or a device with memory for it beside training, such as one that no rank uses: 'cuda:7'."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the weights are computed in. 'auto': as the export has them (`checkpoint.export_dtype`)."""


@dataclass
class FlameJobConfig(JobConfig):
    """torchtitan's ``JobConfig`` and the sections of flame_ext, to which every head adds its own (heads/registry.py)."""

    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    seed: Seed = field(default_factory=Seed)
    data: Data = field(default_factory=Data)
    metrics: Metrics = field(default_factory=Metrics)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    validation: Validation = field(default_factory=Validation)
    loss: Loss = field(default_factory=Loss)
    lora: Lora = field(default_factory=Lora)
    export: Export = field(default_factory=Export)
    evaluation: Evaluation = field(default_factory=Evaluation)
    moe: Moe = field(default_factory=Moe)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A head's section."""


def sequence_lengths(config: FlameJobConfig) -> dict[str, int]:
    """The ``seq_len`` of ``training`` and, where it is enabled, of ``validation``, by section."""
    lengths = {"training": config.training.seq_len}
    return lengths | ({"validation": config.validation.seq_len} if config.validation.enable else {})


def loss_compile_backend(config: JobConfig) -> str | None:
    """The backend that the losses' arithmetic is compiled with (``compile.components`` has "loss"); None = not compiled."""
    return config.compile.backend if config.compile.enable and "loss" in config.compile.components else None
