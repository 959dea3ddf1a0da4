"""One run of a plan in a process of its own: the trainer as it is, then the evaluation. ``python -m flame_ext.lab.job FOLDER PLAN_PID``."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock

from flame_ext.files import write_json
from flame_ext.run.process import end_with, environment_of_only_rank

PLAN = "plan.json"  # in a plan's folder: its name and its runs, in their order
JOB, SPECIFICATION, RESULT = "job.toml", "run.json", "result.json"  # in a run's folder
LOG = "log.txt"  # there too: what the run has printed


def run(folder: Path) -> None:
    """Trains what ``job.toml`` says, or goes on with it, and evaluates as ``run.json`` says. ``result.json`` is written last.

    A reverse model is not evaluated: it answers no prompt.

    Raises SystemExit if the trainer ends with anything but 0.
    """
    from flame_ext.lab.evaluate import evaluate
    from flame_ext.train import main

    said = json.loads((folder / SPECIFICATION).read_text())
    main([f"--job.config_file={folder / JOB}"])
    export = folder / "hf" / f"step-{said['steps']}"
    figures: dict[str, Any] = {}
    if "objective" in said["run"]:
        of_task = Path(os.path.normpath(folder / said["task_folder"]))  # from the plan's folder, though runs/ is a link
        figures = evaluate(export, of_task, said["generations"], said["temperature"], said["run"]["seed"])
    write_json(folder / RESULT, said | {"figures": figures, "held_out": held_out(folder, said)})


def held_out(folder: Path, said: dict[str, Any]) -> list[dict[str, float]]:
    """The held-out loss over the run, of the tokens that are learned, with the tokens and operations until then."""
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    tokens = {line["step"]: line["step"] * said["tokens_of_a_step"] for line in lines}
    per_token = said["operations_per_token"]["total"]
    return [
        {
            "step": line["step"],
            "tokens": tokens[line["step"]],
            "operations": tokens[line["step"]] * per_token,
            "loss": line["loss_ce"],
        }
        for line in lines
    ]


if __name__ == "__main__":
    code, of_run = 0, Path(sys.argv[1])
    end_with(int(sys.argv[2]), signal.SIGTERM)  # which saves
    os.environ.update(environment_of_only_rank())
    try:
        with FileLock(of_run / ".job.lock"):  # one that a killed plan has left ends within a moment
            run(of_run)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the trainer's own process does
