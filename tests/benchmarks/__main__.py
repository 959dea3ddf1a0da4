"""All benchmarks: ``python -m tests.benchmarks [--only startup,steps] [--quick] [--json FILE] [--markdown FILE]``.

Each topic is a module with ``measure(quick)``, which returns tables. They are printed; ``--markdown`` writes them to a file, or,
where the file has places for them (``<!-- table: name -->`` … ``<!-- end of table -->``), into those;
``--json`` keeps hardware, versions and every run. Both are written after each topic, so that what was measured is not lost.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Table, as_json, facts, facts_line, into_page

TOPICS = ("startup", "seeding", "parity", "steps", "memory", "context", "mixtures", "objective", "data", "accelerator")


def main(arguments: list[str] | None = None) -> None:
    """Run the topics and write what they find."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(TOPICS), help=f"topics, of {','.join(TOPICS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, single runs: to see that it works")
    parser.add_argument("--json", type=Path, help="facts and every figure go there")
    parser.add_argument("--markdown", type=Path, help="a file for the tables, or one that has places for them")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for the topic accelerator")
    parser.add_argument("--parts", default="", help="of the topic accelerator, by their beginnings: debug,steps future")
    parser.add_argument("--layers", type=int, help="of the topic seeding: one size alone, of 16, 8 and 4")
    parser.add_argument("--ranks", type=int, help="of the topic seeding: one number of ranks alone, of 1, 2 and 4")
    options = parser.parse_args(arguments)
    topics = options.only.split(",")
    if unknown := [topic for topic in topics if topic not in TOPICS]:
        parser.error(f"--only: unknown topic {', '.join(unknown)}; there are: {', '.join(TOPICS)}")
    results: dict[str, Any] = {"quick": options.quick, "facts": facts(), "seconds": {}, "tables": {}}
    print(facts_line(results["facts"]), end="\n\n", flush=True)
    done: list[Table] = []
    environment = dict(os.environ)
    for topic in topics:
        begin = time.monotonic()
        more: dict[str, Any] = {
            "accelerator": {"budget": options.budget, "only": [*filter(None, options.parts.split(","))]},
            "seeding": {"layers": options.layers, "ranks": options.ranks},
        }.get(topic, {})
        tables = importlib.import_module(f"tests.benchmarks.{topic}").measure(quick=options.quick, **more)
        os.environ.clear()
        os.environ.update(environment)
        results["seconds"][topic] = round(time.monotonic() - begin, 1)
        done += tables
        for table in tables:
            print(f"## {table.name}\n\n{table.markdown()}\n", flush=True)
        results["tables"].update(as_json(tables))
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
        if options.markdown:
            write_markdown(
                options.markdown, done, facts_line(results["facts"]) + (", --quick" if options.quick else "")
            )


def write_markdown(file: Path, tables: list[Table], measured_on: str) -> None:
    """Into the page's places, each with a line of what it was measured on; a file without places holds just the tables."""
    page = file.read_text() if file.exists() else ""
    dated = [Table(t.name, t.columns, t.rows, [*t.notes, f"Measured on: {measured_on}."]) for t in tables]
    if "<!-- table: " in page:
        for table in dated:
            page = into_page(page, table)
    else:
        page = "\n".join(f"## {table.name}\n\n{table.markdown()}\n" for table in dated)
    file.write_text(page)


if __name__ == "__main__":
    main()
