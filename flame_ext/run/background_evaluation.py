"""Evaluates exports while training goes on: ``flame-ext evaluate`` follows each that is due, and adds a line to ``evaluations.jsonl``."""

import json
import os
from pathlib import Path

import torch

from flame_ext.config.sections import Evaluation, FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.run.evaluations import EVALUATIONS_NAME
from flame_ext.run.followers import Follower
from flame_ext.run.harness_tasks import find_tasks

# What the figures do not depend on beyond rounding: a change does not have earlier exports evaluated anew.
_HARMLESS = ("interval", "batch_size", "device")


def require_tasks(options: Evaluation) -> None:
    """Raises ConfigError if lm-eval does not have the tasks. Takes seconds."""
    try:
        find_tasks(options.tasks, options.include_path)
    except ConfigError as e:
        raise ConfigError(f"evaluation.{e}") from e


def background_evaluation(config: FlameJobConfig) -> list[Follower]:
    """Returns the evaluation that ``[evaluation]`` asks for, if it does."""
    options = config.evaluation
    if not options.tasks:
        return []
    arguments = ["--tasks", *options.tasks, "--batch-size", str(options.batch_size)]
    arguments += ["--device", options.device, "--dtype", options.dtype]
    arguments += ["--include-path", *options.include_path] if options.include_path else []
    arguments += [] if options.num_fewshot is None else ["--num-fewshot", str(options.num_fewshot)]
    arguments += [] if options.limit is None else ["--limit", str(options.limit)]
    arguments += ["--apply-chat-template"] if options.apply_chat_template else []
    arguments += ["--trust-remote-code"] if config.seed.trust_remote_code else []
    arguments += ["--import", config.experimental.custom_import] if config.experimental.custom_import else []
    arguments += ["--output", str(Path(config.job.dump_folder) / EVALUATIONS_NAME)]

    def due(step: int, is_last: bool) -> bool:
        return is_last or (options.interval > 0 and step % options.interval == 0)

    asked = {name: value for name, value in vars(options).items() if name not in _HARMLESS}
    target = json.dumps({**asked, "trust_remote_code": config.seed.trust_remote_code})
    return [
        Follower(
            "evaluation",
            lambda _step, export: ["evaluate", str(export), *arguments],
            due=due,
            target=target,
            environment=_environment(options.device),
        )
    ]


def _environment(device: str) -> dict[str, str]:
    """Returns the variables by which the process sees its device, and uses as many cores as the user has said."""
    found = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    if device != "cpu":
        all_of_them = ",".join(str(number) for number in range(torch.cuda.device_count()))
        found["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", all_of_them)
    return found
