"""torchtitan's metrics processor, which also logs the parts of the objective, and writes JSON lines."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.metrics import BaseLogger, MetricsProcessor
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.files import METRICS_NAME
from flame_ext.host.names import get_metrics_rank
from flame_ext.run.evaluations import EVALUATIONS_NAME, NewEvaluations, figures_in
from flame_ext.run.progress import Progress
from flame_ext.run.trackers import log_evaluation, prepare_wandb, with_trackio

VALIDATION_NAME = "validation.jsonl"


class FutureMetricsProcessor(MetricsProcessor):
    """Logs what torchtitan logs, and the parts of the objective. Its arguments are those of the TrainSpec's builder."""

    logger: BaseLogger
    shown: tuple[str, ...] = ()
    """Metrics that are printed beside the losses; the file has all of them. The trainer sets it."""

    write_error: str | None = None
    """Why a line could not be written."""
    _has_written: bool = False

    def __init__(
        self, job_config: FlameJobConfig, parallel_dims: ParallelDims, _model_args: Any = None, tag: str | None = None
    ) -> None:
        self._folder, rank = Path(job_config.job.dump_folder), torch.distributed.get_rank()
        self._writes = rank == get_metrics_rank(parallel_dims, job_config)
        of = job_config.metrics
        tracks, tracker_rank = self._writes or of.save_for_all_ranks, rank if of.save_for_all_ranks else 0
        if of.enable_wandb and tracks:
            prepare_wandb(self._folder, tracker_rank, of)
        super().__init__(job_config, parallel_dims, tag)
        if of.enable_trackio and tracks:
            self.logger = with_trackio(self.logger, self._folder, tracker_rank, job_config, tag)
        self._progress = Progress(job_config)
        evaluates = self._writes and job_config.evaluation.tasks
        self._evaluations = NewEvaluations(self._folder / EVALUATIONS_NAME) if evaluates else None
        self._evaluated: list[dict[str, Any]] = []  # what trackers have not got yet

    def rewind(self, step: int) -> None:
        """Drops the lines of steps after ``step``, from which the run goes on."""
        for file in (self._folder / METRICS_NAME, self._folder / VALIDATION_NAME):
            if not self._writes or not file.is_file():
                continue
            kept, dropped = [], []
            for number, line in enumerate(file.read_bytes().splitlines(), start=1):
                try:
                    belongs = json.loads(line)["step"] <= step
                except (ValueError, KeyError, TypeError, RecursionError):
                    dropped.append(str(number))
                else:
                    kept += [line + b"\n"] if belongs else []
            if dropped:
                numbers = ", ".join(dropped[:5]) + (", …" if len(dropped) > 5 else "")
                logger.warning(
                    f"{file}: dropped an unreadable line, cut off when its run ended or changed since (line {numbers})"
                )
            temporary = file.with_suffix(".tmp")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(file)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Logs as torchtitan does, and writes a line to ``metrics.jsonl``.

        ``extra_metrics`` has torchtitan's n_tokens_seen and lr, and the step's other figures; None = not computed in this step.
        """
        extra = {"n_tokens_seen": 0, "lr": None, **(extra_metrics or {})}
        parts = {name: value for name, value in extra.items() if name not in ("n_tokens_seen", "lr")}
        known = {name: value for name, value in parts.items() if value is not None}
        # torchtitan sums over ranks, as if none had only a part of its sequences.
        extra["n_tokens_seen"] /= self.parallel_dims.cp
        global_max_loss *= self.parallel_dims.cp
        seconds = time.perf_counter() - self.time_last_log
        # Every rank counts its own tokens; ranks that share a batch (TP, PP) count the same ones.
        ranks = self.parallel_dims.world_size / self.parallel_dims.non_data_parallel_size
        record = {
            "step": step,
            "loss": float(global_avg_loss),
            **parts,
            "lr": extra["lr"],
            "grad_norm": grad_norm,
            "tokens_seen": int(extra["n_tokens_seen"]),
            "tokens_per_second": self.ntokens_since_last_log * ranks / seconds,
        }
        self._append(METRICS_NAME, record)
        logged = {name: value for name, value in extra.items() if value is not None}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, logged)
        shown = (f"{k}: {v:8.5f}" for k, v in known.items() if k.startswith("loss_") or k in self.shown)
        logger.info("  ".join([f"step: {step:2}", *shown]))
        if (line := self._progress.line(step, record["tokens_seen"])) is not None:
            logger.info(f"{self.color.cyan}{line}{self.color.reset}")
        self._log_evaluations(last=False)

    def close(self) -> None:
        """Closes as torchtitan does, after the evaluations that have come since the last step."""
        self._log_evaluations(last=True)
        super().close()

    def _log_evaluations(self, last: bool) -> None:
        """Gives trackers the next evaluation that has come, or, at last, all."""
        if self._evaluations is None:
            return
        self._evaluated += self._evaluations.take()
        while self._evaluated:
            line = self._evaluated.pop(0)
            log_evaluation(self.logger, figures_in(line), line["step"], commit=last and bool(self._evaluated))
            if not last:
                return

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """Logs as torchtitan does, and writes a line to ``validation.jsonl``."""
        parts = {name.removeprefix("validation_metrics/"): value for name, value in (extra_metrics or {}).items()}
        self._append(VALIDATION_NAME, {"step": step, "loss_ce": loss, **parts})
        super().log_validation(loss, step, extra_metrics)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if not self._writes:
            return
        # JSON has no NaN.
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            if not self._has_written:  # a folder that is removed under a run is not made anew
                self._folder.mkdir(parents=True, exist_ok=True)
            self._has_written = True
            with (self._folder / name).open("a") as stream:
                stream.write(json.dumps(values, allow_nan=False) + "\n")
        except OSError as e:  # such as a full disk; the other ranks have to hear of it before it is raised
            self.write_error = f"{self._folder / name} cannot be written: {e}"
