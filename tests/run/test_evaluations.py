"""``evaluations.jsonl``: its lines, and how they come to the trackers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torchtitan.components.metrics import LoggerContainer, TensorBoardLogger, WandBLogger

from flame_ext.errors import UserError
from flame_ext.run.evaluations import EVALUATIONS_NAME, NewEvaluations, figures_in, read_evaluations, record_evaluation
from flame_ext.run.trackers import log_evaluation
from tests.run.test_metrics import Logged, log, processor

A, B = {"tasks": ["a"], "a/acc": 0.5, "a/acc_stderr": None, "seconds": 2.0}, {"tasks": ["b"], "b/acc": 1.0}


def test_a_line_replaces_that_of_its_model_step_and_tasks(tmp_path: Path) -> None:
    file = tmp_path / EVALUATIONS_NAME
    for line in ({"step": 4, **A}, {"step": 2, **A}, {"step": 4, **B}, {"step": 4, **A, "a/acc": 0.25}):
        record_evaluation(file, line)
    found = read_evaluations(file)
    assert [(line["step"], line["tasks"]) for line in found] == [(2, ["a"]), (4, ["b"]), (4, ["a"])]
    assert found[-1]["a/acc"] == 0.25
    for name in ("base", "other", "base"):  # models by hand, of no run
        record_evaluation(file, {"step": 0, **A, "export": {"path": name, "run": None}})
    record_evaluation(file, {"step": 4, **A, "export": {"path": "moved/hf/step-4", "run": "r"}})
    record_evaluation(file, {"step": 4, **A, "export": {"path": "hf/step-4", "run": "r"}})
    paths = [line["export"]["path"] for line in read_evaluations(file) if "export" in line]
    assert paths == ["other", "base", "hf/step-4"]
    record_evaluation(file, {"step": 4, **A, "export": {"path": "hf/step-4", "run": "begun anew"}})
    runs = [line["export"]["run"] for line in read_evaluations(file) if "export" in line]
    assert runs == [None, None, "begun anew"]
    assert [path.name for path in tmp_path.glob("*.tmp")] == [] and figures_in(found[0]) == {"a/acc": 0.5}


@pytest.mark.parametrize("line", ["{", "[]", '{"tasks": []}', '{"step": "x"}'])
def test_a_line_that_cannot_be_read_is_not_written_over(tmp_path: Path, line: str) -> None:
    file = tmp_path / EVALUATIONS_NAME
    file.write_text(f'{{"step": 2}}\n{line}\n')
    with pytest.raises(UserError, match=r"evaluations.jsonl, line 2: cannot be read"):
        record_evaluation(file, {"step": 4, **A})
    assert file.read_text() == f'{{"step": 2}}\n{line}\n'


def test_lines_are_taken_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / EVALUATIONS_NAME
    record_evaluation(file, {"step": 2, **A})
    new = NewEvaluations(file)
    assert new.take() == []
    record_evaluation(file, {"step": 4, **A})
    assert new.take() == [{"step": 4, **A}] and new.take() == []
    record_evaluation(file, {"step": 2, **A, "a/acc": 0.75})  # its export was replaced
    assert [line["a/acc"] for line in new.take()] == [0.75]
    whole = file.read_text()
    file.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert new.take() == []
    assert "line 1: cannot be read" in caplog.text
    file.write_text(whole)
    record_evaluation(file, {"step": 6, **A})
    assert new.take() == [{"step": 6, **A}], "those before were taken"


def test_trackers_get_an_evaluation_at_each_logged_step_under_its_own_step_and_the_rest_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_evaluation(tmp_path / EVALUATIONS_NAME, {"step": 1, **A})  # of an earlier start
    made = processor(tmp_path, monkeypatch)
    assert made._evaluations is None, "without tasks nothing is looked for"
    monkeypatch.setattr(
        "flame_ext.run.metrics.MetricsProcessor.__init__",
        lambda self, config, *_: vars(self).update(vars(made), job_config=config),
    )
    config = made.job_config
    config.evaluation.tasks = ["a"]
    made = type(made)(config, made.parallel_dims)
    for step in (2, 3, 4):
        record_evaluation(tmp_path / EVALUATIONS_NAME, {"step": step, **A})
    log(made, step=7)
    assert [step for step, _ in made.logger.values] == [7, 2]
    assert made.logger.values[1][1] == {"evaluation/a/acc": 0.5}
    log(made, step=8)
    made.logger.close = lambda: None
    made.close()
    assert [step for step, _ in made.logger.values] == [7, 2, 8, 3, 4]


def test_wandb_gets_the_step_as_an_axis_and_others_as_they_are() -> None:
    calls: list[Any] = []
    wandb = SimpleNamespace(
        define_metric=lambda name, step_metric=None: calls.append((name, step_metric)),
        log=lambda figures, **options: calls.append((figures, options)),
    )
    at_wandb = object.__new__(WandBLogger)
    at_wandb.wandb, at_wandb.tag = wandb, None
    inner, outer, other = LoggerContainer(), LoggerContainer(), Logged()
    inner.add_logger(at_wandb)
    outer.add_logger(inner)
    outer.add_logger(other)
    log_evaluation(outer, {"a/acc": 0.5}, 20, commit=False)
    assert calls == [
        ("evaluation/step", None),
        ("evaluation/*", "evaluation/step"),
        ({"evaluation/a/acc": 0.5, "evaluation/step": 20}, {"commit": False}),
    ]
    assert other.values == [(20, {"evaluation/a/acc": 0.5})]


def test_tensorboard_takes_an_earlier_step(tmp_path: Path) -> None:
    board = TensorBoardLogger(str(tmp_path))
    board.log({"loss": 1.0}, 40)
    log_evaluation(board, {"a/acc": 0.5}, 20, commit=False)
    board.close()
    assert tensorboard(tmp_path, "evaluation/a/acc") == {20: 0.5}


def tensorboard(folder: Path, name: str) -> dict[int, float]:
    """Steps and values of a figure, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in read.Scalars(name)} if name in read.Tags()["scalars"] else {}


def test_lines_are_json(tmp_path: Path) -> None:
    record_evaluation(tmp_path / EVALUATIONS_NAME, {"step": 2, **A})
    assert [json.loads(line)["step"] for line in (tmp_path / EVALUATIONS_NAME).read_text().splitlines()] == [2]
