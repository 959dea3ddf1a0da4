"""Records at W&B, by the variables that it reads when torchtitan starts it, and at trackio, by trackio itself."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flame_ext.config.sections import Metrics
from flame_ext.run.trackers import prepare_wandb, with_trackio
from tests.preflight.refusals import refusal
from tests.ranks import run_ranks, train
from tests.run.test_metrics import Logged, processor

VARIABLES = (
    *("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM"),
    *("WANDB_PROJECT", "WANDB_RUN_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS"),
)


def started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int = 0, metrics: Metrics | None = None, **given: str
) -> dict[str, str]:
    """The variables after a start in which some are given."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set is taken back after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prepare_wandb(folder, rank, metrics or Metrics())
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_a_run_that_is_started_again_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = started(tmp_path / "run", monkeypatch)
    assert len(first["WANDB_RUN_ID"]) == 8 and first["WANDB_RESUME"] == "allow"
    assert started(tmp_path / "run", monkeypatch) == first
    assert started(tmp_path / "other", monkeypatch) != first
    assert started(tmp_path / "run", monkeypatch, rank=1) != first


def test_what_the_user_says_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WANDB_RUN_ID": "mine", "WANDB_RESUME": "must"}
    assert started(tmp_path, monkeypatch, **given) == given
    assert started(tmp_path, monkeypatch, WANDB_FORK_FROM="a?_step=3") == {"WANDB_FORK_FROM": "a?_step=3"}
    assert list(tmp_path.iterdir()) == []


def test_what_the_configuration_names_is_named_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(project="p", run_name="n", run_group="g", run_tags=["a", "b"])
    found = started(tmp_path, monkeypatch, metrics=metrics, WANDB_PROJECT="mine")
    named = {name: found[name] for name in VARIABLES[4:]}
    assert named == {"WANDB_PROJECT": "mine", "WANDB_RUN_NAME": "n", "WANDB_RUN_GROUP": "g", "WANDB_TAGS": "a,b"}


def recorded(project: str) -> dict[str, Any]:
    """Name of each run of a project to its configuration and its figures, as trackio has them."""
    from trackio.sqlite_storage import SQLiteStorage as Storage

    runs = [run["name"] if isinstance(run, dict) else run for run in Storage.get_runs(project)]
    return {run: (Storage.get_run_config(project, run), Storage.get_logs(project, run)) for run in runs}


def test_trackio_records_a_run_and_goes_on_with_it(tmp_path: Path, dump_folder: Path) -> None:
    """Two starts of one run, and a run of the same name in another folder, in trackio's own files."""
    pytest.importorskip("trackio")
    env = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    options = [
        "--metrics.enable_trackio",
        "--metrics.project=test",
        "--metrics.run_name=one",
        "--metrics.run_group=sweep",
    ]
    options += [
        "--metrics.run_tags=a,b",
        "--training.seq_len=32",
        "--training.local_batch_size=2",
        "--seed.verify=none",
    ]
    options += ["--checkpoint.no-last_save_in_hf", "--checkpoint.allow_config_change=training.steps"]
    options += ["--lr_scheduler.total_steps=60"]
    train(dump_folder, *options, "--training.steps=1", env=env)
    run = train(dump_folder, *options, "--training.steps=2", env=env)
    train(tmp_path / "other", *options, "--training.steps=1", env=env)
    (reading,) = run_ranks(recorded, 1, "test", folder=tmp_path / "reading", env=env)
    (name,) = [f"one-{(dump_folder / 'trackio_run_id').read_text().strip()}"]
    assert len(reading.value) == 2 and all(run.startswith("one-") for run in reading.value)
    config, logs = reading.value[name]
    assert [line["step"] for line in logs] == [1, 2]
    assert [line["loss_ce"] for line in logs] == pytest.approx(run.values("loss_ce"))
    assert {"grad_norm", "throughput(tps)", "loss_future"} <= set(logs[0])
    assert (config["tags"], config["_Group"]) == (["a", "b"], "sweep")
    assert config["future_encoder"]["future_k"] == 32 and config["optimizer"]["lr"] == 1e-3


def test_each_logger_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    stub = SimpleNamespace(
        init=lambda **given: calls.append(given) or SimpleNamespace(project=given["project"], name=given["name"]),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "trackio", stub)
    other, config = Logged(), processor(tmp_path, monkeypatch).job_config
    both = with_trackio(other, tmp_path / "run", 0, config, "validation")
    both.log({"loss": 1}, 3)
    assert calls[0]["project"] == "flame_ext" and calls[0]["name"].startswith("run-") and calls[0]["resume"] == "never"
    assert calls[1] == (3, {"validation/loss": 1.0}) and other.values == [(3, {"loss": 1})]
    both._loggers[1].close()
    assert calls[-1] == "finished"
    with_trackio(other, tmp_path / "run", 0, config, None)
    assert calls[-1]["resume"] == "allow" and calls[-1]["name"] == calls[0]["name"]


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**_given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    other, config = Logged(), processor(tmp_path, monkeypatch).job_config
    with caplog.at_level(logging.ERROR):
        with_trackio(other, tmp_path, 0, config, None).log({"loss": 1}, 1)
    assert other.values == [(1, {"loss": 1})]
    assert "Failed to create the trackio logger" in caplog.text and "No space left on device" in caplog.text


@pytest.mark.parametrize("package", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr("flame_ext.preflight.options.find_spec", lambda _name: None)
    assert f"pip install 'flame_ext[{package}]'" in refusal(f"--metrics.enable_{package}")


def test_names_without_a_tracker_are_refused() -> None:
    assert "metrics.run_group = 'g' has no effect without metrics.enable_trackio" in refusal("--metrics.run_group=g")
