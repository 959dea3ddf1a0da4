"""The report of a plan: a table and a figure of each task, at equal tokens and at equal compute."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from flame_ext.files import write_json
from flame_ext.lab.figures import draw, draw_all
from flame_ext.lab.job import LOG
from flame_ext.lab.results import FIGURES, OF_WHAT, Estimate, Results, differences, gather, main_figure, operations

ALL_TASKS = "_all"  # no task can be called so
CHEAPEST = "Runs that end at the cheapest objective's operations"
DIFFERENCE = "difference"


def write_report(folder: Path) -> list[Path]:
    """Writes ``report/report.md``, ``report.json``, a figure of each task and one of all as PNG and SVG; returns their names.

    Raises a UserError if the folder is not a plan's or no run is done, and, after table and JSON, if matplotlib is missing.
    """
    about, tasks = gather(folder)
    target, figures = folder / "report", summary(tasks)
    files = [target / "report.md", target / "report.json"]
    write_json(files[1], _finite(about | {"tasks": figures}))
    files[0].write_text(markdown(about, figures), encoding="utf-8")
    drawn = {task: draw(task, budgets, about["objectives"]) for task, budgets in tasks.items()}
    for name, figure in {**drawn, ALL_TASKS: draw_all(tasks, about["objectives"])}.items():
        for ending in ("png", "svg"):
            files.append(target / f"{name}.{ending}")
            figure.savefig(files[-1])
    return files


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(of_key) for key, of_key in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(tasks: dict[str, dict[str, Results]]) -> dict[str, Any]:
    """Plain data: of each task, budget and objective the seeds, the compute, and each figure's mean, interval and values.

    Of all objectives but the first one also those of the main figure's difference to the first one's, seed by seed.
    """

    def of_objective(results: list[dict[str, Any]], by: Results) -> dict[str, Any]:
        known = [name for name in FIGURES if all(name in result["figures"] for result in results)]
        estimates = {name: Estimate.of([result["figures"][name] for result in results]) for name in known}
        first = next(iter(by.values()))
        if results is not first and (paired := differences(results, first, main_figure(first[0]["figures"]))):
            estimates[DIFFERENCE] = Estimate.of(paired)
        return {
            "seeds": [result["run"]["seed"] for result in results],
            "tokens": fmean(result["steps"] * result["tokens_of_a_step"] for result in results),
            "operations": fmean(operations(result) for result in results),
            "operations_per_token": results[0]["operations_per_token"],
            "learn": results[0].get("learn"),
            "figures": {name: asdict(estimate) for name, estimate in estimates.items()},
        }

    return {
        task: {budget: {o: of_objective(results, by) for o, results in by.items()} for budget, by in budgets.items()}
        for task, budgets in tasks.items()
    }


def markdown(about: dict[str, Any], tasks: dict[str, Any]) -> str:
    """The tables, from :func:`gather` and :func:`summary`."""
    lines = [
        f"# {about['plan']}",
        "",
        f"{about['done']} of {about['of']} runs. Mean over seeds ± half of the 95 % interval (Student's t, which supposes values "
        "that are not of two kinds: look at those of each seed).",
        "",
        *_caveats(about, tasks),
        "- Made with " + "; ".join(f"{words} ({count} runs)" for words, count in about["made_with"].items()) + ".",
        "",
        f"![All tasks, to their last steps]({ALL_TASKS}.png)",
    ]
    for task, budgets in tasks.items():
        lines += ["", f"## {task}", "", f"![{task}]({task}.png)"]
        for budget, objectives in budgets.items():
            said = "Each run to its last step" if budget == "tokens" else CHEAPEST
            lines += ["", f"{said}:", "", *_table(f"runs/{task}", budget, objectives, about["missing"])]
        missing = [run for run in about["missing"] if Path(run).parts[1] == task]
        lines += _of_reverse_models(about["reverse"], missing, task) + _not_done(missing, about["begun"])
    without = [run for run in about["missing"] if Path(run).parts[1] not in tasks]
    return "\n".join([*lines, *_not_done(without, about["begun"])]) + "\n"


def _table(runs: str, budget: str, objectives: dict[str, Any], missing: list[str]) -> list[str]:
    """The table of a task and budget: a row for each objective; ``runs``: the folder of the task's."""
    first, of_first = next(iter(objectives.items()))
    names = {
        n: what.replace("held-out loss", f"held-out loss{OF_WHAT[of_first['learn']]}") for n, what in FIGURES.items()
    }
    main = main_figure(of_first["figures"])
    names[DIFFERENCE] = f"{FIGURES[main]}, less that of {first}"
    if budget == "compute":  # these runs end there: nothing has to be read off between
        del names["loss_equal_tokens"], names["loss_equal_compute"]
    shown = [n for n in names if any(n in objective["figures"] for objective in objectives.values())]
    cheapest = min(objective["operations"] for objective in objectives.values())
    columns = [
        "objective",
        "seeds",
        "tokens",
        "operations",
        *(names[n] for n in shown),
        f"{FIGURES[main]}, of each seed",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for objective, values in objectives.items():
        known = {n: f"{Estimate(**v):{'+' if n == DIFFERENCE else ''}}" for n, v in values["figures"].items()}
        seeds = len(values["seeds"])
        if DIFFERENCE in known and (of := len(values["figures"][DIFFERENCE]["values"])) < seeds:
            known[DIFFERENCE] += f" ({of} of {seeds} seeds)"
        of_seeds = values["figures"].get(main, {"values": []})["values"]
        planned = seeds + sum(run.startswith(f"{runs}/{objective}/{budget}-") for run in missing)
        cells = [
            objective,
            str(seeds) if seeds == planned else f"{seeds} of {planned}",
            f"{values['tokens']:,.0f}",
            f"{values['operations']:.3g} ({values['operations'] / cheapest:.2f}x)",
            *(known.get(n, "–") for n in shown),
            " ".join(f"{value:.3f}" for value in of_seeds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _caveats(about: dict[str, Any], tasks: dict[str, Any]) -> list[str]:
    """What the intervals do not say, a line each."""
    of_all = [o for budgets in tasks.values() for objectives in budgets.values() for o in objectives.values()]
    differences = [objective["figures"][DIFFERENCE] for objective in of_all if DIFFERENCE in objective["figures"]]
    lines = ["- Intervals are over seeds, for the one set of rows that all seeds and objectives share."]
    if count := about["generations"]:
        lines[0] += (
            f" A share of {count} answers has a standard error of up to {0.5 / count**0.5:.3f} of its own, which is in no interval."
        )
    if differences:
        lines.append(
            f"- Differences are taken seed by seed. Their {len(differences)} intervals are not corrected for their number: of as many "
            f"without any effect {0.05 * len(differences):.1f} would leave out 0 on average."
        )
    if any("loss_equal_compute" in objective["figures"] for objective in of_all):
        lines.append(
            "- Equal compute within its schedule: the loss on the way of a run whose learning rate was still to fall. Costly objectives "
            "look worse for it where that fall matters, and better where a model overfits."
        )
    return lines


def _of_reverse_models(losses: dict[str, float], missing: list[str], task: str) -> list[str]:
    """A line for each number of steps that the reverse models of a task take, and what their training counts in."""
    found: dict[str, dict[str, float | None]] = {}  # None = not done
    for run in [*losses, *missing]:
        if run.startswith(f"reverse/{task}/"):
            found.setdefault(Path(run).name.partition("-")[0], {})[run] = losses.get(run)
    lines = []
    for steps in sorted(found, key=int):
        done = {run: loss for run, loss in found[steps].items() if loss is not None}
        loss = f", held-out loss{OF_WHAT['row']} {Estimate.of(list(done.values()))}" if done else ""
        diverged = "".join(f", `{run}`" for run, loss in done.items() if not math.isfinite(loss))
        lines.append(
            f"- Reverse models of {int(steps):,} steps: {len(done)} of {len(found[steps])} trained{loss}{diverged}"
        )
    counted = ["", "Their training is in the operations of the objectives that predict their states."]
    return ["", *lines, *counted] if lines else []


def _not_done(runs: list[str], begun: list[str]) -> list[str]:
    if not runs:
        return []
    names = (
        f"- `{run}`: " + (f"running, stopped or failed, see its {LOG}" if run in begun else "not begun") for run in runs
    )
    return ["", "Not done, so that means of different objectives may be over different seeds:", "", *names]
