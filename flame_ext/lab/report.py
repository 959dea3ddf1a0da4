"""The report of a plan: a table and a figure of each task, at equal tokens and at equal compute."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from flame_ext.errors import UserError
from flame_ext.files import write_json
from flame_ext.lab.job import LOG, PLAN, RESULT, SPECIFICATION
from flame_ext.tools.plot import figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = {  # of a run, and what a table says above them
    "exact": "right answers",
    "creative": "creative",
    "coherent": "coherent",
    "new": "coherent and new",
    "accuracy_forced": "teacher-forced accuracy",
    "loss_answer": "loss of the answer",
    "loss_equal_tokens": "held-out loss, equal tokens",
    "loss_equal_compute": "held-out loss, equal compute",
}
# What a run's losses are of; an early result does not say.
OF_WHAT = {"answer": " of the answer", "row": " of the row", None: ""}
# Student's t, 97.5 %, of 1 to 30 degrees of freedom
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Results = dict[str, list[dict[str, Any]]]  # the results of each objective, one a seed


def student(freedom: int) -> float:
    """The number of standard errors that a 95 % interval reaches to either side, of ``freedom`` = values - 1."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds, and half of its 95 % interval; None of a single seed. NaN if a seed's value is not finite."""

    mean: float
    half: float | None
    values: list[float]

    @staticmethod
    def of(values: list[float]) -> Estimate:
        count = len(values)
        if not all(map(math.isfinite, values)):
            return Estimate(math.nan, None, values)
        half = None if count < 2 else student(count - 1) * stdev(values) / count**0.5
        return Estimate(fmean(values), half, values)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return f"diverged ({sum(not math.isfinite(value) for value in self.values)} of {len(self.values)})"
        return f"{self.mean:.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


