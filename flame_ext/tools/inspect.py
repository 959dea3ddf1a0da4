"""``flame-ext inspect``: what lies at a path."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flame_ext.imports import without_collection

if TYPE_CHECKING:
    from flame_ext.seeding.sources.source import TensorEntry
    from flame_ext.tools.compare import Difference
    from flame_ext.tools.describe import Description


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and what runs it."""
    parser = commands.add_parser(
        "inspect", help="say what lies at a path, from headers alone, and how two of them differ"
    )
    parser.add_argument(
        "path", help="a Hugging Face folder, an export, a DCP checkpoint, a training step or a dump folder"
    )
    parser.add_argument("--against", metavar="PATH", help="another one, of any layout, to compare with")
    parser.add_argument("--values", action="store_true", help="compare values too, tensor by tensor")
    parser.add_argument("--job.config_file", dest="config_file", help="TOML: could this job be seeded from PATH?")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin files, with weights_only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0 if the path is healthy, the same as the other, and what the job needs; else 1."""
    with without_collection():
        from flame_ext.errors import ConfigError
        from flame_ext.tools.compare import compare_values
        from flame_ext.tools.describe import describe, differences

    if options.values and not options.against:
        raise ConfigError("--values compares values; name what to compare with: --against PATH")
    found = describe(options.path, options.allow_pickle)
    reason: str | None = None
    if options.config_file:
        from flame_ext.preflight.parse import parse
        from flame_ext.tools.seedable import why_not_seedable

        logging.getLogger().setLevel(logging.WARNING)
        reason = why_not_seedable(parse([f"--job.config_file={options.config_file}"]), str(found.source.path))
    facts: dict[str, Any] = as_json(found)
    if options.config_file:
        facts["seedable"], facts["why_not_seedable"] = reason is None, reason
    differing: list[Difference] = []
    if options.against:
        differing, first, second, common = differences(found, describe(options.against, options.allow_pickle))
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
        _print(found, facts, differing, show_keys=not options.against)
    return 1 if differing or found.problems or reason is not None else 0


def as_json(found: Description) -> dict[str, Any]:
    """Everything, with keys that stay: scripts rely on them."""
    source = found.source
    return {
        "path": str(source.path),
        "layout": source.layout,
        "step": found.step,
        "source_digest": source.digest,
        "bytes": sum(entry.nbytes for entry in source.entries.values()),
        "parameters": sum(math.prod(entry.shape) for entry in source.entries.values()),
        "problems": found.problems,
        "facts": found.facts,
        "passed_over": list(source.passed_over),
        "objects": sorted(source.objects),
        "model_type": found.model_type,
        "tie_word_embeddings": found.tied,
        "tokenizer": found.tokenizer,
        "groups": {name: _sizes(keys, source.entries) for name, keys in found.groups.items()},
        "keys": {
            key: {
                "shape": list(entry.shape),
                "dtype": _dtype(entry),
                "bytes": entry.nbytes,
                "file": entry.place,
            }
            for key, entry in sorted(source.entries.items())
        },
    }


def _sizes(keys: list[str], entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    held = [entries[key] for key in keys]
    return {
        "tensors": len(held),
        "parameters": sum(math.prod(entry.shape) for entry in held),
        "bytes": sum(entry.nbytes for entry in held),
        "dtypes": sorted({_dtype(entry) for entry in held}),
    }


def _print(found: Description, facts: dict[str, Any], differing: list[Difference], show_keys: bool) -> None:
    """The same, for people; what is wrong comes first."""
    # Piped or redirected, a row stays a line; in a terminal a long key is folded, never cut.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    source = found.source
    console.print(f"[bold]{escape(str(source.path))}[/]: {source.layout}, digest {source.digest[:16]}")
    for line in found.problems:
        console.print(f"[bold red]problem:[/] {escape(line)}")
    if facts.get("why_not_seedable"):
        console.print(f"[bold red]can not seed this job:[/] {escape(facts['why_not_seedable'])}")
    elif "seedable" in facts:
        console.print("[green]this job can be seeded from it[/]")
    if "against" in facts:
        _print_differences(console, facts["against"], differing)
    for line in _context(found):
        console.print(escape(line))
    table = Table("group", *(Column(name, justify="right") for name in ("tensors", "parameters", "bytes")), "dtypes")
    for name, sizes in facts["groups"].items():
        numbers = (f"{sizes[key]:,}" for key in ("tensors", "parameters", "bytes"))
        table.add_row(name, *numbers, ", ".join(sizes["dtypes"]))
    console.print(table)
    if show_keys:
        table = Table(Column("key", overflow="fold"), "shape", "dtype", "bytes", Column("file", overflow="fold"))
        for key, entry in sorted(source.entries.items()):
            table.add_row(
                escape(key), "x".join(map(str, entry.shape)), _dtype(entry), f"{entry.nbytes:,}", escape(entry.place)
            )
        console.print(table)


def _print_differences(console: Console, against: dict[str, Any], differing: list[Difference]) -> None:
    what = f"{against['same']} tensors are the same ({against['compared']}), {len(differing)} differences"
    console.print(f"[bold {'red' if differing else 'green'}]against {escape(against['path'])}:[/] {what}")
    if not differing:
        return
    table = Table(Column("tensor", overflow="fold"), "difference", "here", "there", "max", "mean")
    for d in differing:
        sizes = ("", "") if d.max_abs is None or d.mean_abs is None else (f"{d.max_abs:.3g}", f"{d.mean_abs:.3g}")
        table.add_row(escape(d.name), d.kind, escape(d.first), escape(d.second), *sizes)
    console.print(table)


def _context(found: Description) -> Iterator[str]:
    yield from found.facts
    if found.model_type is not None:
        tied = "tied" if found.tied else "not tied"
        yield f"config.json: {found.model_type}, embeddings {tied}; tokenizer: {', '.join(found.tokenizer) or 'none'}"
    else:
        yield f"no config.json; tokenizer: {', '.join(found.tokenizer) or 'none'}"


def _dtype(entry: TensorEntry) -> str:
    return str(entry.dtype).removeprefix("torch.")
