"""torchtitan's ``Trainer`` with a seeded step 0 and losses of heads; it overrides only what differs."""

import math
from collections.abc import Iterator
from copy import copy
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtitan.components.checkpoint import DATALOADER
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from flame_ext.checkpoint.manager import SeedingCheckpointManager
from flame_ext.checkpoint.run_hooks import RunHooks
from flame_ext.checkpoint.steps import CompleteStep
from flame_ext.config.sections import FlameJobConfig
from flame_ext.distributed import failing_together, is_main_rank, make_groups, set_step_timeout
from flame_ext.errors import CheckpointError, ConfigError, UserError
from flame_ext.heads.registry import shown_metrics, teacher_of
from flame_ext.host.names import Trainer
from flame_ext.host.patches import profiling_any_device, trainer_built_with
from flame_ext.model.dropout import separate_generators
from flame_ext.model.runner import ModelRunner, sum_of_parts
from flame_ext.run.lock import FolderLock
from flame_ext.run.signals import Circumstances, StopSignals, agree
from flame_ext.step.backward import Gradients, drop_gradients
from flame_ext.step.balance import Balance
from flame_ext.step.losses import Losses
from flame_ext.step.plan import Batch, MicroBatch, Planner, StepPlan, has_label
from flame_ext.step.reported import Reported, Stopwatch
from flame_ext.step.student import Student
from flame_ext.step.teacher import Teacher


