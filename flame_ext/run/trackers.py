"""Records of a run beside TensorBoard: at Weights & Biases, which torchtitan logs to, and at trackio. One that is started again goes
on with its record.
"""

import os
import uuid
from pathlib import Path
from typing import Any

from torchtitan.components.metrics import BaseLogger, LoggerContainer, WandBLogger
from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig, Metrics

WANDB_NAME, TRACKIO_NAME = "wandb_run_id", "trackio_run_id"
PROJECT = "flame_ext"
EVALUATION = "evaluation/"  # what the names of its figures begin with


def continued_id(folder: Path, name: str, rank: int) -> tuple[str, bool]:
    """Returns the id in a file of the folder, which the first start writes, and whether it was there. Each rank that logs has its
    own.
    """
    file = folder / (f"{name}.{rank}" if rank else name)
    if file.is_file() and (found := file.read_text().strip()):
        return found, True
    made = uuid.uuid4().hex[:8]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{made}\n")
    return made, False


def prepare_wandb(folder: Path, rank: int, metrics: Metrics) -> None:
    """Sets the variables by which torchtitan and W&B know the run, where the user has not: its id, and what ``[metrics]`` names."""
    named = {
        "WANDB_PROJECT": metrics.project,
        "WANDB_RUN_NAME": metrics.run_name,
        "WANDB_RUN_GROUP": metrics.run_group,
        # Not WANDB_RUN_TAGS, which torchtitan hands on as a single tag.
        "WANDB_TAGS": ",".join(metrics.run_tags),
    }
    for variable, value in named.items():
        if value:
            os.environ.setdefault(variable, value)
    if any(name in os.environ for name in ("WANDB_RESUME_FROM", "WANDB_FORK_FROM")):  # W&B takes one of the three
        return
    if "WANDB_RUN_ID" not in os.environ:
        os.environ["WANDB_RUN_ID"], _ = continued_id(folder, WANDB_NAME, rank)
    os.environ.setdefault("WANDB_RESUME", "allow")


class TrackioLogger(BaseLogger):
    """Logs to trackio, on this machine unless trackio's own variables name a server.

    trackio knows a run by its name, which therefore ends in the id that the folder keeps.
    """

    def __init__(self, folder: Path, rank: int, config: FlameJobConfig, tag: str | None = None) -> None:
        import trackio

        of, (identity, known) = config.metrics, continued_id(folder, TRACKIO_NAME, rank)
        self._trackio, self._prefix = trackio, "" if tag is None else f"{tag}/"
        run = trackio.init(
            project=of.project or PROJECT,
            name=f"{of.run_name or folder.name}-{identity}",
            group=of.run_group or None,
            config={**config.to_dict(), "tags": of.run_tags},
            resume="allow" if known else "never",
            embed=False,  # a notebook shows its own output
        )
        logger.info(f"trackio logging enabled: project {run.project}, run {run.name}")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._trackio.log({f"{self._prefix}{name}": float(value) for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._trackio.finish()


def with_trackio(other: BaseLogger, folder: Path, rank: int, config: FlameJobConfig, tag: str | None) -> BaseLogger:
    """Returns a logger that logs to trackio, too; as for W&B, a tracker that cannot be reached is said and does not end the run."""
    both = LoggerContainer()
    both.add_logger(other)
    try:
        both.add_logger(TrackioLogger(folder, rank, config, tag))
    except Exception as e:
        logger.error(f"Failed to create the trackio logger, so that nothing is logged there: {type(e).__name__}: {e}")
    return both


def log_evaluation(to: BaseLogger, figures: dict[str, float], step: int, commit: bool) -> None:
    """Logs figures of a step that is earlier than the present one.

    W&B takes figures in the order of steps alone: there the step is a figure beside them, and their axis.

    Args:
        commit: whether W&B counts a step of its own for them, which a run that goes on would miss; otherwise they belong to its present
            one, which has room for one evaluation.
    """
    for each in to._loggers if isinstance(to, LoggerContainer) else [to]:
        if isinstance(each, LoggerContainer):
            log_evaluation(each, figures, step, commit)
        elif isinstance(each, WandBLogger):
            prefix = EVALUATION if each.tag is None else f"{each.tag}/{EVALUATION}"
            each.wandb.define_metric(f"{prefix}step")
            each.wandb.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
            named = {f"{prefix}{name}": value for name, value in figures.items()}
            each.wandb.log({**named, f"{prefix}step": step}, commit=commit)
        else:
            each.log({f"{EVALUATION}{name}": value for name, value in figures.items()}, step)
