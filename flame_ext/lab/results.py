"""The results of a plan's runs: read by task and objective, with losses at equal compute read off, and means over seeds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np

from flame_ext.errors import UserError
from flame_ext.lab.job import LOG, PLAN, RESULT, SPECIFICATION
from flame_ext.lab.origin import as_words

FIGURES = {  # of a run, and what a table says above them
    "exact": "right answers",
    "creative": "creative",
    "coherent": "coherent",
    "new": "coherent and new",
    "accuracy_forced": "teacher-forced accuracy",
    "loss_answer": "loss of the answer",
    "loss_equal_tokens": "held-out loss, equal tokens",
    "loss_equal_compute": "held-out loss, equal compute, within its schedule",
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

    def __format__(self, sign: str) -> str:
        """``sign``: "+" to show it of numbers that are not negative, too."""
        if math.isnan(self.mean):
            return f"diverged ({sum(not math.isfinite(value) for value in self.values)} of {len(self.values)})"
        return f"{self.mean:{sign}.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


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
    objectives = list(dict.fromkeys(Path(run).parts[-2] for run in said["runs"]))  # as Run.folder names them
    found.sort(key=lambda result: objectives.index(result["run"]["objective"]))  # the first one's may have failed
    tasks = {task: _of_task([result for result in found if result["run"]["task"] == task]) for task in names}
    reverse = said.get("reverse", [])
    missing = [run for run in [*said["runs"], *reverse] if not (folder / run / RESULT).is_file()]
    about = {
        "plan": said["name"],
        "done": len(found),
        "of": len(said["runs"]),
        "objectives": objectives,
        "generations": max(result.get("generations", 0) for result in found),
        "made_with": dict(Counter(as_words(result.get("origin", {})) for result in found)),
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
    return curve(result, "tokens")[1][-1]


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
    places, losses = curve(result, axis)
    return float(np.interp(reached, places, losses)) if places[0] <= reached else None


def main_figure(known: Collection[str]) -> str:
    """Returns the name of the figure that a task is about, of those of its runs: right answers, creative, or else the loss."""
    return next((name for name in ("exact", "creative") if name in known), "loss_answer")


def differences(results: list[dict[str, Any]], others: list[dict[str, Any]], figure: str) -> list[float]:
    """Returns a figure of an objective less that of another, of each seed for which both are done.

    Runs of a seed share initial weights and batches, so these can vary less over seeds than either objective's figure does.
    """
    of_others = {other["run"]["seed"]: other["figures"][figure] for other in others}
    return [
        result["figures"][figure] - of_others[seed]
        for result in results
        if (seed := result["run"]["seed"]) in of_others
    ]


def operations(result: dict[str, Any]) -> float:
    """Those of the whole run."""
    return result["steps"] * result["tokens_of_a_step"] * result["operations_per_token"]["total"]


def curve(result: dict[str, Any], axis: str) -> tuple[list[float], list[float]]:
    """Places on an axis, and the held-out losses there; NaN where one was not finite."""
    points = result["held_out"]
    return [p[axis] for p in points], [math.nan if p["loss"] is None else p["loss"] for p in points]