class FutureTrainer(Trainer):
    """Trains a :class:`flame_ext.model.hf_causal_lm.HFCausalLM`, with or without heads. Signals are looked at before every step."""

    job_config: FlameJobConfig
    runner: ModelRunner  # This rank's part of the model, in one piece or in stages of a pipeline
    ntokens_seen: int
    finishing = False  # Whether the data have ended: the step before is the last one

    def __init__(self, job_config: FlameJobConfig, signals: StopSignals | None = None) -> None:
        self.signals = signals or StopSignals()
        self._lock = FolderLock(Path(job_config.job.dump_folder), job_config.checkpoint.take_over_lock)
        self._stopping = self._exports_wait = False  # whether a signal has come; before all was exported and followed
        with trainer_built_with(SeedingCheckpointManager), self._lock.released_on_error():
            super().__init__(job_config)
            self._build_step()

    def _build_step(self) -> None:
        """Build what a step consists of, in its order, and what the checkpoint manager asks of the run."""
        config, dims, device = self.job_config, self.parallel_dims, self.device
        self.runner = getattr(self, "pp_schedule", None) or ModelRunner(self.model_parts, dims)
        self.model = self.runner.model
        separate_generators(self.model.whole, dims)
        eos_id, positions_mesh = getattr(self.tokenizer, "eos_id", None), dims.get_optional_mesh("loss")
        # A new object for each use: one that is entered twice, one inside the other, is left on for good.
        self.autocast = partial(copy, self.maybe_enable_amp)
        self.stopwatch = Stopwatch(device)
        shared = self.autocast, device, self.stopwatch
        self.planner = Planner(config, eos_id, dims.get_optional_mesh("batch"), device)
        self.teacher: Teacher | None = None
        if teacher_of(config) is not None:
            self.teacher = Teacher(self.runner, config, eos_id, positions_mesh, *shared)
        self.losses = Losses(self.runner, config, self.teacher)
        self.student = Student(self.runner, config, self.teacher, self.losses, self.post_dataloading_process, *shared)
        self.gradients, self.balance = Gradients(self.runner, config, dims), Balance(self.runner, config, dims, device)
        self.reported = Reported(
            self.runner, config, dims, self.dataloader, self.gradients, self.balance, self.stopwatch, device
        )
        self.metrics_processor.shown = shown_metrics()
        if config.validation.enable:
            self.validator.evaluate, self.validator.reduce = self._evaluate, self.reported.reduced
            self.validator.count_all(self.planner.count, self.planner.over_ranks)
        teacher = self.teacher if self.teacher is not None and self.teacher.anticausal else None
        proved = (None, "") if teacher is None else (teacher.summaries_of_one, teacher.remedy)
        self.checkpointer.hooks = RunHooks(self, self.student.attention, *proved)

    def init_distributed(self) -> ParallelDims:
        """As torchtitan's, which with CPU offload asks for gloo beside the device's backend: on a CPU that is gloo, twice."""
        training = self.job_config.training
        offload = training.enable_cpu_offload
        training.enable_cpu_offload = offload and self.device.type != "cpu"
        try:
            parallel_dims = super().init_distributed()
        except OSError as e:  # it makes a folder for traces, on every rank
            raise CheckpointError(f"job.dump_folder {self.job_config.job.dump_folder!r} cannot be written: {e}") from e
        finally:
            training.enable_cpu_offload = offload
        make_groups(timedelta(seconds=self.job_config.comm.init_timeout_seconds))
        # Here, since from here on ranks can fail together, and nothing has been written yet.
        with failing_together(CheckpointError):
            if is_main_rank():
                self._lock.acquire()
        return parallel_dims

    def close(self) -> None:
        """As torchtitan's; the folder is free when nothing writes to it any more."""
        try:
            super().close()
        finally:
            self._lock.release()

    # -- a step --------------------------------------------------------------------------------------------------

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """One step: plan, teacher, forward, losses, backward, clipping, update, metrics.

        Raises:
            DataloaderExhaustedError: on all ranks, if the data of any do not suffice.
            UserError: on all ranks, if data cannot be read or none has a label, a save has failed, or gradients stay non-finite.
        """
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        batches = self._batches_for_all(data_iterator)
        self.reported.begin()
        plan = self.planner.plan(self.step, batches)
        if self.teacher is not None:
            self.teacher.prepare(plan)
        self.balance.begin(plan, self.student.count)
        losses = []
        for number, microbatch in enumerate(plan.microbatches, start=1):
            self.runner.begin_microbatch(is_last=number == len(plan.microbatches))
            losses.append(
                self.forward_backward_step(
                    input_dict=microbatch.inputs, labels=microbatch.labels, plan=plan, microbatch=microbatch
                )
            )
        grad_norm = self.gradients.clip(self.step)
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.balance.end(updated=math.isfinite(grad_norm))
        self.lr_schedulers.step()
        if self.metrics_processor.should_log(self.step):
            found = self.reported.figures(losses, plan, self.ntokens_seen, grad_norm)
            extra = {"n_tokens_seen": found.tokens_seen, "lr": lr, **found.metrics}
            self.metrics_processor.log(self.step, found.loss, found.largest_loss, grad_norm, extra_metrics=extra)
        self.gradients.require_progress(self.step)
        if self.step == 1:
            set_step_timeout(timedelta(seconds=self.job_config.comm.train_timeout_seconds))

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, plan: StepPlan, microbatch: MicroBatch
    ) -> Tensor:
        """Teacher, forward, losses and backward of one micro-batch of (B, T) inputs and labels; returns the detached total loss."""
        with self.train_context():
            routes = self.balance.routes()
            output = self.student.run(plan, microbatch, self.runner.losses, routes)
            self.balance.add(routes)
            if plan.has_future or output.loss.requires_grad:  # a frozen backbone has no gradients while the heads rest
                self.runner.backward(output.loss)
        if not plan.has_future:
            drop_gradients(self.losses.resting_parameters())
        self.reported.add(output.parts)
        return output.loss.detach()

    def _evaluate(self, batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        """A validation batch's share of metrics, to be summed over ranks and batches, which have ``counts``. Collective."""
        plan = self.planner.plan_evaluation(batch, counts)
        with self.train_context():
            if self.teacher is not None:
                self.teacher.prepare(plan)
            found = self.student.run(plan, plan.microbatches[0], self.runner.forward)
        return sum_of_parts(found or [])

    def _batches_for_all(self, data_iterator: Iterator[Batch]) -> list[Batch]:
        """This rank's micro-batches of the step, if all ranks have theirs. Collective."""
        batches: list[Batch] = []
        tokens_before: int = self.ntokens_seen
        ended = False
        unreadable: Exception | None = None
        self._data_position = self.dataloader.state_dict()
        try:
            for _ in range(self.gradient_accumulation_steps):
                batches.append(next(data_iterator))
        except DataloaderExhaustedError:
            ended = True
        except Exception as e:  # of whatever kind: the other ranks have to hear of it before it is raised
            unreadable = e
        error = self._error_of_files()
        stop, labelled = self.signals.received is not None, has_label(batches)
        now = agree(Circumstances(stop, ended, unreadable is not None, error is not None, labelled))
        if now.data_failed:
            with failing_together(ConfigError):
                if unreadable is not None:
                    raise unreadable
        if now.save_failed:
            self._require_files()
        if now.data_ended:
            self.ntokens_seen, self.finishing = tokens_before, True
            raise DataloaderExhaustedError
        self.planner.require_labels(self.step, now.labelled)
        self._stopping = now.stop
        return batches

    def _error_of_files(self) -> str | None:
        """Why nothing more is to be written, as far as this rank knows."""
        saving = self.checkpointer.background_error() if self.checkpointer.enable else None
        return self._lock.error() or self.metrics_processor.write_error or saving

    def _require_files(self) -> None:
        with failing_together(CheckpointError):
            if (error := self._error_of_files()) is not None:
                raise CheckpointError(error)

    # -- a run ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """As torchtitan's, up to the last step, a stop signal, or the end of the data, each of which is saved.

        With ``seed.dry_run``, everything up to step 1. A run that is complete already trains nothing.

        Raises:
            UserError: on all ranks at the same step.
        """
        if self.job_config.seed.dry_run:
            self.checkpointer.load(step=self.job_config.checkpoint.load_step, only_try=True)
            logger.info(f"Dry run: stopped before step {self.step + 1}")
            return
        if (step := self._completed_before()) is not None:
            logger.info(f"Already complete: {step.path} is the last step of this run, and nothing is left to train")
            self._say_stopped(step.step)
            return
        with profiling_any_device():
            super().train()
        self._require_files()
        if self.finishing:
            self._finish()
        if not self.preempted:
            self._exports_wait = not self.checkpointer.finish_exports()
        else:
            self.checkpointer.save_now(self.step)
        self._say_stopped(self.step)

    def _say_stopped(self, step: int) -> None:
        if self.preempted:
            when = f"after step {step}{', before its exports were made and followed' * self._exports_wait}"
            logger.info(f"Stopped by {self.signals.name} {when}: start the same command again to go on")

    @property
    def preempted(self) -> bool:
        """Whether a signal has stopped the run before its last step, or before its exports were made and followed."""
        before_last = self._stopping and not self.finishing and self.step < self.job_config.training.steps
        return before_last or self._exports_wait

    def should_continue_training(self) -> bool:
        return not self._stopping and super().should_continue_training()

    def _finish(self) -> None:
        """Save the step before as the last one, as if ``training.steps`` had said so: the data have ended."""
        self.step -= 1  # torchtitan had counted the one that was not run
        self.checkpointer.states[DATALOADER] = self._data_position  # some ranks have read a part of it
        if self.step == 0:
            raise UserError(f"training.dataset {self.job_config.training.dataset!r} has no data for a single step")
        self.checkpointer.save(self.step, last_step=True)
        logger.info(f"The data ended after step {self.step} of {self.job_config.training.steps}: this run is complete")

    def _completed_before(self) -> CompleteStep | None:
        """The last step of this run if there is one; exports that are not there are made up for. Collective."""
        config = self.job_config.checkpoint
        if not config.enable:
            return None
        folder, candidates = self.checkpointer.find(config.load_step)
        if not candidates:
            return None
        step = candidates[-1]
        finished_then = step.manifest.get("finished") and "training.steps" not in config.allow_config_change
        if not finished_then and step.step < self.job_config.training.steps:
            return None
        self._exports_wait = not self.checkpointer.make_up(folder, step, config.load_step)
        return step

    # -- its state -----------------------------------------------------------------------------------------------

    _tokens_beside: int = 0
    """Tokens seen by all ranks, less the number of ranks times this rank's: not 0 where they could not be shared evenly."""

    def state_dict(self) -> dict[str, Any]:
        """As torchtitan's, with the tokens that all ranks have seen: DCP keeps one rank's number for all of them."""
        ranks, _ = self._data_ranks()
        # Every rank reads as many tokens as any other, so no rank has to ask.
        return {"step": self.step, "tokens_seen": ranks * self.ntokens_seen + self._tokens_beside}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, tokens = state_dict["step"], state_dict["tokens_seen"]
        ranks, rank = self._data_ranks()
        self.ntokens_seen = tokens // ranks + (tokens % ranks if rank == 0 else 0)  # torchtitan sums over ranks
        self._tokens_beside = tokens - ranks * self.ntokens_seen
        if not self.job_config.seed.dry_run:
            self.metrics_processor.rewind(self.step)

    def _data_ranks(self) -> tuple[int, int]:
        """Number of ranks that read different data, and this one's among them."""
        mesh = self.parallel_dims.get_optional_mesh("batch")
        return (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
