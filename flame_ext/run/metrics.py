"""torchtitan's metrics processor, with the objective's parts beside the total loss and ``metrics.jsonl`` and
``validation.jsonl`` beside TensorBoard.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.metrics import MetricsProcessor, _get_metrics_rank
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseModelArgs
from torchtitan.tools.logging import logger

METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"
# Beside the losses; all of it is in the file.
ON_CONSOLE = ("future_top1", "action_reward")


class FutureMetricsProcessor(MetricsProcessor):
    """Logs what the host logs, plus ``step_metrics()`` of the trainer."""

    step_metrics: Callable[[float], dict[str, float | None]]
    """Collective; set by the trainer: the norm of all gradients to the parts of the objective, summed over ranks and
    micro-batches, and whatever else is known of the step. None: not computed in this step."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None) -> None:
        super().__init__(job_config, parallel_dims, tag)
        self._folder = Path(job_config.job.dump_folder)
        self._writes = torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config)

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after ``step``: they were lost with the run that is being resumed."""
        for file in (self._folder / METRICS_NAME, self._folder / VALIDATION_NAME):
            if self._writes and file.is_file():
                _drop_lines_after(file, step)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """As the host's. Collective, since the parts of the loss are reduced here, only on steps that are logged."""
        parts = self.step_metrics(grad_norm)
        known = {name: value for name, value in parts.items() if value is not None}
        extra = {**(extra_metrics or {}), **known}
        # The host takes a rank that has a part of a sequence for one that has all of it.
        extra["n_tokens_seen"] = extra.get("n_tokens_seen", 0) / self.parallel_dims.cp
        global_max_loss *= self.parallel_dims.cp
        seconds = time.perf_counter() - self.time_last_log
        # Every rank counts its own tokens; ranks that share a batch (TP, PP) count the same ones.
        tokens_per_second = (
            self.ntokens_since_last_log
            * self.parallel_dims.world_size
            / self.parallel_dims.non_data_parallel_size
            / seconds
        )
        record = {
            "step": step,
            "loss": float(global_avg_loss),
            **parts,
            "lr": extra.get("lr"),
            "grad_norm": grad_norm,
            "tokens_seen": int(extra.get("n_tokens_seen", 0)),
            "tokens_per_second": tokens_per_second,
        }
        self._append(METRICS_NAME, record)
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra)
        shown = (
            f"{name}: {value:8.5f}" for name, value in known.items() if name.startswith("loss_") or name in ON_CONSOLE
        )
        logger.info("  ".join([f"step: {step:2}", *shown]))

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """As the host's, and a line in ``validation.jsonl``."""
        parts = {name.removeprefix("validation_metrics/"): value for name, value in (extra_metrics or {}).items()}
        self._append(VALIDATION_NAME, {"step": step, "loss_ce": loss, **parts})
        super().log_validation(loss, step, extra_metrics)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if not self._writes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / name).open("a") as stream:
            # JSON has no NaN: a diverged value is written as null.
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            stream.write(json.dumps(values, allow_nan=False) + "\n")


def _drop_lines_after(file: Path, step: int) -> None:
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            logger.warning(f"{file}: dropped an unreadable line, cut off when its run ended")
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(file)


def build_metrics_processor(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: BaseModelArgs | None = None, tag: str | None = None
) -> FutureMetricsProcessor:
    """The TrainSpec's metrics processor."""
    return FutureMetricsProcessor(job_config, parallel_dims, tag)