def write_report(folder: Path) -> list[Path]:
    """Writes ``report/report.md``, ``report.json`` and a figure of each task as PNG and SVG; returns their names.

    Raises a UserError if the folder is not a plan's or no run is done, and, after table and JSON, if matplotlib is missing.
    """
    about, tasks = gather(folder)
    target, figures = folder / "report", summary(tasks)
    files = [target / "report.md", target / "report.json"]
    write_json(files[1], _finite(about | {"tasks": figures}))
    files[0].write_text(markdown(about, figures), encoding="utf-8")
    for task, budgets in tasks.items():
        figure = draw(task, budgets, about["objectives"])
        for ending in ("png", "svg"):
            files.append(target / f"{task}.{ending}")
            figure.savefig(files[-1])
    return files


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(of_key) for key, of_key in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def gather(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Results]]]:
    """Reads the plan's name and how many runs are done, and the results of each task and budget."""
    try:
        said = json.loads((folder / PLAN).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: no {PLAN} that can be read; name the folder of a flame-ext lab run") from e
    found = [result for run in said["runs"] if (result := _result_of(folder / run)) is not None]
    if not found:
        raise UserError(f"{folder}: none of {len(said['runs'])} runs is done yet")
    names = list(dict.fromkeys(result["run"]["task"] for result in found))
    tasks = {task: _of_task([result for result in found if result["run"]["task"] == task]) for task in names}
    objectives = list(dict.fromkeys(Path(run).parts[-2] for run in said["runs"]))  # as Run.folder names them
    reverse = said.get("reverse", [])
    missing = [run for run in [*said["runs"], *reverse] if not (folder / run / RESULT).is_file()]
    about = {
        "plan": said["name"],
        "done": len(found),
        "of": len(said["runs"]),
        "objectives": objectives,
        "reverse": {run: _last_loss(result) for run in reverse if (result := _result_of(folder / run)) is not None},
    }
    begun = [run for run in missing if (folder / run / LOG).is_file()]
    return about | {"missing": missing, "begun": begun}, tasks


def _result_of(folder: Path) -> dict[str, Any] | None:
    """The result of a run, with what its specification says beside; None if it is not done."""
    files = [file for file in (folder / SPECIFICATION, folder / RESULT) if file.is_file()]
    values = {key: value for file in files for key, value in json.loads(file.read_text()).items()}
    return values if folder / RESULT in files else None


def _last_loss(result: dict[str, Any]) -> float:
    """The last held-out loss; NaN if it was not finite."""
    return _curve(result, "tokens")[1][-1]


def _of_task(found: list[dict[str, Any]]) -> dict[str, Results]:
    """The results of a task by budget and objective, in the plan's order, with the held-out losses that all have reached added."""
    budgets: dict[str, Results] = {}
    for result in sorted(found, key=lambda result: result["run"]["budget"] == "compute"):
        run = result["run"]
        budgets.setdefault(run["budget"], {}).setdefault(run["objective"], []).append(result)
    for of_budget in budgets.values():
        results = [result for of_objective in of_budget.values() for result in of_objective]
        for name, axis in (("loss_equal_tokens", "tokens"), ("loss_equal_compute", "operations")):
            reached = min(result["held_out"][-1][axis] for result in results)
            for result in results:
                if (loss := held_out_at(result, axis, reached)) is not None:
                    result["figures"][name] = loss
    return budgets


def held_out_at(result: dict[str, Any], axis: str, reached: float) -> float | None:
    """The held-out loss of a run after so many "tokens" or "operations", between the two validations around; None before the first one.

    NaN where a validation's was not finite.
    """
    places, losses = _curve(result, axis)
    return float(np.interp(reached, places, losses)) if places[0] <= reached else None


def operations(result: dict[str, Any]) -> float:
    """Those of the whole run."""
    return result["steps"] * result["tokens_of_a_step"] * result["operations_per_token"]["total"]


def summary(tasks: dict[str, dict[str, Results]]) -> dict[str, Any]:
    """Plain data: of each task, budget and objective the seeds, the compute, and each figure's mean, interval and values."""

    def of_objective(results: list[dict[str, Any]]) -> dict[str, Any]:
        known = [name for name in FIGURES if all(name in result["figures"] for result in results)]
        estimates = {name: Estimate.of([result["figures"][name] for result in results]) for name in known}
        return {
            "seeds": [result["run"]["seed"] for result in results],
            "tokens": fmean(result["steps"] * result["tokens_of_a_step"] for result in results),
            "operations": fmean(operations(result) for result in results),
            "operations_per_token": results[0]["operations_per_token"],
            "learn": results[0].get("learn"),
            "figures": {n: {"mean": e.mean, "half": e.half, "values": e.values} for n, e in estimates.items()},
        }

    return {
        task: {budget: {o: of_objective(results) for o, results in by.items()} for budget, by in budgets.items()}
        for task, budgets in tasks.items()
    }


def markdown(about: dict[str, Any], tasks: dict[str, Any]) -> str:
    """The tables, from :func:`gather` and :func:`summary`."""
    lines = [
        f"# {about['plan']}",
        "",
        f"{about['done']} of {about['of']} runs. Mean over seeds ± half of the 95 % interval (Student's t).",
    ]
    for task, budgets in tasks.items():
        lines += ["", f"## {task}", "", f"![{task}]({task}.png)"]
        for budget, objectives in budgets.items():
            said = (
                "Each run to its last step"
                if budget == "tokens"
                else "Runs that end at the cheapest objective's operations"
            )
            shown = [n for n in FIGURES if any(n in objective["figures"] for objective in objectives.values())]
            if budget == "compute":  # these runs end there: nothing has to be read off between
                shown = [n for n in shown if n not in ("loss_equal_tokens", "loss_equal_compute")]
            cheapest = min(objective["operations"] for objective in objectives.values())
            of_what = OF_WHAT[next(iter(objectives.values()))["learn"]]
            heads = (FIGURES[n].replace("held-out loss", f"held-out loss{of_what}") for n in shown)
            columns = ["objective", "seeds", "tokens", "operations", *heads]
            lines += ["", f"{said}:", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
            for objective, values in objectives.items():
                known = {n: str(Estimate(**v)) for n, v in values["figures"].items()}
                compute = f"{values['operations']:.3g} ({values['operations'] / cheapest:.2f}x)"
                seeds = len(values["seeds"])
                planned = seeds + sum(run.startswith(f"runs/{task}/{objective}/{budget}-") for run in about["missing"])
                cells = [
                    objective,
                    str(seeds) if seeds == planned else f"{seeds} of {planned}",
                    f"{values['tokens']:,.0f}",
                    compute,
                ]
                lines.append("| " + " | ".join([*cells, *(known.get(n, "–") for n in shown)]) + " |")
        missing = [run for run in about["missing"] if Path(run).parts[1] == task]
        lines += _of_reverse_models(about["reverse"], missing, task) + _not_done(missing, about["begun"])
    without = [run for run in about["missing"] if Path(run).parts[1] not in tasks]
    return "\n".join([*lines, *_not_done(without, about["begun"])]) + "\n"


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


def _curve(result: dict[str, Any], axis: str) -> tuple[list[float], list[float]]:
    """Places on an axis, and the held-out losses there; NaN where one was not finite."""
    points = result["held_out"]
    return [p[axis] for p in points], [math.nan if p["loss"] is None else p["loss"] for p in points]


def draw(task: str, budgets: dict[str, Results], objectives: list[str]) -> Figure:
    """Held-out loss over tokens and over operations, each seed a line, and the task's first figure with its intervals.

    An objective has its place and its color by its number among all ``objectives``.
    """
    figure = figure_class("lab report")(figsize=(12, 3.4), dpi=120, layout="constrained")
    over_tokens, over_operations, bars = figure.subplots(1, 3)
    whole = next(iter(budgets.values()))  # to the last step, unless none of those is done
    numbers = {name: number for number, name in enumerate(objectives)}
    for objective, results in whole.items():
        for panel, axis in ((over_tokens, "tokens"), (over_operations, "operations")):
            for i, result in enumerate(results):
                places, losses = _curve(result, axis)
                label = objective if i == 0 else None
                panel.plot(places, losses, color=f"C{numbers[objective]}", linewidth=1.2, label=label)
            panel.set_xlabel(axis)
            learn = next(iter(whole.values()))[0].get("learn")
            panel.set_title(f"held-out loss{OF_WHAT[learn]}", fontsize=10)
    over_tokens.legend(frameon=False, fontsize=8)
    of_first = next(iter(whole.values()))[0]["figures"]
    shown = next(
        name for name in FIGURES if name in of_first and name not in ("loss_equal_tokens", "loss_equal_compute")
    )
    width = 0.8 / len(budgets)
    for place, (budget, by_objective) in enumerate(budgets.items()):
        for objective, results in by_objective.items():
            found = Estimate.of([result["figures"][shown] for result in results])
            number, alpha = numbers[objective], 0.5 if budget == "compute" else 1
            style = {"color": f"C{number}", "alpha": alpha, "yerr": found.half, "capsize": 4}
            bars.bar(number + place * width, found.mean, width, **style)
    bars.set_xticks(range(len(numbers)), list(numbers), rotation=20, fontsize=8)
    bars.set_ylim(0, None if shown == "loss_answer" else 1)
    also = ", light: at equal compute" if "compute" in budgets else ""
    bars.set_title(f"{FIGURES[shown]}{also}", fontsize=10)
    for panel in (over_tokens, over_operations, bars):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(task, fontsize=11)
    return figure
