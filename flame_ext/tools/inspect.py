"""``flame-ext inspect``: prints the description of a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flame_ext.errors import ConfigError
from flame_ext.imports import without_collection

if TYPE_CHECKING:
    from flame_ext.seeding.sources.source import TensorEntry
    from flame_ext.tools.describe import Description


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command and its options."""
    about = "say what lies at a path, from headers alone, and how two of them differ"
    parser = commands.add_parser("inspect", help=about)
    layouts = "a Hugging Face folder, an export, a DCP checkpoint, a training step or a dump folder"
    parser.add_argument("path", help=layouts)
    parser.add_argument("--against", metavar="PATH", help="another one, of any layout, to compare with")
    parser.add_argument("--values", action="store_true", help="compare values too, tensor by tensor")
    parser.add_argument("--job.config_file", dest="config_file", help="TOML: could this job be seeded from PATH?")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin files, with weights_only")
    parser.add_argument("--follow-links", action="store_true", help="read files that are links out of the folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0 if the path is healthy, equal to the other path, and can seed the job; else 1."""
    with without_collection():
        from flame_ext.tools.describe import compare_values, describe, differences

    if options.values and not options.against:
        raise ConfigError("--values compares values; name what to compare with: --against PATH")
    found = describe(options.path, options.allow_pickle, options.follow_links)
    facts = as_json(found)
    if options.config_file:
        from flame_ext.preflight.parse import parse
        from flame_ext.tools.architecture import why_not_seedable

        logging.getLogger().setLevel(logging.WARNING)
        reason, grown = why_not_seedable(parse([f"--job.config_file={options.config_file}"]), str(found.source.path))
        facts |= {"seedable": reason is None, "why_not_seedable": reason, "grown_vocabulary": grown}
    if options.against:
        differing, first, second, common = differences(
            found, describe(options.against, options.allow_pickle, options.follow_links)
        )
        if options.values:
            differing += compare_values(first, second, common)
        facts["against"] = {
            "path": options.against,
            "compared": "values" if options.values else "headers",
            "same": len(common) - len({d.name for d in differing} & set(common)),
            "differences": [dataclasses.asdict(difference) for difference in differing],
        }
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(found, facts)
    differs = "against" in facts and facts["against"]["differences"]
    return 1 if differs or found.problems or not facts.get("seedable", True) else 0


def as_json(found: Description) -> dict[str, Any]:
    """Returns the whole description as plain data. Scripts rely on the keys."""
    source, whole = found.source, _sizes(found.source.entries.values())
    return {
        "path": str(source.path),
        "layout": source.layout,
        "step": found.step,
        "source_digest": source.digest,
        "bytes": whole["bytes"],
        "parameters": whole["parameters"],
        "problems": found.problems,
        "facts": found.facts,
        "passed_over": list(source.passed_over),
        "objects": sorted(source.objects),
        "model_type": found.model_type,
        "tie_word_embeddings": found.tied,
        "tokenizer": found.tokenizer,
        "groups": {name: _sizes(source.entries[key] for key in keys) for name, keys in found.groups.items()},
        "keys": {
            key: {"shape": list(entry.shape), "dtype": _dtype(entry), "bytes": entry.nbytes, "file": entry.place}
            for key, entry in sorted(source.entries.items())
        },
    }


def _sizes(entries: Iterable[TensorEntry]) -> dict[str, Any]:
    entries = list(entries)
    return {
        "tensors": len(entries),
        "parameters": sum(math.prod(entry.shape) for entry in entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "dtypes": sorted({_dtype(entry) for entry in entries}),
    }


def _print(found: Description, facts: dict[str, Any]) -> None:
    """Prints the same for people, problems first."""
    # Outside a terminal each row stays one line; in a terminal a long key is folded, never cut.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(f"[bold]{escape(facts['path'])}[/]: {facts['layout']}, digest {facts['source_digest'][:16]}")
    for line in found.problems:
        console.print(f"[bold red]problem:[/] {escape(line)}")
    if facts.get("why_not_seedable"):
        console.print(f"[bold red]cannot seed this job:[/] {escape(facts['why_not_seedable'])}")
    elif "seedable" in facts:
        console.print("[green]this job can be seeded from it[/]")
    if facts.get("grown_vocabulary"):
        console.print(f"its vocabulary would grow: {escape(facts['grown_vocabulary'])}")
    if against := facts.get("against"):
        _print_differences(console, **against)
    ties = "tied" if found.tied else "not tied"
    config = "no config.json" if found.model_type is None else f"config.json: {found.model_type}, embeddings {ties}"
    for line in [*found.facts, f"{config}; tokenizer: {', '.join(found.tokenizer) or 'none'}"]:
        console.print(escape(line))
    numbers = ("tensors", "parameters", "bytes")
    table = Table("group", *(Column(name, justify="right") for name in numbers), "dtypes")
    for name, sizes in facts["groups"].items():
        table.add_row(name, *(f"{sizes[key]:,}" for key in numbers), ", ".join(sizes["dtypes"]))
    console.print(table)
    if not against:
        table = Table(Column("key", overflow="fold"), "shape", "dtype", "bytes", Column("file", overflow="fold"))
        for key, entry in facts["keys"].items():
            shape, size = "x".join(map(str, entry["shape"])), f"{entry['bytes']:,}"
            table.add_row(escape(key), shape, entry["dtype"], size, escape(entry["file"]))
        console.print(table)


def _print_differences(
    console: Console, path: str, compared: str, same: int, differences: list[dict[str, Any]]
) -> None:
    colour = "red" if differences else "green"
    summary = f"{same} tensors are the same ({compared}), {len(differences)} differences"
    console.print(f"[bold {colour}]against {escape(path)}:[/] {summary}")
    table = Table(Column("tensor", overflow="fold"), "difference", "here", "there", "max", "mean")
    for d in differences:
        sizes = ("" if d[key] is None else f"{d[key]:.3g}" for key in ("max_abs", "mean_abs"))
        table.add_row(escape(d["name"]), d["kind"], escape(d["first"]), escape(d["second"]), *sizes)
    if differences:
        console.print(table)


def _dtype(entry: TensorEntry) -> str:
    return str(entry.dtype).removeprefix("torch.")
