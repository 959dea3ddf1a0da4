"""Plans: what they say of each run, and what is refused in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from flame_ext.lab.plan import Run, as_toml, merged, read_plan
from flame_ext.tools.main import main
from tests.documents import blocks
from tests.ranks import REPOSITORY

TINY = REPOSITORY / "configs" / "lab" / "tiny.toml"


def test_runs_of_a_seed_differ_in_the_objective_alone(tmp_path: Path) -> None:
    plan = read_plan(TINY)
    runs = list(plan.runs())
    assert [(r.task, r.objective, r.seed) for r in runs] == [
        (t, o, 0) for t in ("star", "siblings") for o in ("ntp", "mtp")
    ]
    ntp, mtp = (plan.job(run, tmp_path) for run in runs[:2])
    assert ntp["checkpoint"]["initial_load_path"] == str(tmp_path / "models" / "star" / "seed-0")
    assert mtp.pop("mtp") == {"enable": True, "loss_weight": 0.3} and ntp["model"].pop("converters") == []
    assert mtp["model"].pop("converters") == ["future_prediction"]
    assert ntp.pop("job") != mtp.pop("job") and ntp == mtp
    other = plan.job(Run("star", "ntp", 7, "tokens"), tmp_path)
    assert {other[section]["rng_seed"] for section in ("seed", "data")} == {other["debug"]["seed"]} == {7}
    assert other["training"]["seq_len"] == plan.tasks["star"].length - 1


def test_options_of_an_objective_are_above_those_of_its_task_and_of_all(tmp_path: Path) -> None:
    text = TINY.read_text().replace(
        'kind = "siblings"', 'kind = "siblings"\ntrainer.training.steps = 7\ntrainer.optimizer.lr = 1.0'
    )
    (tmp_path / "plan.toml").write_text(text.replace("[objectives.ntp]", "[objectives.ntp]\noptimizer.lr = 2.0"))
    plan = read_plan(tmp_path / "plan.toml")
    values = {run: plan.job(run, tmp_path) for run in plan.runs()}
    assert [(job["training"]["steps"], job["optimizer"]["lr"]) for job in values.values()] == [
        *((40, 2.0), (40, 3e-3), (7, 2.0), (7, 1.0))
    ]
    assert plan.section.name == "plan"


def test_plans_that_are_shown_are_plans(tmp_path: Path) -> None:
    (shown,) = (block for block in blocks(REPOSITORY / "docs" / "lab.md") if block.file == "plan.toml")
    (tmp_path / "plan.toml").write_text(shown.text)
    assert len(list(read_plan(tmp_path / "plan.toml").runs())) == 2 * 2 * 5
    assert all(list(read_plan(file).runs()) for file in TINY.parent.glob("*.toml"))


def test_a_task_is_learned_as_a_whole_unless_it_says_that_its_answers_are(tmp_path: Path) -> None:
    text = TINY.read_text().replace('kind = "siblings"', 'kind = "siblings"\nlearn = "answer"')
    (tmp_path / "plan.toml").write_text(text)
    plan = read_plan(tmp_path / "plan.toml")
    for run in plan.runs():
        job, rows = plan.job(run, tmp_path), tmp_path / "tasks" / run.task
        ending = "" if run.task == "siblings" else ".npy"
        assert job["data"]["sources"] == [{"path": f"{rows / 'train'}{ending}", "label": "train"}]
        assert job["validation"]["sources"] == [{"path": f"{rows / 'test'}{ending}", "label": "test"}]


def test_a_reverse_model_is_trained_as_the_runs_that_predict_its_states(tmp_path: Path) -> None:
    objective = """[objectives.reverse]
