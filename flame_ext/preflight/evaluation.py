"""Checks of ``[evaluation]``. Whether lm-eval has the tasks is looked up later, once for all ranks, since it takes seconds."""

from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec

import torch

from flame_ext.config.sections import Evaluation, FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.preflight.parallelism import is_launched
from flame_ext.run.harness_tasks import missing_paths


def check_evaluation(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each finding."""
    options, export = config.evaluation, config.export.interval
    if not options.tasks:
        defaults = Evaluation()
        for name in (field.name for field in fields(Evaluation) if field.name != "tasks"):
            if (value := getattr(options, name)) != getattr(defaults, name):
                yield f"evaluation.{name} = {value!r} has no effect without evaluation.tasks; name tasks, or leave it out"
        return
    if find_spec("lm_eval") is None:
        yield "evaluation.tasks needs the package lm_eval, which is not installed: pip install 'flame_ext[eval]'"
    if options.interval and (not export or options.interval % export):
        yield (
            f"evaluation.interval must be 0 or a multiple of export.interval = {export}, got {options.interval}: exports are evaluated; "
            "set export.interval so that it divides it"
        )
    divides = (
        export and not config.training.epochs and config.training.steps % export == 0
    )  # the last step, which epochs leave open
    if not options.interval and not config.checkpoint.last_save_in_hf and not divides:
        yield "evaluation.tasks has nothing to evaluate: set evaluation.interval, or checkpoint.last_save_in_hf = true"
    if config.data.reverse:
        yield "evaluation.tasks ask from left to right, and data.reverse trains a model that reads from right to left; leave them out"
    try:
        for problem in missing_paths(options.tasks, options.include_path):
            yield f"evaluation.{problem}"
    except ConfigError as e:
        yield f"evaluation.{e}"
    yield from _check_device(options.device)


def _check_device(name: str) -> Iterator[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = [
        "cpu",
        *([] if accelerator is None else [f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count())]),
    ]
    # lm-eval takes another device where it does not know the name.
    if is_launched() and name not in there and (accelerator is None or name != accelerator.type):
        yield f"evaluation.device = {name!r} is not there; this machine has {', '.join(there)}"
