"""``flame-ext lab``: writes tasks, runs plans of objectives x tasks x seeds, reports their figures. Declared without torch."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from flame_ext.lab.tasks import KINDS


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command and its three parts."""
    parts = commands.add_parser("lab", help="compare objectives on tasks").add_subparsers(dest="part", required=True)
    data = parts.add_parser("data", help="write a task as files of tokens for the trainer")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="TASK")
    for name, kind in KINDS.items():
        task = kinds.add_parser(name, help=(kind.__doc__ or "").splitlines()[0], description=kind.__doc__)
        hints = get_type_hints(kind)
        for option in fields(kind):
            says = f"default: {option.default!r}"
            task.add_argument(f"--{option.name}", type=hints[option.name], default=option.default, help=says)
        task.add_argument("--output", type=Path, required=True, help="the folder to write")
    data.set_defaults(run=_data)
    run = parts.add_parser("run", help="run a plan, or what is left of it")
    run.add_argument("plan", metavar="PLAN", type=Path, help="a TOML, such as configs/lab/tiny.toml")
    run.add_argument("--output", type=Path, help="the plan's folder (default: outputs/lab/NAME)")
    run.add_argument("--jobs", type=int, help="runs at a time (default: the devices, or half of the cores)")
    run.set_defaults(run=_run)
    report = parts.add_parser("report", help="write table and figure of each task of a plan")
    report.add_argument("path", metavar="FOLDER", type=Path, help="the plan's folder, as lab run has written it")
    report.set_defaults(run=_report)


def _data(options: argparse.Namespace) -> int:
    from flame_ext.lab.data import write_task

    kind = KINDS[options.kind]
    task = kind(**{option.name: getattr(options, option.name) for option in fields(kind)})
    write_task(task, options.output)
    print(f"{options.output}: rows of {task.length} tokens, of which {task.prompt} are the prompt")
    return 0


def _run(options: argparse.Namespace) -> int:
    from flame_ext.errors import UserError
    from flame_ext.lab.plan import read_plan
    from flame_ext.lab.run import run_plan

    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be >= 1, got {options.jobs}")
    plan = read_plan(options.plan)
    folder = options.output or Path("outputs", "lab", plan.section.name)
    code = run_plan(plan, folder, options.jobs)
    print(f"{'done' if code == 0 else 'stopped; the same command goes on'}: flame-ext lab report {folder}")
    return code


def _report(options: argparse.Namespace) -> int:
    from flame_ext.lab.report import write_report

    for file in write_report(options.path):
        print(f"Wrote {file}")
    return 0
