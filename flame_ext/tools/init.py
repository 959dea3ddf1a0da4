"""``flame-ext init``: writes a commented TOML for a model, with settings that fit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flame_ext.errors import UserError
from flame_ext.tools.plan import add_machine, machine_of


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser("init", help="write the TOML of a job for a model, with settings that fit")
    parser.add_argument("source", metavar="SOURCE", help="a Hugging Face folder, or hf://org/name")
    add_machine(parser)
    parser.add_argument("--output", type=Path, help="the file to write, which must not be there (default: print it)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0; every failure is raised as a UserError before anything is written."""
    from flame_ext.planning.starting import first_job

    if options.output is not None and options.output.exists():
        raise UserError(f"--output {options.output} is there already; name another file, or remove it")
    text = first_job(options.source, machine_of(options), lambda line: print(line, file=sys.stderr, flush=True))
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)
        print(f"Wrote {options.output}: flame-ext plan {options.output} --gpus {options.gpus}")
    return 0
