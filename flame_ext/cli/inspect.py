"""``flame-ext inspect``: what lies at a path."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter

from rich.console import Console
from rich.table import Column, Table

from flame_ext.seeding.layouts import open_source
from flame_ext.seeding.source import Source


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and what runs it."""
    parser = commands.add_parser("inspect", help="say what lies at a path, from headers alone")
    parser.add_argument("path", help="a Hugging Face folder or a DCP checkpoint")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin files, with weights_only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0 if the path is healthy."""
    source = open_source(options.path, options.allow_pickle)
    if options.json:
        print(json.dumps(as_json(source), indent=2))
    else:
        print_table(source)
    return 0


def as_json(source: Source) -> dict[str, object]:
    """Layout, digest, totals, and each key with its shape, dtype, size and file."""
    return {
        "path": str(source.path),
        "layout": source.layout,
        "source_digest": source.digest,
        "bytes": sum(entry.nbytes for entry in source.entries.values()),
        "passed_over": list(source.passed_over),
        "objects": sorted(source.objects),
        "keys": {
            key: {
                "shape": list(entry.shape),
                "dtype": str(entry.dtype).removeprefix("torch."),
                "bytes": entry.nbytes,
                "file": entry.place,
            }
            for key, entry in sorted(source.entries.items())
        },
    }


def print_table(source: Source) -> None:
    """The same, for people."""
    # Piped or redirected, a row stays a line; in a terminal a long key is folded, never cut.
    console = Console(width=None if sys.stdout.isatty() else 200)
    facts = as_json(source)
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in source.entries.values())
    console.print(
        f"{source.path}: {source.layout}, {len(source.entries)} tensors ({', '.join(f'{n} {d}' for d, n in dtypes.items())}), "
        f"{facts['bytes']:,} bytes, digest {source.digest[:16]}"
    )
    for name in source.passed_over:
        console.print(f"passed over: {name}")
    if source.objects:
        console.print(f"not tensors: {', '.join(sorted(source.objects))}")
    table = Table(Column("key", overflow="fold"), "shape", "dtype", "bytes", Column("file", overflow="fold"))
    for key, entry in sorted(source.entries.items()):
        dtype = str(entry.dtype).removeprefix("torch.")
        table.add_row(key, "x".join(map(str, entry.shape)), dtype, f"{entry.nbytes:,}", entry.place)
    console.print(table)
