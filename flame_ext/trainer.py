"""torchtitan's ``Trainer`` with a seeded step 0 and the future objective; it overrides only what differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torchtitan.train
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import DATALOADER
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

from flame_ext.checkpoint.manager import SeedingCheckpointManager
from flame_ext.checkpoint.steps import CompleteStep
from flame_ext.config.sections import FlameJobConfig
from flame_ext.data.sources import sources_of
from flame_ext.distributed import failing_together, is_main_rank
from flame_ext.errors import CheckpointError, ConfigError, SeedError, UserError
from flame_ext.future_objective import FutureObjective, StepPlan, trains_future
from flame_ext.heads.own import Losses, OwnHeadLosses, trains_own_heads
from flame_ext.model.parallelize import sum_over_replicas
from flame_ext.model.shared_embedding import SharedEmbedding
from flame_ext.objective.cross_entropy import IGNORE_INDEX
from flame_ext.run.background_export import BackgroundExports
from flame_ext.run.lock import FolderLock
from flame_ext.run.signals import Circumstances, StopSignals, agree
from flame_ext.seeded_trainer import SeededTrainer
from flame_ext.seeding.sources.open import open_source


class FutureTrainer(SeededTrainer):
    """Trains a :class:`HFCausalLM`, with or without heads. All its state is the host's.

    Args:
        job_config: checked.
        signals: asked before every step; None = no signal stops the run.
    """

    def __init__(self, job_config: FlameJobConfig, signals: StopSignals | None = None) -> None:
        self._signals = signals or StopSignals()
        self._lock = FolderLock(Path(job_config.job.dump_folder))
        self._stopping = self._finishing = False
        self._grad_norm = 0.0
        self._nonfinite_steps = 0
        self.skipped_steps = 0
        """Steps without an update, since the gradient was not finite; of this process."""
        manager = partial(
            SeedingCheckpointManager,
            seed=self._seed_from,
            export=self._export_step,
            facts=self._manifest_facts,
            admit=self._finite,
            exports=self._background_exports(job_config),
            resumed=self._resumed_from,
        )
        # The host's __init__ builds its CheckpointManager by this name and offers no other place to exchange it.
        # Nor one to drop its warning that the losses of a pipeline are known on one rank alone: here all have them.
        with (
            mock.patch.object(torchtitan.train, "CheckpointManager", manager),
            mock.patch.object(torchtitan.train, "ensure_pp_loss_visible", _nothing),
            self._lock.released_on_error(),
        ):
            super().__init__(job_config)
        self.model = self.model_parts[-1]
        self.pipeline = getattr(self, "pp_schedule", None)
        self._shared = None if self.pipeline is None else SharedEmbedding(self.pipeline)
        # At weight 0 neither the teacher nor the losses are run: the step is the host's own, number for number.
        self.objective = self._build_objective() if trains_future(job_config) else None
        self._trains_own_heads = trains_own_heads(job_config)
        self._own_heads = OwnHeadLosses(self.model, job_config, getattr(self.tokenizer, "eos_id", None))
        self._plan: StepPlan | None = None
        self._microbatch = self._microbatches_left = 0
        self._parts: dict[str, Tensor] = {}
        self._part_names: list[str] = []
        self._labels = [source.reported_as for _, source in sources_of(job_config)]
        self.metrics_processor.step_metrics = self._step_metrics
        if job_config.validation.enable:
            self.validator.evaluate, self.validator.reduce = self._evaluate, self._reduced

    def _background_exports(self, config: FlameJobConfig) -> BackgroundExports:
        def due(step: int) -> bool:
            interval = config.export.interval
            # The last step is exported by the ranks themselves.
            ends = config.checkpoint.last_save_in_hf and (self._finishing or step >= config.training.steps)
            return interval > 0 and step % interval == 0 and not ends

        options = ["--assets", config.model.hf_assets_path, "--dtype", config.checkpoint.export_dtype]
        options += ["--max-shard-size", config.export.max_shard_size]
        options += ["--import", config.experimental.custom_import] if config.experimental.custom_import else []
        options += ["--trust-remote-code"] if config.seed.trust_remote_code else []
        return BackgroundExports(Path(config.job.dump_folder) / "hf", options, due)

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
            self.pipeline,
        )

    def init_distributed(self) -> ParallelDims:
        """As the host's, which with CPU offload asks for gloo beside the device's backend: on a CPU that is gloo, twice."""
        training = self.job_config.training
        offload = training.enable_cpu_offload
        training.enable_cpu_offload = offload and self.device.type != "cpu"
        try:
            parallel_dims = super().init_distributed()
        except OSError as e:  # it makes a folder for traces, on every rank
            raise CheckpointError(f"job.dump_folder {str(self._dump_folder)!r} can not be written: {e}") from e
        finally:
            training.enable_cpu_offload = offload
        # Here, since from here on ranks can fail together, and nothing has been written yet.
        with failing_together(CheckpointError):
            if is_main_rank():
                self._lock.acquire()
        return parallel_dims

    def close(self) -> None:
        """As the host's; the folder is free when nothing writes to it any more."""
        try:
            super().close()
        finally:
            self._lock.release()

    # -- training ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """As the host's, up to the last step, a stop signal, or the end of the data, each of which is saved.

        With ``seed.dry_run``, everything up to step 1. A run that is complete already trains nothing.

        Raises:
            UserError: on all ranks at the same step.
        """
        if self.job_config.seed.dry_run:
            self.checkpointer.load(step=self.job_config.checkpoint.load_step)
            logger.info(f"Dry run: stopped before step {self.step + 1}")
            return
        if (step := self._completed_before()) is not None:
            logger.info(f"Already complete: {step.path} is the last step of this run, and nothing is left to train")
            return
        super().train()
        if self._finishing:
            self._finish()
        if not self.preempted:
            self.checkpointer.finish_exports()
        else:
            self.checkpointer.save_now(self.step)
            logger.info(
                f"Stopped by {self._signal_name()} after step {self.step}: start the same command again to go on"
            )

    @property
    def preempted(self) -> bool:
        """Whether a signal has stopped the run before its last step."""
        return self._stopping and not self._finishing and self.step < self.job_config.training.steps

    def should_continue_training(self) -> bool:
        return not self._stopping and super().should_continue_training()

    def _finish(self) -> None:
        """The data have ended: the step before is the last one, as if ``training.steps`` had said so."""
        self.step -= 1  # the host had counted the one that was not run
        # Some ranks have read a part of it.
        self.checkpointer.states[DATALOADER] = self._data_position
        if self.step == 0:
            raise UserError(f"training.dataset {self.job_config.training.dataset!r} has no data for a single step")
        self.checkpointer.save(self.step, last_step=True)
        logger.info(f"The data ended after step {self.step} of {self.job_config.training.steps}: this run is complete")

    def _completed_before(self) -> CompleteStep | None:
        """The last step of this run if there is one; its export is made up for if it is not there. Collective."""
        config = self.job_config.checkpoint
        if not config.enable or config.load_step != -1:
            return None
        step = self.checkpointer.newest_step()
        if step is None:
            return None
        finished_then = step.manifest.get("finished") and "training.steps" not in config.allow_config_change
        if not finished_then and step.step < self.job_config.training.steps:
            return None
        self._resumed_from(step.manifest, step.path)
        if config.last_save_in_hf and not self._is_exported(step.step):
            self.checkpointer.load_model(step)
            self._export_step(step.step)
        return step

    def _is_exported(self, step: int) -> bool:
        """Whether the export of a step can be read, by its headers. Collective."""
        missing: str | None = None
        folder = self._dump_folder / "hf" / f"step-{step}"
        with failing_together(CheckpointError):
            if is_main_rank():
                try:
                    open_source(folder)
                except SeedError as e:
                    missing = str(e)
        found = [missing]
        dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            logger.warning(f"Exporting step {step} again: {found[0]}")
        return found[0] is None

    def _signal_name(self) -> str:
        received = self._signals.received
        return "a signal to another rank" if received is None else received.name

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
        """As the host's, with what all ranks have to agree on and the objective's plan of the whole step made before.

        Raises:
            DataloaderExhaustedError: on all ranks, if the data of any do not suffice.
            UserError: on all ranks, if the data can not be read on any, a save in the background has failed, or gradients stay
                non-finite.
        """
        microbatches = self._microbatches_for_all(data_iterator)
        self._parts, self._microbatch, self._microbatches_left = {}, 0, len(microbatches)
        if self.objective is not None:
            batches = [(inputs["input"], labels, inputs.get("doc_ids")) for inputs, labels in microbatches]
            self._plan = self.objective.plan(self.step, batches)
        with mock.patch.object(
            dist_utils, "clip_grad_norm_", partial(self._clip_grad_norm, dist_utils.clip_grad_norm_)
        ):
            super().train_step(iter(microbatches))
        self._nonfinite_steps = 0 if math.isfinite(self._grad_norm) else self._nonfinite_steps + 1
        if self._nonfinite_steps >= self.job_config.checkpoint.max_nonfinite_steps:
            raise UserError(
                f"the gradient norm was not finite on {self._nonfinite_steps} steps in a row, the last one step {self.step} "
                "(checkpoint.max_nonfinite_steps): lower optimizer.lr, look at the data of these steps, or continue from an "
                "earlier step with checkpoint.load_step"
            )

    def _microbatches_for_all(
        self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]
    ) -> list[tuple[dict[str, Tensor], Tensor]]:
        """This rank's micro-batches of the step, if all ranks have theirs. Collective."""
        tokens_before, microbatches, ended = self.ntokens_seen, [], False
        unreadable: Exception | None = None
        self._data_position = self.dataloader.state_dict()
        try:
            for _ in range(self.gradient_accumulation_steps):
                microbatches.append(next(data_iterator))
        except DataloaderExhaustedError:
            ended = True
        except Exception as e:  # of whatever kind: the other ranks have to hear of it before it is raised
            unreadable = e
        error = self.checkpointer.background_error() if self.checkpointer.enable else None
        stop = self._signals.received is not None
        now = agree(Circumstances(stop, ended, unreadable is not None, error is not None), self.device)
        if now.data_failed:
            with failing_together(ConfigError):
                if unreadable is not None:
                    raise unreadable
        if now.save_failed:
            raise CheckpointError(error or "a save in the background failed on another rank, which says why")
        if now.data_ended:
            self.ntokens_seen, self._finishing = tokens_before, True
            raise DataloaderExhaustedError
        self._stopping = now.stop
        return microbatches

    def _clip_grad_norm(
        self, clip: Callable[..., Tensor], parameters: list[torch.nn.Parameter], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The host's, and no gradients at all if their norm is not finite: optimizers then leave everything as it is."""
        if self._shared is not None:
            if self.parallel_dims.dp_replicate_enabled and not self.parallel_dims.fsdp_enabled:
                sum_over_replicas(parameters, self.parallel_dims.get_mesh("dp_replicate"))
            self._shared.sum_gradients()
        copies = self._copies
        norm = clip([p for p in parameters if id(p) not in copies], *args, **kwargs)
        if copies:
            torch.nn.utils.clip_grads_with_norm_(
                [p for p in parameters if id(p) in copies], self.job_config.training.max_norm, norm
            )
        self._grad_norm = norm.item()  # of all ranks: they decide alike
        if not math.isfinite(self._grad_norm):
            for parameter in parameters:
                parameter.grad = None
            self.skipped_steps += 1
            logger.warning(
                f"Step {self.step}: the gradient norm is {self._grad_norm}: no update (skipped so far: {self.skipped_steps})"
            )
        return norm

    @property
    def _is_replicated(self) -> bool:
        """Whether the model is under DDP."""
        dims = self.parallel_dims
        return dims.dp_replicate_enabled and not dims.fsdp_enabled and self.pipeline is None

    @property
    def _copies(self) -> set[int]:
        """Ids of the parameters on this rank that are counted on another one."""
        return set() if self._shared is None else {id(p) for p in self._shared.copies()}

    def _finite(self, step: int) -> bool:
        """Whether a step may be saved: gradient norm, losses and weights are finite on every rank. Collective."""
        parameters = [p for part in self.model_parts for p in part.parameters()]
        weights = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        weights = [p.detach() for p in weights if p.numel()]
        finite = torch.tensor(math.isfinite(self._grad_norm), dtype=torch.uint8, device=self.device)
        for value in (*self._parts.values(), torch.nn.utils.get_total_norm(weights, math.inf, foreach=True)):
            finite *= torch.isfinite(value).all().to(self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
        """As the host's, which hands all but the tokens to the model: documents are the losses' matter, and the attention's if
        ``data.document_attention`` says so.
        """
        inputs, labels, extra_inputs, extra_kwargs = super().post_dataloading_process(
            {"input": input_dict["input"]}, labels
        )
        extra_kwargs.pop("positions", None)  # the host's name for position_ids
        attention = {} if self.pipeline is not None else self._attention_of(input_dict)  # which has smaller batches
        return inputs, labels, extra_inputs, {**extra_kwargs, **attention}

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """One micro-batch. Returns the total loss: local sums over global numbers of tokens and of pairs.

        Where no label of the whole step counts, the cross-entropy is 0.
        """
        global_valid_tokens = torch.as_tensor(global_valid_tokens).clamp_min(1)
        self._microbatches_left -= 1
        if self._is_replicated:
            # Gradients add up over micro-batches; summed over ranks after each, what is summed already would be summed again.
            self.model.set_requires_gradient_sync(self._microbatches_left == 0)
        if self.objective is None and not self._trains_own_heads and self.pipeline is None:
            loss = super().forward_backward_step(
                input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
            )
            self._add_parts({"loss_ce": loss})
            return loss
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
        plan, index = self._plan, self._microbatch
        self._microbatch += 1
        with self.train_context():
            if self.objective is not None and plan is not None:
                self.objective.teach(plan, index, partial(self._attention_of, input_dict))
            losses = partial(self._losses, plan, index, inputs, labels, input_dict.get("doc_ids"), global_valid_tokens)
            with self.maybe_enable_amp, self._timed("student"):
                if self.pipeline is None:
                    loss, parts = self.model(inputs, **extra_inputs, **extra_kwargs, compute=losses(slice(None)))
                else:
                    loss, parts = self._pipelined(self.pipeline.step, inputs, input_dict, losses)
            if self.pipeline is None:
                loss.backward()
        if self.objective is not None and plan is None:
            self.objective.drop_idle_gradients()
        self._add_parts(parts)
        return loss

    def _losses(
        self,
        plan: StepPlan | None,
        index: int,
        inputs: Tensor,
        labels: Tensor,
        doc_ids: Tensor | None,
        global_valid_tokens: Tensor | float,
        rows: slice,
    ) -> Losses:
        """What the student's forward of these rows of a micro-batch is to compute."""
        inputs, labels = inputs[rows], labels[rows]
        if self.objective is None or plan is None:
            compute = self._idle_losses(labels, global_valid_tokens)
        else:
            compute = self.objective.losses(plan, index, labels, global_valid_tokens, rows)
        return self._own_heads.beside(
            compute, inputs, labels, global_valid_tokens, None if doc_ids is None else doc_ids[rows]
        )

    def _pipelined(
        self,
        run: Callable[[Tensor, Callable[[slice], dict[str, Any]]], Any],
        inputs: Tensor,
        input_dict: dict[str, Tensor],
        losses: Callable[[slice], Losses],
    ) -> tuple[Any, dict[str, Tensor]]:
        """A micro-batch through the pipeline: what ``run`` gives, and the parts of the losses on ranks with the last stage."""
        found: list[dict[str, Tensor]] = []

        def inputs_of(rows: slice) -> dict[str, Any]:
            def compute(logits: Tensor, hidden_states: Tensor) -> Tensor:
                loss, parts = losses(rows)(logits, hidden_states)
                found.append(parts)
                return loss

            return {**self._attention_of(input_dict, rows), "compute": compute}

        result = run(inputs, inputs_of)
        names = found[0] if found else {}
        return result, {name: torch.stack([parts[name].detach() for parts in found]).sum(0) for name in names}

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.objective is None else self.objective.stopwatch.measure(name)

    def _idle_losses(self, labels: Tensor, global_valid_tokens: Tensor | float) -> Callable[[Tensor, Tensor], Any]:
        """For a step without the objective: its weights are 0 (``teacher_interval``, schedules), or there is none."""

        objective = self.objective

        def compute(logits: Tensor, hidden_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = self.loss_fn(logits, labels) / global_valid_tokens
            parts = {"loss_ce": loss.detach()}
            return (loss if objective is None else loss + objective.idle(hidden_states)), parts

        return compute

    def _evaluate(self, input_dict: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Metrics of a validation batch, as a dataloader gives it, to be summed over ranks."""
        inputs, labels, doc_ids = input_dict["input"].to(self.device), labels.to(self.device), input_dict.get("doc_ids")
        input_dict = {**input_dict, "input": inputs}
        labelled = (labels != IGNORE_INDEX).sum()
        mesh = self.parallel_dims.get_optional_mesh("batch")
        tokens = max(1.0, labelled.item() if mesh is None else dist_utils.dist_sum(labelled, mesh))
        with self.train_context(), self.maybe_enable_amp:
            plan = None
            if self.objective is not None:
                plan = self.objective.plan_evaluation((inputs, labels, doc_ids))
                self.objective.teach(plan, 0, partial(self._attention_of, input_dict))
            inputs, labels, _, attention = self.post_dataloading_process(input_dict, labels)
            losses = partial(self._losses, plan, 0, inputs, labels, doc_ids, tokens)
            if self.pipeline is None:
                _, parts = self.model(inputs, **attention, compute=losses(slice(None)))
            else:
                _, parts = self._pipelined(self.pipeline.forward, inputs, input_dict, losses)
            return parts

    def _add_parts(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            value = value.detach()
            self._parts[name] = self._parts[name] + value if name in self._parts else value

    def _step_metrics(self, grad_norm: float) -> dict[str, float | None]:
        mesh = self.parallel_dims.get_optional_mesh("loss")
        ranks = 1 if mesh is None else mesh.size()  # that are summed over
        epochs = {f"epochs/{label}": n / ranks for label, n in zip(self._labels, self.dataloader.epochs(), strict=True)}
        parts = self._reduced(self._parts | {name: torch.tensor(n, device=self.device) for name, n in epochs.items()})
        self._part_names = list(dict.fromkeys([*self._part_names, *parts]))
        metrics = {**dict.fromkeys(self._part_names), **parts, "skipped_steps": self.skipped_steps}
        if self.objective is not None or self._trains_own_heads:
            # Gradients are clipped by now, all by one factor.
            unclipped = max(1.0, (grad_norm + 1e-6) / self.job_config.training.max_norm)
            for name, parameters in self._backbone_and_heads().items():
                metrics[f"grad_norm_{name}"] = self._norm_of_gradients(parameters) * unclipped
        if self.objective is not None:
            metrics |= {f"time_{name}": value for name, value in self.objective.stopwatch.seconds().items()}
        return metrics

    def _reduced(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """Sums over data-parallel ranks, in one collective; of a pipeline, whose last stage has them, on all ranks."""
        if self.pipeline is None:
            return self._summed(parts)
        found = [self._summed(parts) if self.pipeline.has_last else {}]
        dist.broadcast_object_list(found, src=self.pipeline.last_rank, group=self.pipeline.group)
        return found[0]

    def _summed(self, parts: dict[str, Tensor]) -> dict[str, float]:
        values = torch.stack([value.float() for value in parts.values()])
        mesh = self.parallel_dims.get_optional_mesh("loss")
        if mesh is not None:
            dist.all_reduce(values, group=mesh.get_group())
        return dict(zip(parts, values.tolist(), strict=True))

    def _backbone_and_heads(self) -> dict[str, list[torch.nn.Parameter]]:
        heads = [p for name in self.model.head_names for p in self.model.get_submodule(name).parameters()]
        owned = {id(p) for p in heads} | self._copies
        parameters = [p for part in self.model_parts for p in part.parameters()]
        return {"backbone": [p for p in parameters if id(p) not in owned], "heads": heads}

    def _norm_of_gradients(self, parameters: list[torch.nn.Parameter]) -> float:
        """L2 norm of the gradients that there are. Collective."""
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(self.device)
        if self.pipeline is not None:
            square = norm**2
            dist.all_reduce(square, group=self.pipeline.group)
            norm = square.sqrt()
        return norm.item()


def _nothing(*_args: Any) -> None:
    """In the place of a function of the host's."""
