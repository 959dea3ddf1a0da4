"""What the benchmarks share: facts about the machine, fresh processes, medians and tables."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.ranks import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_OLMO = REPOSITORY / "tests" / "assets" / "tiny_olmo"
DEBUG_TOML = REPOSITORY / "configs" / "debug.toml"

NOT_MEASURED = "not measured"


@dataclass
class Table:
    """One table of the page, and the figures that it was made from."""

    name: str
    """Of its place in the page: ``<!-- table: name -->``."""
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    """Below it: what was measured how, goals met or missed."""
    figures: Any = None
    """Every run; goes to the JSON."""

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return "\n\n".join([table, *self.notes])


def facts() -> dict[str, Any]:
    """Hardware and versions, and how busy the machine is now."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = torch.cuda.get_device_name() if accelerator is not None and accelerator.type == "cuda" else str(accelerator)
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "accelerator": None if accelerator is None else name,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchtitan", "transformers", "datasets", "flame_ext")},
        "load_average": os.getloadavg()[0],
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def facts_line(found: dict[str, Any]) -> str:
    """The same in a line for people."""
    device = found["accelerator"] or "no accelerator"
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "torchtitan", "transformers"))
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB, {device}; {versions}; load average "
        f"{found['load_average']:.1f} when it began, {found['when']}"
    )


# -- numbers ----------------------------------------------------------------------------------------------------------


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one value that value, three times."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and, in brackets, each run where there are few, else the quartiles."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, middle, high = quartiles(values)
    inside = ", ".join(f"{v:.{digits}f}" for v in values) if len(values) <= 5 else f"{low:.{digits}f}-{high:.{digits}f}"
    return f"{middle:.{digits}f} ({inside})"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of each run to its peer of the same round: a slow minute falls on both."""
    return [value / peer for value, peer in zip(values, base, strict=True)]


def verdict(name: str, measured: float, goal: float, at_most: bool = True) -> str:
    """Whether a goal is met, in a sentence."""
    met = measured <= goal if at_most else measured >= goal
    return f"{name}: {measured:.2f}x, goal {'at most' if at_most else 'at least'} {goal:g}x: {'met' if met else '**missed**'}."


# -- processes --------------------------------------------------------------------------------------------------------


def rank_environment(rank: int = 0, world_size: int = 1, port: int | None = None) -> dict[str, str]:
    """Torchrun's variables of a rank."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
        **{"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())},
    }


def fresh(code: str, *arguments: str, env: dict[str, str] | None = None) -> tuple[dict[str, Any], float]:
    """Run Python code in a new process that prints a line of JSON at its end.

    Returns:
        What it printed, and the time at which the process was started (``time.monotonic()``).

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{code!r} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return json.loads(lines[-1]), begin


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call an importable function in a new process: the kernel keeps one peak of memory for the life of a process."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def cpu_seconds() -> float:
    """User and system time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_gib() -> float:
    """The most memory that this process has had, resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def as_json(tables: Sequence[Table]) -> dict[str, Any]:
    return {table.name: asdict(table) for table in tables}


# -- the page ---------------------------------------------------------------------------------------------------------


def into_page(page: str, table: Table) -> str:
    """The page with what stands between ``<!-- table: name -->`` and ``<!-- end of table -->`` exchanged.

    Raises:
        ValueError: it has no such place.
    """
    begin, end = f"<!-- table: {table.name} -->", "<!-- end of table -->"
    start = page.find(begin)
    stop = page.find(end, start)
    if start < 0 or stop < 0:
        raise ValueError(f"the page has no place {begin} … {end}")
    return f"{page[: start + len(begin)]}\n{table.markdown()}\n{page[stop:]}"
