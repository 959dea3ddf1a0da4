"""torchtitan's ``Trainer`` with a seeded step 0 and the future objective; it overrides only what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torchtitan.train
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import MODEL
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

import flame_ext
from flame_ext.checkpoint.export import ExportSpec, export_hf
from flame_ext.checkpoint.manager import SeedingCheckpointManager
from flame_ext.config.sections import FlameJobConfig
from flame_ext.distributed import is_main_rank
from flame_ext.errors import ConfigError
from flame_ext.future_objective import FutureObjective, StepPlan, trains_future
from flame_ext.heads.converter import head_arguments
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.objective.cross_entropy import IGNORE_INDEX
from flame_ext.seeding.anticausal import prove_anticausal
from flame_ext.seeding.identity import changed_source
from flame_ext.seeding.key_names import KeyNames
from flame_ext.seeding.seed import SeedTarget, seed
from flame_ext.seeding.verify import Probe

# What the seeded model is measured on: plain text and a little code, long enough for any tokenizer.
PROBE_TEXT = (
    "The library sorts a list of records by the value of a key, and returns a new list. If two records have the same "
    "key, their order is kept. This is what most people expect, and it makes it possible to sort by several keys.\n\n"
    "def sort_by(records, key):\n    return sorted(records, key=lambda record: record[key])\n\n"
    "When a key is missing, an error is raised that names the record and the key. The caller decides what to do. "
    "Nothing is sorted in place, so that the original list can be used again after the call has returned.\n"
)
PROBE_LENGTH = 128


class FutureTrainer(torchtitan.train.Trainer):
    """Trains a :class:`HFCausalLM`, with or without heads. All its state is the host's."""

    job_config: FlameJobConfig

    def __init__(self, job_config: FlameJobConfig) -> None:
        self.seed_identity: dict[str, Any] | None = None
        """What the run grew from; every step's manifest carries it on."""
        manager = partial(
            SeedingCheckpointManager,
            seed=self._seed_from,
            export=self._export_step,
            facts=self._manifest_facts,
            resumed=self._resumed_from,
        )
        # The host's __init__ builds its CheckpointManager by this name and offers no other place to exchange it.
        with mock.patch.object(torchtitan.train, "CheckpointManager", manager):
            super().__init__(job_config)
        self.model: HFCausalLM = self.model_parts[0]
        # At weight 0 neither the teacher nor the losses are run: the step is the host's own, number for number.
        self.objective = self._build_objective() if trains_future(job_config) else None
        self._plan: StepPlan | None = None
        self._microbatch = 0
        self._parts: dict[str, Tensor] = {}
        self._part_names: list[str] = []
        self.metrics_processor.step_metrics = self._step_metrics
        if job_config.validation.enable:
            self.validator.evaluate, self.validator.reduce = self._evaluate, self._reduced

    def _build_objective(self) -> FutureObjective:
        config = self.job_config
        eos_id = getattr(self.tokenizer, "eos_id", None)
        if config.future_encoder.respect_doc_boundaries and eos_id is None:
            raise ConfigError(
                f"future_encoder.respect_doc_boundaries needs an EOS token, which {config.model.hf_assets_path}/"
                "tokenizer_config.json does not name; name it there, or set respect_doc_boundaries = false"
            )
        return FutureObjective(
            self.model,
            config,
            eos_id,
            self.parallel_dims.get_optional_mesh("batch"),
            self.maybe_enable_amp,
            TORCH_DTYPE_MAP[config.training.mixed_precision_param],
            self.device,
        )

    def init_distributed(self) -> ParallelDims:
        """As the host's, which with CPU offload asks for gloo beside the device's backend: on a CPU that is gloo, twice."""
        training = self.job_config.training
        offload = training.enable_cpu_offload
        training.enable_cpu_offload = offload and self.device.type != "cpu"
        try:
            return super().init_distributed()
        finally:
            training.enable_cpu_offload = offload

    # -- training ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """As the host's; with ``seed.dry_run``, everything up to step 1."""
        if not self.job_config.seed.dry_run:
            return super().train()
        self.checkpointer.load(step=self.job_config.checkpoint.load_step)
        logger.info(f"Dry run: stopped before step {self.step + 1}")

    _tokens_beside: int = 0
    """Tokens seen by all ranks, less the number of ranks times this rank's: not 0 where they could not be shared evenly."""

    def state_dict(self) -> dict[str, Any]:
        """As the host's, with the tokens that all ranks have seen: DCP keeps one rank's number for all of them."""
        ranks, _ = self._data_ranks()
        # Every rank reads as many tokens as any other, so no rank has to ask.
        return {"step": self.step, "tokens_seen": ranks * self.ntokens_seen + self._tokens_beside}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, tokens = state_dict["step"], state_dict["tokens_seen"]
        ranks, rank = self._data_ranks()
        self.ntokens_seen = tokens // ranks + (tokens % ranks if rank == 0 else 0)  # the host sums over ranks
        self._tokens_beside = tokens - ranks * self.ntokens_seen
        self.metrics_processor.rewind(self.step)

    def _data_ranks(self) -> tuple[int, int]:
        """Number of ranks that read different data, and this one's among them."""
        mesh = self.parallel_dims.get_optional_mesh("batch")
        return (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """As the host's, with the objective's plan of the whole step made before its first micro-batch."""
        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        self._parts, self._microbatch = {}, 0
        if self.objective is not None:
            self._plan = self.objective.plan(self.step, [(inputs["input"], labels) for inputs, labels in microbatches])
        super().train_step(iter(microbatches))

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """One micro-batch. Returns the total loss: local sums over global numbers of tokens and of pairs."""
        if self.objective is None:
            loss = super().forward_backward_step(
                input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
            )
            self._add_parts({"loss_ce": loss})
            return loss
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
        plan, index = self._plan, self._microbatch
        self._microbatch += 1
        with self.train_context():
            if plan is None:
                compute = self._idle_losses(labels, global_valid_tokens)
            else:
                self.objective.teach(plan, index)
                compute = self.objective.losses(plan, index, labels, global_valid_tokens)
            with self.maybe_enable_amp, self.objective.stopwatch.measure("student"):
                loss, parts = self.model(inputs, **extra_inputs, **extra_kwargs, compute=compute)
            loss.backward()
        if plan is None:
            self.objective.drop_idle_gradients()
        self._add_parts(parts)
        return loss

    def _idle_losses(self, labels: Tensor, global_valid_tokens: Tensor) -> Callable[[Tensor, Tensor], Any]:
        """For a step on which the objective's weights are 0 (``teacher_interval``, schedules)."""

        def compute(logits: Tensor, hidden_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = self.loss_fn(logits, labels) / global_valid_tokens
            return loss + self.objective.idle(hidden_states), {"loss_ce": loss.detach()}

        return compute

    def _evaluate(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Metrics of a validation batch, (B, T) inputs and labels, to be summed over ranks."""
        tokens = (labels != IGNORE_INDEX).sum()
        mesh = self.parallel_dims.get_optional_mesh("batch")
        tokens = max(1.0, tokens.item() if mesh is None else dist_utils.dist_sum(tokens, mesh))
        with self.train_context(), self.maybe_enable_amp:
            if self.objective is None:
                return {"loss_ce": self.loss_fn(self.model(inputs), labels) / tokens}
            plan = self.objective.plan_evaluation((inputs, labels))
            self.objective.teach(plan, 0)
            _, parts = self.model(inputs, compute=self.objective.losses(plan, 0, labels, tokens))
            return parts

    def _add_parts(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            value = value.detach()
            self._parts[name] = self._parts[name] + value if name in self._parts else value

    def _step_metrics(self, grad_norm: float) -> dict[str, float | None]:
        parts = self._reduced(self._parts)
        self._part_names = list(dict.fromkeys([*self._part_names, *parts]))
        metrics = {**dict.fromkeys(self._part_names), **parts}
        if self.objective is not None:
            # Gradients are clipped by now, all by one factor.
            unclipped = max(1.0, (grad_norm + 1e-6) / self.job_config.training.max_norm)
            for name, parameters in self._backbone_and_heads().items():
                metrics[f"grad_norm_{name}"] = _norm_of_gradients(parameters) * unclipped
            metrics |= {f"time_{name}": value for name, value in self.objective.stopwatch.seconds().items()}
        return metrics

    def _reduced(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """Sums over data-parallel ranks, in one collective."""
        values = torch.stack([value.float() for value in parts.values()])
        mesh = self.parallel_dims.get_optional_mesh("loss")
        if mesh is not None:
            dist.all_reduce(values, group=mesh.get_group())
        return dict(zip(parts, values.tolist(), strict=True))

    def _backbone_and_heads(self) -> dict[str, list[torch.nn.Parameter]]:
        heads = [p for name in self.model.head_names for p in self.model.get_submodule(name).parameters()]
        owned = {id(p) for p in heads}
        return {"backbone": [p for p in self.model.parameters() if id(p) not in owned], "heads": heads}

    # -- what the checkpoint manager calls -----------------------------------------------------------------------

    @property
    def _dump_folder(self) -> Path:
        return Path(self.job_config.job.dump_folder)

    def _seed_from(self, path: str) -> None:
        model: HFCausalLM = self.model_parts[0]
        state = self.checkpointer.states[MODEL].state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        shapes |= {name: shapes[key] for name, key in model.tied_keys.items()}
        target = SeedTarget(
            state=state,
            tied=model.tied_keys,
            computed_buffers=model.computed_buffers,
            inits=model.parameter_inits,
            vocabulary=frozenset(model.vocabulary_keys),
            names=KeyNames(
                type(model).__name__.removeprefix("Titan"), shapes, model.weight_transforms, model.base_model_prefix
            ),
            config=self.model_args.load(),
        )
        probe = self._probe()
        report = seed(target, path, self.job_config.seed, probe, self._dump_folder)
        if self.objective is not None and self.objective.anticausal and self.job_config.seed.verify != "none":
            # As long as those of the training: how masks are made and attended by depends on it.
            seq_len = self.job_config.training.seq_len
            tokens = probe.tokens.repeat(1, -(-seq_len // probe.tokens.shape[1]))[:, :seq_len]
            prove_anticausal(lambda tokens: self.objective.summaries(tokens).states, tokens)
            logger.info("Verified that no summary of the future depends on its past")
        self.seed_identity = report.identity
        self.metrics_processor.rewind(0)

    def _resumed_from(self, manifest: dict[str, Any]) -> None:
        self.seed_identity = manifest.get("seed")
        path, allow_pickle = self.job_config.checkpoint.initial_load_path, self.job_config.seed.allow_pickle
        if is_main_rank() and (change := changed_source(self.seed_identity, path, allow_pickle)) is not None:
            logger.warning(change)

    def _probe(self) -> Probe:
        training = self.job_config.training
        vocab_size = self.model_parts[0].config.get_text_config().vocab_size
        ids = self.tokenizer.encode(PROBE_TEXT)[: min(PROBE_LENGTH, training.seq_len)]
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
        model = self.model_parts[0]
        model.eval()
        try:
            with self.maybe_enable_amp:
                return model(tokens.to(self.device))
        finally:
            model.train()

    def _export_step(self, step: int) -> None:
        config = self.job_config
        spec = ExportSpec(
            config=self.model_args.load(),
            assets=Path(config.model.hf_assets_path),
            dtype=TORCH_DTYPE_MAP[config.checkpoint.export_dtype],
            heads=head_arguments(config, self.model.config, self.model) if self.model.head_names else None,
        )
        state = self.checkpointer.states[MODEL].state_dict()
        file_keys = self.model.file_keys(state)
        state = {file_keys[key]: tensor for key, tensor in state.items()}
        export_hf(state, self.model.head_names, self._dump_folder / "hf" / f"step-{step}", spec)

    def _manifest_facts(self) -> dict[str, Any]:
        """What a step's manifest records of its run; the seed's identity, so that a step knows what it grew from."""
        dims = self.parallel_dims
        return {
            "parallelism": {"dp_replicate": dims.dp_replicate, "dp_shard": dims.dp_shard},
            "versions": {
                "flame_ext": flame_ext.__version__,
                "torch": torch.__version__,
                "torchtitan": torchtitan.__version__,
                "transformers": transformers.__version__,
            },
            "seed": self.seed_identity,
        }


def _norm_of_gradients(parameters: list[torch.nn.Parameter]) -> float:
    """L2 norm of the gradients that there are. Collective where parameters are sharded."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
