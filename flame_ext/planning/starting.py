"""Writes the TOML of a first job for a model, with settings that a rehearsal says fit."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from flame_ext.errors import UserError
from flame_ext.hf_config import load_hf_config
from flame_ext.model.experts import has_experts
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.planning.plan import Machine, Plan, make_plan
from flame_ext.planning.remedies import smaller_batch
from flame_ext.seeding.sources.hub import locate

_TOKENS = 2**19  # of a step
_LENGTH = 4096
_BATCH = 8  # sequences of a rank at a time, more of which make no GPU faster

_TOML = """\
# {name} on {gpus} with {memory:g} GB of memory, continued with a head that predicts the future. Written by flame-ext init.
# {planned}
# Before a long run, prove what will be loaded:
#   torchrun --nproc_per_node {per_node} -m flame_ext.train --job.config_file THIS --seed.dry_run --seed.verify parity

[job]
dump_folder = {dump_folder}       # steps, exports and metrics; started again with it, a job continues

[model]
name = "hf_causal_lm"
flavor = "auto"                   # the model is what its config.json says
hf_assets_path = {assets}
converters = ["future_prediction"]

[checkpoint]
enable = true
initial_load_path = {source}
interval = 500
keep_latest_k = 3
async_mode = "async"
last_save_model_only = false
last_save_in_hf = true            # the last step is also exported as a Hugging Face folder
export_dtype = "bfloat16"

[future_encoder]                  # without it and [future_predictor]: plain continued pre-training
enable = true
summary_method = "anticausal"
respect_doc_boundaries = true
loss_weight = 0.1
negatives = "local"               # nothing is communicated

[future_predictor]
enable = true
head_type = "mlp"

[training]
dataset = "c4"                    # streamed; your own: docs/data.md
local_batch_size = {batch}              # sequences that a GPU computes at a time
global_batch_size = {sequences}           # sequences of a step, over all GPUs: {tokens:,} tokens
seq_len = {seq_len}
steps = 10000
max_norm = 1.0
dtype = "float32"                 # master weights
mixed_precision_param = "bfloat16"
mixed_precision_reduce = "float32"

[training.dataloader]
num_workers = {workers}                   # processes that tokenise while the GPU works

[optimizer]
name = "AdamW"
lr = 3e-5                         # about a tenth of what models of this kind were pre-trained with
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
implementation = "fused"

[lr_scheduler]                    # warmup, stable, cosine decay over the last fifth
warmup_steps = 500
decay_ratio = 0.2
decay_type = "cosine"
min_lr_factor = 0.1

[parallelism]
data_parallel_shard_degree = -1   # FSDP over all GPUs

[activation_checkpoint]
mode = "{checkpointing}"{pad}# "none" is faster and takes more memory, "full" slower and takes less
selective_ac_option = "op"        # keeps what is expensive to compute again

[compile]
enable = {compiled}
components = ["model", "loss"]

[metrics]
log_freq = 10
enable_tensorboard = true
"""


@dataclass(frozen=True)
class FirstJob:
    """The settings that depend on model and machine."""

    source: str  # as the user named it
    assets: str  # local folder with config.json and tokenizer
    machine: Machine
    seq_len: int
    compiled: bool  # not mixtures of experts, of which some cannot be
    batch: int = _BATCH
    checkpointing: str = "selective"

    @property
    def sequences(self) -> int:
        """Of a step: the batches of all ranks, so often that there are enough tokens."""
        of_all = self.batch * self.machine.ranks
        return of_all * math.ceil(_TOKENS / self.seq_len / of_all)

    def toml(self, planned: str = "Not planned yet.") -> str:
        name, ranks = self.source.removeprefix("hf://").rstrip("/").rsplit("/", 1)[-1], self.machine.ranks
        return _TOML.format(
            name=name,
            gpus=f"{ranks} GPU{'s, each' * (ranks > 1)}",
            memory=self.machine.memory,
            planned=planned,
            per_node=min(ranks, self.machine.ranks_of_node),
            dump_folder=json.dumps(f"outputs/{name}"),
            assets=json.dumps(self.assets),
            source=json.dumps(self.source),
            batch=self.batch,
            sequences=self.sequences,
            tokens=self.sequences * self.seq_len,
            seq_len=self.seq_len,
            workers=math.gcd(4, self.sequences // ranks),
            checkpointing=self.checkpointing,
            pad=" " * (25 - len(self.checkpointing)),
            compiled=str(self.compiled).lower(),
        )


def first_job(source: str, machine: Machine, say: Callable[[str], None] = lambda _text: None) -> str:
    """Returns the TOML of a job that fits, for a model at a path or ``hf://`` address; ``say`` is told of each attempt.

    Raises a UserError if there is no such model, preflight refuses the job, or nothing that is tried fits.
    """
    folder, _ = locate(source, with_tokenizer=True)
    text = load_hf_config(str(folder)).get_text_config()
    is_mixture = has_experts(build_hf_causal_lm(HFModelArgs(hf_assets_path=str(folder))))
    length = min(_LENGTH, getattr(text, "max_position_embeddings", None) or _LENGTH)
    found = None
    for job in _jobs(FirstJob(source, str(folder), machine, length, not is_mixture)):
        while found is None or not found.fits:
            found = _planned(job)
            used = f"{found.rehearsal.peak / 1e9:.1f} GB of a GPU's {machine.memory:g}"
            say(f"local_batch_size {job.batch}, checkpointing {job.checkpointing}: {used}")
            if found.fits:
                return job.toml(f"A rehearsal takes {used} (flame-ext plan THIS --gpus {machine.ranks}).")
            if (batch := smaller_batch(found)) is None:
                break
            job = replace(job, batch=batch)
    raise UserError(f"{source}: nothing that was tried fits {machine.ranks} x {machine.memory:g} GB; give more --gpus")


def _jobs(job: FirstJob) -> Iterator[FirstJob]:
    yield job
    yield replace(job, checkpointing="full")


def _planned(job: FirstJob) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.toml"
        file.write_text(job.toml())
        return make_plan([f"--job.config_file={file}"], job.machine)
