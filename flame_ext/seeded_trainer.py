"""The side of the trainer that faces checkpoints: step 0 and its proof, what a resumed step has to agree with, exports."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.train
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import MODEL
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger

import flame_ext
from flame_ext.checkpoint.card import card_of_step
from flame_ext.checkpoint.export import ExportSpec, StagedReader, export_hf
from flame_ext.config.resume_record import asset_digests, check_unchanged, config_digest, config_record
from flame_ext.config.sections import FlameJobConfig
from flame_ext.distributed import is_main_rank
from flame_ext.future_objective import FutureObjective
from flame_ext.heads.converter import head_arguments
from flame_ext.model.causal_attention import causal_attention
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.pipeline import Pipeline
from flame_ext.run.optimization import configured_again
from flame_ext.seeding.identity import changed_source
from flame_ext.seeding.proof.anticausal import prove_anticausal
from flame_ext.seeding.proof.parity import TOLERANCE, Probe
from flame_ext.seeding.proof.parts import prove_context_parallel
from flame_ext.seeding.seed import seed
from flame_ext.seeding.target import seed_target, whole_state

# What the seeded model is measured on: plain text and a little code, long enough for any tokenizer.
PROBE_TEXT = (
    "The library sorts a list of records by the value of a key, and returns a new list. If two records have the same "
    "key, their order is kept. This is what most people expect, and it makes it possible to sort by several keys.\n\n"
    "def sort_by(records, key):\n    return sorted(records, key=lambda record: record[key])\n\n"
    "When a key is missing, an error is raised that names the record and the key. The caller decides what to do. "
    "Nothing is sorted in place, so that the original list can be used again after the call has returned.\n"
)
PROBE_LENGTH = 128


class SeededTrainer(torchtitan.train.Trainer):
    """What the checkpoint manager calls. :class:`flame_ext.trainer.FutureTrainer` trains."""

    job_config: FlameJobConfig
    model: HFCausalLM
    """On a pipeline this rank's last stage; the heads are on the last of all."""
    pipeline: Pipeline | None
    objective: FutureObjective | None
    run_id: str | None = None
    """Names the run in its steps, from its step 0 on."""
    seed_identity: dict[str, Any] | None = None
    """What the run grew from; every step's manifest carries it on."""
    _finishing: bool = False

    @property
    def _dump_folder(self) -> Path:
        return Path(self.job_config.job.dump_folder)

    def _seed_from(self, path: str) -> None:
        state = self.checkpointer.states[MODEL].state_dict()
        target = seed_target(self.model, state, self.model_args.load())
        probe = self._probe()
        report = seed(target, path, self.job_config.seed, probe, self._dump_folder)
        if self.model.context is not None and self.job_config.seed.verify != "none":
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # as for the probe
                shared, whole = partial(self._shared_probe_forward, probe.tokens), partial(probe.forward, probe.tokens)
                prove_context_parallel(shared, whole, TOLERANCE[probe.compute_dtype])
            logger.info("Verified that sequences in parts give the logits of whole ones")
        objective = self.objective
        if objective is not None and objective.anticausal and self.job_config.seed.verify != "none":
            # As long as those of the training: how masks are made and attended by depends on it.
            seq_len = self.job_config.training.seq_len
            tokens = probe.tokens.repeat(1, -(-seq_len // probe.tokens.shape[1]))[:, :seq_len]
            prove_anticausal(partial(self._summaries, objective), tokens)
            logger.info("Verified that no summary of the future depends on its past")
        self.seed_identity = report.identity
        run_id = [uuid.uuid4().hex]
        dist.broadcast_object_list(run_id, src=0)
        self.run_id = run_id[0]
        self.metrics_processor.rewind(0)

    def _resumed_from(self, manifest: dict[str, Any], where: Path) -> Callable[[], None]:
        """Check a step before it is loaded; the result is to be called after.

        Raises:
            ConfigError: on every rank alike, if the step is of a run with other numbers.
            CheckpointError: its position in the data does not fit.
        """
        allowed = self.job_config.checkpoint.allow_config_change
        changes = check_unchanged(manifest.get("config", {}), self._record, allowed, str(where))
        if not manifest.get("model_only"):
            self.dataloader.require_layout(manifest.get("data"))
        for change in changes:
            logger.warning(f"Changed since {where.name}, as checkpoint.allow_config_change permits: {change}")
        self.seed_identity = manifest.get("seed")
        self.run_id = manifest.get("run")
        path, allow_pickle = self.job_config.checkpoint.initial_load_path, self.job_config.seed.allow_pickle
        if is_main_rank() and (other := changed_source(self.seed_identity, path, allow_pickle)) is not None:
            logger.warning(other)
        return configured_again(self.optimizers, self.lr_schedulers) if changes else lambda: None

    def _probe(self) -> Probe:
        training = self.job_config.training
        vocab_size = self.model_parts[0].config.get_text_config().vocab_size
        ids = self.tokenizer.encode(PROBE_TEXT)[: min(PROBE_LENGTH, training.seq_len)]
        divisor = self.parallel_dims.seq_len_divisor
        ids = ids[: len(ids) // divisor * divisor]  # sequence and context parallelism share positions out
        param_dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
        dtype = TORCH_DTYPE_MAP[training.dtype]
        return Probe(
            tokens=torch.tensor([ids]),
            forward=self._probe_forward,
            context=self.maybe_enable_amp,
            # FSDP shows the layers parameters in the mixed-precision dtype; autocast leaves them as they are.
            dtype=param_dtype if self.parallel_dims.fsdp_enabled else dtype,
            compute_dtype=torch.bfloat16 if torch.bfloat16 in (param_dtype, dtype) else torch.float32,
            device=self.device,
            vocab_size=vocab_size,
        )

    def _probe_forward(self, tokens: Tensor) -> Tensor:
        for part in self.model_parts:
            part.eval()
        try:
            with self.maybe_enable_amp:
                if self.pipeline is None:
                    logits = self.model(tokens.to(self.device))
                else:
                    found = self.pipeline.forward(tokens.to(self.device), lambda _rows: {"compute": _whole_logits})
                    logits = self.pipeline.from_last(None if found is None else torch.cat(found))
                return _whole_logits(logits)
        finally:
            for part in self.model_parts:
                part.train()

    def _shared_probe_forward(self, tokens: Tensor) -> Tensor:
        """(1, T) tokens to (1, T, V) logits, by ranks that have a part of the sequence each. Collective."""
        context, tokens = self.model.context, tokens.to(self.device)
        assert context is not None
        self.model.eval()
        try:
            with self.maybe_enable_amp:
                logits = self.model(context.shard(tokens), **self._attention_of({"input": tokens}))
            return context.unshard(_whole_logits(logits))
        finally:
            self.model.train()

    def _attention_of(self, input_dict: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Any]:
        within_documents = self.job_config.data.document_attention
        return causal_attention(self.model_parts[0], input_dict, within_documents, self.device, rows)

    def _summaries(self, objective: FutureObjective, tokens: Tensor) -> Tensor:
        """(1, T) tokens to (1, T, D) summaries, on every rank. Collective."""
        summaries = objective.summaries(tokens)
        states = None if summaries is None else summaries.states
        if self.pipeline is not None:
            states = self.pipeline.from_last(states)
        assert states is not None
        return states

    def _export_step(self, step: int) -> None:
        config = self.job_config
        spec = ExportSpec(
            config=self.model_args.load(),
            assets=Path(config.model.hf_assets_path),
            dtype=TORCH_DTYPE_MAP[config.checkpoint.export_dtype],
            heads=self._head_arguments,
            max_shard_size=config.export.max_shard_size,
            card=card_of_step(self._dump_folder / "checkpoint" / f"step-{step}") if is_main_rank() else None,
        )
        state, whole = self.checkpointer.states[MODEL].state_dict(), self.model.whole
        full = whole_state(self.model, state)
        file_keys = whole.file_keys(full)
        read = None
        if self.pipeline is not None:
            read = StagedReader({file_keys[key]: tensor for key, tensor in state.items()}, self.pipeline.group)
        export_hf(
            {file_keys[key]: tensor for key, tensor in full.items()},
            whole.head_names,
            self._dump_folder / "hf" / f"step-{step}",
            spec,
            read,
        )

    @cached_property
    def _head_arguments(self) -> dict[str, dict[str, Any]] | None:
        whole = self.model.whole
        return head_arguments(self.job_config, whole.config, whole) if whole.head_names else None

    @cached_property
    def _record(self) -> dict[str, Any]:
        config, dims = self.job_config, self.parallel_dims
        assets = asset_digests(Path(config.model.hf_assets_path), code=config.seed.trust_remote_code)
        return config_record(config, data_parallel_degree=dims.dp_replicate * dims.dp_shard, assets=assets)

    def _manifest_facts(self) -> dict[str, Any]:
        """What a step's manifest records of its run; the seed's identity, so that a step knows what it grew from."""
        dims = self.parallel_dims
        inner = {"cp": dims.cp, "tp": dims.tp, "pp": dims.pp}
        return {
            "parallelism": {"dp_replicate": dims.dp_replicate, "dp_shard": dims.dp_shard, **inner},
            "versions": {
                "flame_ext": flame_ext.__version__,
                "torch": torch.__version__,
                "torchtitan": torchtitan.__version__,
                "transformers": transformers.__version__,
            },
            "seed": self.seed_identity,
            "heads": self._head_arguments,
            "run": self.run_id,
            "data": self.dataloader.layout,
            "config": self._record,
            "config_sha256": config_digest(self._record),
            "finished": self._finishing or self.step >= self.job_config.training.steps,
        }


def _whole_logits(logits: Tensor, _hidden_states: Tensor | None = None) -> Tensor:
    """Of loss parallelism, each of whose ranks has a part of the vocabulary. Collective."""
    return logits.full_tensor() if isinstance(logits, DTensor) else logits
