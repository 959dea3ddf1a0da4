"""The figures of a report, by matplotlib: one of each task, and one of all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flame_ext.lab.results import FIGURES, OF_WHAT, Estimate, Results, curve, main_figure
from flame_ext.tools.plot import figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _whole(budgets: dict[str, Results]) -> tuple[Results, str]:
    """Returns the results of the runs to the last step, unless none of those is done, and the name of the task's main figure."""
    results = next(iter(budgets.values()))
    return results, main_figure(next(iter(results.values()))[0]["figures"])


def draw(task: str, budgets: dict[str, Results], objectives: list[str]) -> Figure:
    """Held-out loss over tokens and over operations, each seed a line, and the task's main figure with its intervals.

    An objective has its place and its color by its number among all ``objectives``.
    """
    figure = figure_class("lab report")(figsize=(12, 3.4), dpi=120, layout="constrained")
    over_tokens, over_operations, bars = figure.subplots(1, 3)
    whole, shown = _whole(budgets)
    learn = next(iter(whole.values()))[0].get("learn")
    numbers = {name: number for number, name in enumerate(objectives)}
    for objective, results in whole.items():
        for panel, axis in ((over_tokens, "tokens"), (over_operations, "operations")):
            for i, result in enumerate(results):
                places, losses = curve(result, axis)
                label = objective if i == 0 else None
                panel.plot(places, losses, color=f"C{numbers[objective]}", linewidth=1.2, label=label)
            panel.set_xlabel(axis)
            panel.set_title(f"held-out loss{OF_WHAT[learn]}", fontsize=10)
    over_tokens.legend(frameon=False, fontsize=8)
    width = 0.8 / len(budgets)
    for place, (budget, by_objective) in enumerate(budgets.items()):
        for objective, results in by_objective.items():
            found = Estimate.of([result["figures"][shown] for result in results])
            number, alpha = numbers[objective], 0.5 if budget == "compute" else 1
            style = {"color": f"C{number}", "alpha": alpha, "yerr": found.half, "capsize": 4}
            bars.bar(number + place * width, found.mean, width, **style)
    bars.set_xticks(range(len(numbers)), list(numbers), rotation=30, ha="right", fontsize=8)
    bars.set_ylim(0, None if shown == "loss_answer" else 1)
    also = ", light: at equal compute" if "compute" in budgets else ""
    bars.set_title(f"{FIGURES[shown]}{also}", fontsize=10)
    for panel in (over_tokens, over_operations, bars):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(task, fontsize=11)
    return figure


def draw_all(tasks: dict[str, dict[str, Results]], objectives: list[str]) -> Figure:
    """Each task's main figure: a row for each objective, its seeds, their mean and its interval. As :func:`draw` has them."""
    size = 1.4 + 2.2 * len(tasks), 0.9 + 0.24 * len(objectives)
    figure = figure_class("lab report")(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, (task, budgets) in zip(panels, tasks.items(), strict=True):
        whole, shown = _whole(budgets)
        for objective, results in whole.items():
            row, found = objectives.index(objective), Estimate.of([result["figures"][shown] for result in results])
            panel.plot(found.values, [row] * len(results), ".", color=f"C{row}", alpha=0.4, markersize=4)
            if math.isnan(found.mean):
                panel.annotate("diverged", (0.1, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
            panel.errorbar(found.mean, row, xerr=found.half, fmt="o", color=f"C{row}", markersize=4, capsize=3)
        if shown != "loss_answer":
            # Of a share, a small difference should look small; an interval may reach beyond all of it.
            panel.set_xlim(0, min(1.03, panel.get_xlim()[1]))
        panel.set_title(task, fontsize=10)
        panel.set_xlabel(FIGURES[shown], fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(objectives)), objectives, fontsize=8)
    panels[0].invert_yaxis()
    return figure
