"""What an accelerator shows in ten minutes: ``python -m tests.benchmarks --only accelerator --budget 560``.

Parts (:mod:`tests.benchmarks.on_device`) run in order of their value, each in a process of its own that may take so many seconds
and no more; parts of one group run at the same time. Their results are printed and kept as they come.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.benchmarks.common import NOT_MEASURED, REPOSITORY, Table, verdict

Found = dict[str, list[dict[str, Any]]]  # name of a part to its results


@dataclass(frozen=True)
class Part:
    """A function of :mod:`tests.benchmarks.on_device` and its arguments."""

    arguments: tuple[str, ...]
    seconds: int  # at most
    group: int

    @property
    def name(self) -> str:
        return " ".join(self.arguments)


PARTS = [
    Part(("debug",), 150, 1),
    Part(("parity", "bfloat16", "dense"), 150, 1),
    Part(("parity", "bfloat16", "mixtures"), 150, 1),
    Part(("backbone",), 60, 1),
    *(Part(("steps", row), 130, 2 + n) for n, row in enumerate(("cross-entropy", "future", "native", "documents"))),
    Part(("losses",), 60, 6),
    Part(("masks",), 100, 7),
    Part(("saving",), 150, 7),
    Part(("seeding",), 90, 8),
    *(Part(("steps", row), 130, 9 + n) for n, row in enumerate(("action", "future and documents", "heads"))),
    Part(("parity", "float32", "dense"), 200, 20),
    Part(("parity", "bfloat16", "dense", "compiled"), 200, 21),
    Part(("parity", "bfloat16", "mixtures", "compiled"), 200, 21),
]


def measure(quick: bool = False, budget: float = 560.0, only: Sequence[str] = ()) -> list[Table]:
    """The tables ``accelerator-steps`` and ``accelerator-checks``, of what ``budget`` seconds suffice for.

    ``only`` names parts by their beginnings. Without an accelerator nothing is measured, unless ``quick``: then tiny sizes show on
    the CPU that it works.
    """
    import torch

    parts = [part for part in PARTS if not only or part.name.startswith(tuple(only))]
    if not torch.accelerator.is_available() and not quick:
        parts = []
    with tempfile.TemporaryDirectory() as scratch:
        found = run(parts, Path(scratch), budget, quick)
    return [steps_table(found), checks_table(found)]


def run(parts: Sequence[Part], scratch: Path, budget: float, quick: bool) -> Found:
    """Run the parts, group by group, until the budget is spent; what a part has found until its limit counts."""
    begin, found = time.monotonic(), Found()
    for _, group in groupby(parts, key=lambda part: part.group):
        running = []
        for part in group:
            left = budget - (time.monotonic() - begin)
            if left < 20:
                print(f"== {part.name}: no time left", flush=True)
                continue
            running.append((part, _start(part, scratch, quick), min(part.seconds, left) + time.monotonic()))
        for part, process, until in running:
            code = _ended(process, until)
            results = scratch / f"{part.name}.jsonl"
            found[part.name] = (
                [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
            )
            print(f"== {part.name}: {code} after {time.monotonic() - begin:.0f} s", flush=True)
            print(*(f"   {json.dumps(row)[:600]}" for row in found[part.name]), sep="\n", flush=True)
            if code:
                print((scratch / f"{part.name}.log").read_text()[-1500:], flush=True)
    return found


def _start(part: Part, scratch: Path, quick: bool) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (scratch / f"{part.name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.on_device", str(scratch), str(int(quick)), *part.arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _ended(process: subprocess.Popen[bytes], until: float) -> int | str:
    """Its exit code, once it and all that it has started are gone."""
    try:
        return process.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _rows(found: Found) -> Iterator[dict[str, Any]]:
    for results in found.values():
        yield from results


def steps_table(found: Found) -> Table:
    """Time, share of the device's peak and memory of each row of the steps."""
    columns = ["", "ms a step", "tokens/s", "to native", "to cross-entropy", "MFU", "MFU with the teacher", "peak GiB"]
    rows = {row["row"]: row for row in _rows(found) if "row" in row}

    def to(row: str, base: str) -> float | None:
        return rows[row]["ms"] / rows[base]["ms"] if row in rows and base in rows else None

    cells = []
    for name, row in rows.items():
        ratios = [f"{ratio:.2f}x" if (ratio := to(name, base)) else "-" for base in ("native", "cross-entropy")]
        shares = [f"{row[key]:.1%}" if row.get(key) else "-" for key in ("mfu", "mfu_with_teacher")]
        cells.append(
            [name, f"{row['ms']:.0f}", f"{row['tokens_per_second']:,.0f}", *ratios, *shares, f"{row['peak_gib']:.1f}"]
        )
    notes = [f"{row['shape']}, bfloat16, compiled, in a row without waiting." for row in [*rows.values()][:1]]
    if slower := to("cross-entropy", "native"):
        notes.append(verdict("speed of cross-entropy to the native model's", 1 / slower, 0.95, at_most=False))
    for row, goal in (("future", 1.4), ("documents", 1.05)):
        if ratio := to(row, "cross-entropy"):
            notes.append(verdict(f"{row} to cross-entropy", ratio, goal))
    alone = [row["ms"] for row in _rows(found) if row.get("loss") == "InfoNCE" and row["compiled"]]
    if alone and "future" in rows:
        share = alone[0] / rows["future"]["ms"]
        notes.append(f"InfoNCE alone, 32k positions: {share:.1%} of the step with it; goal at most 4 %.")
    return Table("accelerator-steps", columns, cells or [[NOT_MEASURED] * len(columns)], notes, found)


def checks_table(found: Found) -> Table:
    """What holds, and what does not, of everything that is no time."""
    rows = [
        [row["check"], row["case"], "holds" if row["holds"] else "**fails**", row["measured"]]
        for row in _rows(found)
        if "check" in row
    ]
    return Table("accelerator-checks", ["", "case", "", "measured"], rows or [[NOT_MEASURED] * 4], [], found)
