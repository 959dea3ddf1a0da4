"""torchtitan's ``Trainer`` with a seeded step 0 and the future objective; it overrides only what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed._functional_collectives as funcol
import torchtitan.train
import transformers
from torch import Tensor
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
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.objective.contrastive import ContrastiveOutput, info_nce
from flame_ext.objective.masks import doc_ids_from_eos, has_future, pair_mask
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
        encoder = job_config.future_encoder
        # At weight 0 neither the teacher nor the loss is run: the step is the host's own, number for number.
        self._trains_future = encoder.enable and encoder.loss_weight > 0
        if self._trains_future and encoder.respect_doc_boundaries and getattr(self.tokenizer, "eos_id", None) is None:
            raise ConfigError(
                f"future_encoder.respect_doc_boundaries needs an EOS token, which {job_config.model.hf_assets_path}/"
                "tokenizer_config.json does not name; name it there, or set respect_doc_boundaries = false"
            )
        self._parts: dict[str, Tensor] = {}
        self._shift = 1
        self._global_pairs = 1.0
        self.metrics_processor.step_metrics = self._step_metrics

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.metrics_processor.rewind(self.step)

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """As the host's, with the number of pairs of the whole step known before its first micro-batch."""
        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        self._parts = {}
        if self._trains_future:
            self._shift = self._shift_of_step()
            pairs = sum(self._pairs(self._doc_ids(inputs["input"])).sum() for inputs, _ in microbatches)
            mesh = self.parallel_dims.get_optional_mesh("batch")
            self._global_pairs = max(1.0, dist_utils.dist_sum(pairs.to(self.device), mesh))
        super().train_step(iter(microbatches))

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """One micro-batch. Returns the total loss: local sums over global numbers of tokens and of pairs."""
        if not self._trains_future:
            loss = super().forward_backward_step(
                input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
            )
            self._add_parts(loss_ce=loss)
            return loss
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
        doc_ids = self._doc_ids(inputs)
        with self.train_context():
            with self.maybe_enable_amp:
                bounded = self.job_config.future_encoder.respect_doc_boundaries
                summaries = self.model.future_encoder(self.model, inputs, doc_ids if bounded else None)
                output = self.model(inputs, **extra_inputs, **extra_kwargs, output="all")
                loss_ce = self.loss_fn(output.logits, labels) / global_valid_tokens
                predictions = output.future_predictions
                del output  # the logits, before the backward
            # Outside autocast: cosines and logits are float32.
            future = self._contrast(predictions, summaries, self._pairs(doc_ids))
            loss_future = future.loss_sum / self._global_pairs
            loss = loss_ce + self.job_config.future_encoder.loss_weight * loss_future
            loss.backward()
        self._add_parts(loss_ce=loss_ce, loss_future=loss_future, future_top1=future.top1_sum / self._global_pairs)
        return loss

    def _contrast(self, predictions: Tensor, summaries: Tensor, pairs: Tensor) -> ContrastiveOutput:
        """InfoNCE of the prediction at t with F_{t+shift}, over all positions in ``pairs``.

        Args:
            predictions: (B, T, D) float32, of unit length.
            summaries: (B, T, D).
            pairs: (B, T) bool.
        """
        # Row t of the keys is F_{t+shift}: what rolls over the end is masked, as the column is.
        keys = torch.nn.functional.normalize(summaries.float(), dim=-1).roll(-self._shift, dims=1).flatten(0, 1)
        mask = key_mask = pairs.flatten()
        targets = torch.arange(mask.numel(), device=mask.device)
        mesh = self.parallel_dims.get_optional_mesh("batch")
        if mesh is not None and self.job_config.future_encoder.negatives == "global":
            # Keys have no gradient, so gathering them is all there is to do.
            keys = funcol.all_gather_tensor(keys, 0, mesh.get_group())
            key_mask = funcol.all_gather_tensor(mask.to(torch.uint8), 0, mesh.get_group()).bool()
            targets = targets + mesh.get_local_rank() * mask.numel()
        temperature = self.job_config.future_encoder.temperature
        return info_nce(predictions.flatten(0, 1), keys, mask, key_mask, targets, temperature)

    def _doc_ids(self, input_ids: Tensor) -> Tensor:
        if self.job_config.future_encoder.respect_doc_boundaries:
            return doc_ids_from_eos(input_ids, self.tokenizer.eos_id)
        return torch.zeros_like(input_ids)

    def _pairs(self, doc_ids: Tensor) -> Tensor:
        return pair_mask(has_future(doc_ids), doc_ids, self._shift)

    def _shift_of_step(self) -> int:
        """The shift of this step, from the seed and the step alone: equal on all ranks, and after a resume."""
        generator = torch.Generator().manual_seed(self.job_config.seed.rng_seed * 1_000_003 + self.step)
        return int(torch.randint(1, self.job_config.future_encoder.shift_k + 1, (), generator=generator))

    def _add_parts(self, **parts: Tensor) -> None:
        for name, value in parts.items():
            value = value.detach()
            self._parts[name] = self._parts[name] + value if name in self._parts else value

    def _step_metrics(self) -> dict[str, float]:
        mesh = self.parallel_dims.get_optional_mesh("loss")
        return {name: dist_utils.dist_sum(value, mesh) for name, value in self._parts.items()}

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
        report = seed(target, path, self.job_config.seed, self._probe(), self._dump_folder)
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
        heads_config = None
        if self.model.head_names:
            heads_config = {
                "hidden_size": self.model.config.get_text_config().hidden_size,
                "future_encoder": dataclasses.asdict(config.future_encoder),
                "future_predictor": dataclasses.asdict(config.future_predictor),
            }
        spec = ExportSpec(
            config=self.model_args.load(),
            assets=Path(config.model.hf_assets_path),
            dtype=TORCH_DTYPE_MAP[config.checkpoint.export_dtype],
            heads_config=heads_config,
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
