"""``flame-ext plan``: what a job needs and how long it takes, before it is launched."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flame_ext.errors import UserError

if TYPE_CHECKING:
    from flame_ext.planning.plan import Machine, Plan


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command and its options; all others are the trainer's."""
    parser = commands.add_parser(
        "plan",
        help="say what a job needs and whether it fits, without a GPU",
        usage="flame-ext plan TOML [--gpus N] [--gpu-memory GB] [OPTION ...] [--section.key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("config_file", metavar="TOML", help="the job; options of the trainer may follow")
    add_machine(parser)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPUs' peak that is reached (default: 0.4)")
    parser.add_argument("--tflops", type=float, default=989.0, help="peak of a GPU in bfloat16 (default: 989, an H100)")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="what the job runs on (default: gpu)")
    parser.add_argument("--no-remedy", action="store_true", help="do not look for what to change if it does not fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run, trainer_options=[])


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Declares the options that :func:`machine_of` reads."""
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, on all nodes (default: 1)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of each (default: 80)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default: 8)")


def machine_of(options: argparse.Namespace) -> Machine:
    """Returns what the job runs on; raises a UserError for numbers that cannot be."""
    from flame_ext.planning.plan import Machine

    for name in ("gpus", "gpu_memory", "gpus_per_node", "mfu", "tflops"):
        if getattr(options, name, 1) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name)}")
    on_gpu = getattr(options, "device", "gpu") == "gpu"
    memory = options.gpu_memory if on_gpu else None
    return Machine(options.gpus, memory, options.gpus_per_node, getattr(options, "tflops", 989.0), on_gpu)


def run(options: argparse.Namespace) -> int:
    """Returns 0 if the job fits, else 1."""
    from flame_ext.planning.plan import make_plan
    from flame_ext.planning.remedies import remedy

    plan = make_plan([f"--job.config_file={options.config_file}", *options.trainer_options], machine_of(options))
    better = None
    if not plan.fits and not options.no_remedy:
        better = remedy(plan, lambda text: print(text, file=sys.stderr, flush=True))
    facts = as_json(plan, better, options.mfu)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(plan, facts, looked=not options.no_remedy)
    return 0 if plan.fits else 1


def as_json(plan: Plan, better: Plan | None, mfu: float) -> dict[str, Any]:
    """Returns a plan, and the one that fits if it does not, as plain data. Sizes are in bytes."""
    found = plan.rehearsal
    facts = {
        "ranks": plan.machine.ranks,
        "parameters": found.parameters,
        "memory": {"peak": found.peak, "parts": found.parts, "limit": plan.machine.limit, "on_host": found.on_host},
        "fits": plan.fits,
        "tokens_per_step": found.tokens,
        "operations_per_token": {**found.operations, "total": plan.operations},
        "seconds_per_step": plan.seconds(mfu) if plan.machine.on_gpu else None,
        "checkpoint_bytes": found.checkpoint,
        "export_bytes": found.export,
        "seeding_bytes_per_node": plan.seeding,
        "source_of_seeding": found.source,
        "remedy": None,
    }
    if better is not None:
        changed = list(better.options[len(plan.options) :])
        facts["remedy"] = {"options": changed, "ranks": better.machine.ranks, "peak": better.rehearsal.peak}
    return facts


def _print(plan: Plan, facts: dict[str, Any], looked: bool) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    total = sum(facts["parameters"].values())
    heads = ", ".join(f"{name} {count:,}" for name, count in facts["parameters"].items())
    console.print(f"parameters: {total:,} ({heads})")
    table = Table("memory of a rank", "GB", "share")
    for name, size in facts["memory"]["parts"].items():
        table.add_row(name, f"{size / 1e9:.3f}", f"{size / facts['memory']['peak']:.0%}")
    table.add_row("peak", f"{facts['memory']['peak'] / 1e9:.3f}", "", style="bold")
    console.print(table)
    if facts["memory"]["on_host"]:
        console.print(f"on the host, for each rank: {facts['memory']['on_host'] / 1e9:.2f} GB")
    operations = ", ".join(f"{name} {count:.3g}" for name, count in facts["operations_per_token"].items() if count)
    console.print(f"tokens a step: {facts['tokens_per_step']:,}; operations a token: {operations}")
    if (seconds := facts["seconds_per_step"]) is not None:
        rate = facts["tokens_per_step"] / seconds
        console.print(f"a step: {seconds:.3g} s at this MFU, {rate:,.0f} tokens/s")
    checkpoint, export, seeding = (
        facts[f"{n}"] / 1e9 for n in ("checkpoint_bytes", "export_bytes", "seeding_bytes_per_node")
    )
    console.print(f"each checkpoint: {checkpoint:.2f} GB; each export: {export:.2f} GB")
    console.print(f"seeding reads on each node: {seeding:.2f} GB (by {facts['source_of_seeding']})")
    _print_verdict(console, plan, facts, looked)


def _print_verdict(console: Console, plan: Plan, facts: dict[str, Any], looked: bool) -> None:
    if plan.machine.limit is None:
        return
    of = f"{plan.rehearsal.peak / 1e9:.1f} GB of the {plan.machine.limit / 1e9:.1f} GB that tensors can have"
    if plan.fits:
        console.print(f"[bold green]fits:[/] {of}")
        return
    console.print(f"[bold red]does not fit:[/] {of}")
    if found := facts["remedy"]:
        ranks = "" if found["ranks"] == plan.machine.ranks else f"--gpus {found['ranks']} "
        console.print(f"rehearsed, and fits with {found['peak'] / 1e9:.1f} GB: {ranks}{' '.join(found['options'])}")
    elif looked:
        console.print("nothing that was tried fits; take a smaller model, larger GPUs, or tensor parallelism")
