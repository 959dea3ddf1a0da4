"""``flame-ext plot``: draws curves of runs from their ``metrics.jsonl``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flame_ext.errors import UserError
from flame_ext.files import METRICS_NAME

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_METRICS = ("loss_ce", "loss_future", "future_top1")
FORMATS = (".png", ".svg", ".pdf")

Curve = tuple[list[int], list[float]]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser("plot", help="draw metrics of runs over their steps")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help=f"a dump folder, or its {METRICS_NAME}")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG, SVG or PDF (default: curves.png)")
    default = f"default: those of {', '.join(DEFAULT_METRICS)} there are"
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=default)
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="one for each run (default: the folders' names)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0; every failure is raised as a UserError before anything is written."""
    if options.output.suffix not in FORMATS:
        raise UserError(f"--output {str(options.output)!r}: expected a name that ends in {', '.join(FORMATS)}")
    labels = options.labels or [(path.parent if path.is_file() else path.resolve()).name for path in options.runs]
    if len(labels) != len(options.runs):
        raise UserError(f"--labels names {len(labels)}, for {len(options.runs)} runs; give one for each")
    runs = [read_metrics(path) for path in options.runs]
    figure = draw(list(zip(labels, runs, strict=True)), options.metrics)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output)
    print(f"Drew {', '.join(labels)} to {options.output}")
    return 0


def read_metrics(path: Path) -> dict[str, Curve]:
    """Returns the curve of each metric of a dump folder or its ``metrics.jsonl``, whose last line a kill may have cut off."""
    file = path / METRICS_NAME if path.is_dir() else path
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: cannot be read: {e}; name the dump folder of a run") from e
    curves: dict[str, Curve] = {}
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            if number == len(lines) and number > 1:
                break
            raise UserError(f"{file}, line {number}: not a step of a run ({type(e).__name__}: {e})") from e
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                steps, drawn = curves.setdefault(name, ([], []))
                steps.append(step)
                drawn.append(float(value))
    if not curves:
        raise UserError(f"{file}: holds no step with a number; has the run made one?")
    return curves


def figure_class(command: str) -> type[Figure]:
    """Returns matplotlib's figure; a UserError says how the command gets it where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError(f"flame-ext {command} draws with matplotlib: pip install 'flame_ext[plot]' ({e})") from e
    return Figure


def draw(runs: list[tuple[str, dict[str, Curve]]], metrics: list[str] | None = None) -> Figure:
    """Draws a panel for each metric (None = the default ones, else the first three) with a line for each run (label, curves)."""
    figure_of = figure_class("plot")
    from matplotlib.ticker import MaxNLocator

    there = sorted({name for _, curves in runs for name in curves})
    metrics = metrics or [name for name in DEFAULT_METRICS if name in there] or there[:3]
    if absent := [name for name in metrics if name not in there]:
        raise UserError(f"no run has {', '.join(absent)}; there are: {', '.join(there)}")
    figure = figure_of(figsize=(4.2 * len(metrics), 3.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, name in zip(panels, metrics, strict=True):
        for number, (label, curves) in enumerate(runs):
            if name in curves:
                panel.plot(*curves[name], label=label, color=f"C{number}", linewidth=1.4)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    return figure
