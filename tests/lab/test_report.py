"""The report of runs whose figures are known."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb

from flame_ext.files import write_json
from flame_ext.lab.figures import draw, draw_all
from flame_ext.lab.report import markdown, summary
from flame_ext.lab.results import FIGURES, Estimate, gather, student
from flame_ext.tools.main import main

FLOPS = {"ntp": 10.0, "top": 20.0}


def result(objective: str, seed: int, exact: float, steps: int = 4, budget: str = "tokens") -> dict[str, Any]:
    """Of steps of 100 tokens; the held-out loss falls from 5 by 1 a step, or by 1.5 with ``top``."""
    held_out = [
        {
            "step": s,
            "tokens": 100 * s,
            "operations": 100 * s * FLOPS[objective],
            "loss": 5 - s * (1 + 0.5 * (objective == "top")),
        }
        for s in range(1, steps + 1)
    ]
    return {
        "run": {"task": "star", "objective": objective, "seed": seed, "budget": budget},
        "steps": steps,
        "tokens_of_a_step": 100,
        "operations_per_token": {"total": FLOPS[objective]},
        "figures": {"exact": exact, "loss_answer": 1.0, "accuracy_by_position": [1.0, 0.5]},
        "held_out": held_out,
    }


def write(folder: Path, results: list[dict[str, Any]], absent: int = 0) -> Path:
    of = [result["run"] for result in results]
    names = [f"runs/{run['task']}/{run['objective']}/{run['budget']}-seed-{run['seed']}" for run in of]
    names += [f"runs/star/top/tokens-seed-{10 + i}" for i in range(absent)]
    write_json(folder / "plan.json", {"name": "known", "runs": names})
    for name, values in zip(names, results, strict=False):
        write_json(folder / name / "result.json", values)
    return folder


def rows_of_table(text: str) -> list[dict[str, str]]:
    """The rows of a report's one table, by the names of its columns."""
    columns, _, *rows = (
        [cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"
    )
    return [dict(zip(columns, row, strict=True)) for row in rows]


RESULTS = [
    result("ntp", 0, 0.5),
    result("top", 0, 0.9),
    result("ntp", 1, 0.4),
    result("top", 1, 1.0),
    result("ntp", 2, 0.6),
]


def test_means_intervals_and_equal_compute(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write(tmp_path / "lab", RESULTS, absent=1)
    assert main(["lab", "report", str(folder)]) == 0
    assert capsys.readouterr().out.count("Wrote") == 6
    found = json.loads((folder / "report" / "report.json").read_text())
    assert (found["done"], found["of"]) == (5, 6)
    ntp, top = (found["tasks"]["star"]["tokens"][name] for name in ("ntp", "top"))
    assert ntp["figures"]["exact"] == {
        "mean": 0.5,
        "half": pytest.approx(4.303 * 0.1 / math.sqrt(3)),
        "values": [0.5, 0.4, 0.6],
    }
    assert top["figures"]["exact"]["half"] == pytest.approx(12.706 * math.sqrt(0.005) / math.sqrt(2))
    assert (ntp["operations"], top["operations"]) == (4000, 8000)
    assert (ntp["figures"]["loss_equal_tokens"]["mean"], top["figures"]["loss_equal_tokens"]["mean"]) == (1, -1)
    # 4000 operations are four steps of ntp and two of top.
    assert (ntp["figures"]["loss_equal_compute"]["mean"], top["figures"]["loss_equal_compute"]["mean"]) == (1, 2)
    text = (folder / "report" / "report.md").read_text()
    assert "5 of 6 runs" in text and "| ntp | 3 | 400 | 4e+03 (1.00x) | 0.5000 ± 0.2484 | 1.0000 ± 0.0000 |" in text
    assert (folder / "report" / "star.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report" / "star.svg").read_bytes().startswith(b"<?xml")
    assert "](_all.png)" in text and (folder / "report" / "_all.png").is_file()


def test_differences_are_of_the_seeds_that_both_objectives_have(tmp_path: Path) -> None:
    # In the order in which runs end; seed 2 is done with ntp alone.
    results = [RESULTS[4], RESULTS[2], RESULTS[0], RESULTS[1], RESULTS[3]]
    about, tasks = gather(write(tmp_path / "lab", results))
    figures = summary(tasks)["star"]["tokens"]
    half = 12.706 * math.sqrt(2 * 0.1**2) / math.sqrt(2)
    assert "difference" not in figures["ntp"]["figures"]
    assert figures["top"]["figures"]["difference"] == {
        "mean": pytest.approx(0.5),
        "half": pytest.approx(half),
        "values": pytest.approx([0.4, 0.6]),
    }
    ntp, top = rows_of_table(markdown(about, summary(tasks)))
    assert ntp["right answers, less that of ntp"] == "–" and ntp["right answers, of each seed"] == "0.600 0.400 0.500"
    assert top["right answers, less that of ntp"] == f"+0.5000 ± {half:.4f}"
    assert top["right answers, of each seed"] == "0.900 1.000"


def test_differences_are_to_the_plans_first_objective_though_its_first_run_failed(tmp_path: Path) -> None:
    write(tmp_path / "lab", RESULTS)
    (tmp_path / "lab/runs/star/ntp/tokens-seed-0/result.json").unlink()
    about, tasks = gather(tmp_path / "lab")
    assert list(tasks["star"]["tokens"]) == ["ntp", "top"]
    _, top = rows_of_table(markdown(about, summary(tasks)))
    assert top["right answers, less that of ntp"] == "+0.6000 (1 of 2 seeds)"


def test_what_intervals_do_not_say_is_said(tmp_path: Path) -> None:
    origins = [{"versions": {"python": "3.11.7", "torch": "2.13.0"}}] * 4 + [{}]
    several = [values | {"generations": 400, "origin": o} for values, o in zip(RESULTS, origins, strict=True)]
    about, tasks = gather(write(tmp_path / "lab", several))
    text = markdown(about, summary(tasks))
    assert "A share of 400 answers has a standard error of up to 0.025 of its own" in text
    assert "- Made with python 3.11.7, torch 2.13.0 (4 runs); unknown versions (1 runs)." in text
    assert "Their 1 intervals are not corrected for their number" in text and "0.1 would leave out 0" in text
    assert "held-out loss, equal compute, within its schedule" in text and "- Equal compute within its schedule" in text


def test_without_a_seed_in_common_there_is_no_difference(tmp_path: Path) -> None:
    about, tasks = gather(write(tmp_path / "lab", [RESULTS[0], RESULTS[3]]))
    assert "less that of" not in markdown(about, summary(tasks))


def test_the_figure_of_all_tasks_has_means_intervals_and_seeds(tmp_path: Path) -> None:
    other = [
        {**values, "run": {**values["run"], "task": "text"}, "figures": {"loss_answer": 2.0}} for values in RESULTS
    ]
    about, tasks = gather(write(tmp_path / "lab", [*RESULTS, *other]))
    stars, texts = draw_all(tasks, about["objectives"]).axes
    assert [panel.get_title() for panel in (stars, texts)] == ["star", "text"]
    assert (stars.get_xlabel(), texts.get_xlabel()) == ("right answers", "loss of the answer")
    assert [label.get_text() for label in stars.get_yticklabels()] == ["ntp", "top"]
    seeds, mean = stars.lines[0], stars.containers[0]
    assert list(seeds.get_xdata()) == [0.5, 0.4, 0.6] and list(mean.lines[0].get_xdata()) == [0.5]
    (interval,) = mean.lines[2][0].get_segments()
    half = 4.303 * 0.1 / math.sqrt(3)
    assert list(interval[:, 0]) == pytest.approx([0.5 - half, 0.5 + half])
    assert stars.get_xlim()[0] == 0 < texts.get_xlim()[0], "a share's axis begins at none"


def test_the_figure_of_all_tasks_says_what_has_diverged_and_ends_at_all_of_a_share(tmp_path: Path) -> None:
    results = [result("ntp", 0, 0.0), result("ntp", 1, 0.4), result("top", 0, math.nan)]
    about, tasks = gather(write(tmp_path / "lab", results))
    (panel,) = draw_all(tasks, about["objectives"]).axes
    assert [(text.get_text(), text.xy[1]) for text in panel.texts] == [("diverged", 1)]
    assert panel.get_xlim() == (0, 1.03), "the interval of two seeds reaches beyond"


def test_what_lies_between_two_validations_is_interpolated(tmp_path: Path) -> None:
    folder = write(tmp_path / "lab", [result("ntp", 0, 0.5, steps=3), result("top", 0, 0.5)])
    of = summary(gather(folder)[1])["star"]["tokens"]
    assert of["top"]["figures"]["loss_equal_tokens"]["values"] == [5 - 3 * 1.5]
    assert of["top"]["figures"]["loss_equal_compute"]["values"] == [pytest.approx(5 - 1.5 * 1.5)]
    assert of["ntp"]["figures"]["exact"]["half"] is None


def test_a_run_that_has_diverged_is_named_and_the_others_are_reported(tmp_path: Path) -> None:
    diverged = result("top", 1, 0.0)
    diverged["held_out"][-1]["loss"] = None  # what validation.jsonl has for NaN
    diverged["figures"]["loss_answer"] = math.nan
    folder = write(tmp_path / "lab", [*RESULTS[:3], diverged])
    assert main(["lab", "report", str(folder)]) == 0
    _, top = rows_of_table((folder / "report" / "report.md").read_text())
    assert top[FIGURES["loss_answer"]] == top[FIGURES["loss_equal_tokens"]] == "diverged (1 of 2)"
    assert top[FIGURES["loss_equal_compute"]] == "2.0000 ± 0.0000"  # what it reads is before the divergence
    text = (folder / "report" / "report.json").read_text()
    figures = json.loads(text)["tasks"]["star"]["tokens"]["top"]["figures"]
    assert "NaN" not in text and figures["loss_equal_tokens"] == {"mean": None, "half": None, "values": [-1.0, None]}


def test_runs_that_are_not_done_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "lab", RESULTS, absent=2)
    said = json.loads((folder / "plan.json").read_text())
    write_json(folder / "plan.json", said | {"runs": [*said["runs"], "runs/other/ntp/tokens-seed-0"]})
    (folder / "runs/star/top/tokens-seed-11").mkdir()
    (folder / "runs/star/top/tokens-seed-11/log.txt").write_text("what is wrong")
    about, tasks = gather(folder)
    text = markdown(about, summary(tasks))
    assert "| ntp | 3 |" in text and "| top | 2 of 4 |" in text
    assert [line for line in text.splitlines() if line.startswith(("- `", "- Reverse"))] == [
        "- `runs/star/top/tokens-seed-10`: not begun",
        "- `runs/star/top/tokens-seed-11`: running, stopped or failed, see its log.txt",
        "- `runs/other/ntp/tokens-seed-0`: not begun",
    ]
    about, tasks = gather(write(tmp_path / "done", RESULTS))
    assert "Not done" not in markdown(about, summary(tasks))


def test_reverse_models_are_told_apart_by_their_steps_and_named_if_they_failed(tmp_path: Path) -> None:
    folder = write(tmp_path / "lab", [values | {"learn": "answer"} for values in RESULTS])
    losses = {"40-steps-seed-0": 2.0, "40-steps-seed-1": 1.0, "9-steps-seed-0": 7.0, "9-steps-seed-1": None}
    names = [f"reverse/star/{name}" for name in (*losses, "9-steps-seed-2")]
    write_json(folder / "plan.json", json.loads((folder / "plan.json").read_text()) | {"reverse": names})
    for name, loss in losses.items():
        held_out = [{"step": 1, "tokens": 100, "operations": 1.0, "loss": loss}]
        write_json(folder / "reverse" / "star" / name / "result.json", {"held_out": held_out, "learn": "row"})
    (folder / names[-1]).mkdir()
    (folder / names[-1] / "log.txt").write_text("what is wrong")
    about, tasks = gather(folder)
    text = markdown(about, summary(tasks))
    assert [line for line in text.splitlines() if line.startswith(("- `", "- Reverse"))] == [
        "- Reverse models of 9 steps: 2 of 3 trained, held-out loss of the row diverged (1 of 2), `reverse/star/9-steps-seed-1`",
        "- Reverse models of 40 steps: 2 of 2 trained, held-out loss of the row 1.5000 ± 6.3530",
        f"- `{names[-1]}`: running, stopped or failed, see its log.txt",
    ]
    assert "held-out loss of the answer, equal tokens" in text
    assert draw("star", tasks["star"], ["ntp", "top"]).axes[0].get_title() == "held-out loss of the answer"


def test_runs_of_equal_compute_have_a_table_of_their_own(tmp_path: Path) -> None:
    short = [result("ntp", 0, 0.5, budget="compute"), result("top", 0, 0.7, steps=2, budget="compute")]
    folder = write(tmp_path / "lab", [*RESULTS[:2], *short])
    about, tasks = gather(folder)
    _, _, after = markdown(about, summary(tasks)).partition("Runs that end at the cheapest objective's operations:")
    assert "| top | 1 | 200 | 4e+03 (1.00x) | 0.7000 | 1.0000 |" in after and "held-out" not in after


def test_lines_and_bars_are_those_of_the_results() -> None:
    results = {"tokens": {"ntp": RESULTS[::2], "top": RESULTS[1::2]}}
    tokens, compute, bars = draw("star", results, ["ntp", "top"]).axes
    assert [len(panel.lines) for panel in (tokens, compute)] == [5, 5]
    assert list(tokens.lines[3].get_ydata()) == [3.5, 2.0, 0.5, -1.0]
    assert list(compute.lines[3].get_xdata()) == [2000, 4000, 6000, 8000]
    assert [bar.get_height() for bar in bars.patches] == [pytest.approx(0.5), pytest.approx(0.95)]
    assert bars.get_title() == "right answers"


def test_bars_are_where_their_objective_is_though_runs_are_missing() -> None:
    compute = {"top": [result("top", 0, 0.7, budget="compute")]}
    bars = draw("star", {"tokens": {"top": RESULTS[1::2], "ntp": RESULTS[::2]}, "compute": compute}, ["ntp", "top"])
    found = {(round(bar.get_x() + 0.2, 6), bar.get_facecolor()[:3], bar.get_alpha()) for bar in bars.axes[2].patches}
    ntp, top = (to_rgb(f"C{number}") for number in (0, 1))
    assert found == {(0, ntp, 1), (1, top, 1), (1.4, top, 0.5)}
    assert [label.get_text() for label in bars.axes[2].get_xticklabels()] == ["ntp", "top"]
    (alone,) = draw("star", {"compute": compute}, ["ntp", "top"]).axes[2].patches
    assert alone.get_alpha() == 0.5 and alone.get_facecolor()[:3] == top


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30, 31, 60, 200])
def test_intervals_are_students(freedom: int) -> None:
    """The density between both ends, integrated."""
    end, steps = student(freedom), 20000
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    width = 2 * end / steps
    places = (-end + (i + 0.5) * width for i in range(steps))
    assert sum(constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in places) * width == pytest.approx(
        0.95, abs=2e-4
    )
    assert Estimate.of([1.0]).half is None


def test_the_table_is_there_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write(tmp_path / "lab", RESULTS[:2])
    assert main(["lab", "report", str(folder)]) == 2
    assert "flame-ext lab report draws with matplotlib: pip install 'flame_ext[plot]'" in capsys.readouterr().err
    assert {file.name for file in (folder / "report").iterdir()} == {"report.md", "report.json"}


def test_a_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert (
        main(["lab", "report", str(tmp_path)]) == 2
        and "name the folder of a flame-ext lab run" in capsys.readouterr().err
    )
    write(tmp_path / "lab", [], absent=2)
    assert (
        main(["lab", "report", str(tmp_path / "lab")]) == 2 and "none of 2 runs is done yet" in capsys.readouterr().err
    )