future_encoder.enable = true
future_encoder.summary_method = "reverse_lm"
future_predictor.enable = true
"""
    text = TINY.read_text().replace('kind = "siblings"', 'kind = "siblings"\nlearn = "answer"')
    given = objective.replace("[objectives.reverse]", "[objectives.given]") + 'future_encoder.reverse_model = "there"\n'
    (tmp_path / "plan.toml").write_text(text + objective + given)
    plan = read_plan(tmp_path / "plan.toml")
    ntp, reverse, named = (Run("siblings", objective, 0, "tokens") for objective in ("ntp", "reverse", "given"))
    assert plan.reverse(ntp, 40) is None and plan.reverse(named, 40) is None
    assert plan.job(named, tmp_path)["future_encoder"]["reverse_model"] == "there"
    for steps in (None, 7):  # the plan's, and those of equal compute
        needed = plan.reverse(reverse, steps or 40)
        assert needed is not None and needed.model == reverse.model
        trained, plain = plan.reverse_job(needed, tmp_path), plan.job(ntp, tmp_path, steps)
        using = plan.job(reverse, tmp_path, steps)["future_encoder"]["reverse_model"]
        assert Path(using) == Path(trained["job"]["dump_folder"], "hf", f"step-{steps or 40}")
        assert trained["data"].pop("reverse") is True
        rows = [table[name].pop("sources")[0]["path"] for table in (trained, plain) for name in ("data", "validation")]
        assert [Path(path).name for path in rows] == ["train.npy", "test.npy", "train", "test"], (
            "whole rows, and answers"
        )
        assert trained.pop("job") != plain.pop("job") and trained == plain


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0]", "seeds = [0, 0]", "plan.seeds: expected different integers"),
        ("seeds = [0]", "sedes = [0]", "unknown key 'plan.sedes' (did you mean 'plan.seeds'?)"),
        ("[model]", "[modle]", "unknown key 'modle'"),
        ("hidden_size = 32", "hiden_size = 32", "unknown key 'model.hiden_size'"),
        ('"llama"', '"lama"', "model.model_type must be a type of transformers"),
        ('kind = "path_star"', 'kind = "path"', "tasks.star.kind must be one of path_star, siblings"),
        ("degree = 2", 'learn = "answers"', "tasks.star.learn must be 'row' or 'answer', got 'answers'"),
        (
            'kind = "siblings"\nparents = 4\nchildren = 10',
            'kind = "text"\nlearn = "answer"',
            "tasks.siblings.learn = 'answer': a row of text has no prompt",
        ),
        ("degree = 2", "degrees = 2", "unknown key 'tasks.star.degrees'"),
        ("degree = 2", 'degree = "2"', "'tasks.star.degree' must be an integer"),
        ("nodes = 12", "nodes = 3", "nodes must be >= 5"),
        ("training.steps = 40", "training.step = 40", "trainer: unknown key 'training.step'"),
        ("mtp.enable = true", "mtp.enabled = true", "objectives.mtp: unknown key 'mtp.enabled'"),
        (
            "mtp.enable = true",
            "mtp.enable = true\ntraining.seq_len = 4",
            "objectives.mtp.training.seq_len: the lab sets it itself",
        ),
        ("mtp.enable = true", "training.steps = 4", "objectives.mtp.training.steps: all objectives of a task share it"),
        ("mtp.enable = true", "training.global_batch_size = 4", "objectives.mtp.training.global_batch_size: all"),
        ("mtp.enable = true", "validation.freq = 4", "objectives.mtp.validation.freq: all"),
        (
            "training.steps = 40",
            "training.steps = 40\nvalidation.freq = 7",
            "tasks.star: validation.freq = 7 does not divide training.steps = 40",
        ),
        ("[objectives.ntp]", '[objectives."a/b"]', "'a/b' cannot name a folder"),
        ("[plan]", "[plan", "not valid TOML"),
        ("generations = 100", "temperature = 0.0", "plan.temperature > 0"),
    ],
)
def test_what_can_not_be_right_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, old: str, new: str, message: str
) -> None:
    assert old in TINY.read_text()
    (tmp_path / "plan.toml").write_text(TINY.read_text().replace(old, new, 1))
    assert main(["lab", "run", str(tmp_path / "plan.toml"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"error: {tmp_path / 'plan.toml'}: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("steps", "freq"), [(8, 1), (40, 4), (2500, 250), (646, 38), (1999, 1999)])
def test_the_last_validation_is_at_the_last_step(tmp_path: Path, steps: int, freq: int) -> None:
    plan = read_plan(TINY)
    run = next(run for run in plan.runs() if run.task == "star")
    assert plan.job(run, tmp_path, steps)["validation"]["freq"] == freq and steps % freq == 0


def test_tables_are_written_as_toml() -> None:
    tables: dict[str, Any] = {
        "a": {"x": 1, "y": 1e-3, "z": True, "words": ["ä", '"'], "none": [], "deep": {"b": {"c": "\\n"}}},
        "data": {"sources": [{"path": "p", "weight": 1.0}, {"path": "q"}], "rng_seed": 0},
    }
    assert tomllib.loads(as_toml(tables)) == tables
    assert merged(tables, {"a": {"x": 2, "deep": {"d": 1}}})["a"]["deep"] == {"b": {"c": "\\n"}, "d": 1}
    assert tables["a"]["x"] == 1
