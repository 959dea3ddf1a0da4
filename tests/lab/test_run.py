"""A plan from its beginning to its tables; killed on the way, it gives the same."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flame_ext.errors import ConfigError, UserError
from flame_ext.lab.data import is_written, write_task
from flame_ext.lab.job import RESULT, run
from flame_ext.lab.origin import digest_of_rows
from flame_ext.lab.plan import Run, read_plan
from flame_ext.lab.report import markdown, summary
from flame_ext.lab.results import gather, operations
from flame_ext.lab.run import _digest, _steps_of_equal_compute, prepare
from flame_ext.lab.tasks import KINDS
from flame_ext.preflight.parse import parse
from flame_ext.tools.main import main
from tests.ranks import REPOSITORY

TINY = REPOSITORY / "configs" / "lab" / "tiny.toml"


def start(plan: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flame_ext.tools.main", "lab", "run", str(plan), f"--output={output}", *options]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def wait_for(file: Path, text: str = "") -> None:
    deadline = time.monotonic() + 300
    while not (file.is_file() and text in file.read_text()):
        assert time.monotonic() < deadline, f"no {text!r} in {file}"
        time.sleep(0.05)


def table(output: Path) -> str:
    about, tasks = gather(output)
    return markdown(about, summary(tasks))


@pytest.mark.matrix
def test_a_killed_plan_goes_on_where_it_was_and_gives_the_same_table(tmp_path: Path) -> None:
    plan = (
        tmp_path / "tiny.toml"
    )  # ten times as long: a run has to be going on when it is stopped, and its steps take 10 ms
    plan.write_text(TINY.read_text().replace("training.steps = 40\n", "training.steps = 400\n"))
    begin = time.monotonic()
    assert "done: flame-ext lab report" in finished(start(plan, tmp_path / "whole"))
    assert time.monotonic() - begin < 180, "two objectives, one seed, two tasks: three minutes on two cores"
    expected = table(tmp_path / "whole").replace("whole", "killed")

    killed = tmp_path / "killed"
    first, second = (killed / "runs" / "star" / name / "tokens-seed-0" for name in ("ntp", "mtp"))
    process = start(plan, killed, "--jobs=1")
    wait_for(first / RESULT)
    wait_for(second / "checkpoint" / "step-100" / "manifest.json")
    process.kill()  # the run that it has started notices, and saves
    process.wait()
    done, when = (first / RESULT).read_bytes(), (first / RESULT).stat().st_mtime_ns

    process = start(plan, killed, "--jobs=1")
    wait_for(second / "log.txt", "Resuming")
    process.send_signal(signal.SIGTERM)
    assert "stopped; the same command goes on" in process.communicate(timeout=120)[0] and process.returncode == 75

    finished(start(plan, killed, "--jobs=1"))
    assert (first / RESULT).read_bytes() == done and (first / RESULT).stat().st_mtime_ns == when
    assert "step:  1" not in (second / "log.txt").read_text().partition("Resuming")[2], "it begins where it was"
    assert table(killed) == expected
    again = finished(start(plan, killed))
    assert "4 runs, 4 done" in again and "runs/" not in again.partition("done")[2].replace(str(killed), "")


@pytest.mark.matrix
def test_every_task_runs_with_a_teacher(tmp_path: Path) -> None:
    head, _, _ = TINY.read_text().partition("[tasks.star]")
    small = {"siblings": "train = 100", "triangles": "train = 100", "text": "piece = 32\ntrain = 200"}
    tasks = [f'[tasks.{k}]\nkind = "{k}"\ntest = 40\n{small.get(k, "train = 200")}\n' for k in KINDS]
    future = "[objectives.future]\nfuture_encoder.enable = true\nfuture_predictor.enable = true\n"
    (tmp_path / "plan.toml").write_text(head.replace("steps = 40", "steps = 4") + "".join(tasks) + future)
    assert main(["lab", "run", str(tmp_path / "plan.toml"), "--output", str(tmp_path / "out")]) == 0
    _, found = gather(tmp_path / "out")
    assert set(found) == set(KINDS)
    (of_text,) = found["text"]["tokens"]["future"]
    # The evaluation and the trainer's validation read the same rows, each in its own way.
    assert of_text["figures"]["loss_answer"] == pytest.approx(of_text["held_out"][-1]["loss"], rel=1e-5)


REVERSE = """[objectives.reverse]
future_encoder.enable = true
future_encoder.summary_method = "reverse_lm"
future_predictor.enable = true
"""


@pytest.mark.matrix
def test_a_reverse_model_is_trained_first_and_results_alone_are_enough_to_go_on(tmp_path: Path) -> None:
    head, _, _ = TINY.read_text().partition("[tasks.star]")
    task = '[tasks.sum]\nkind = "global_constraint"\nlearn = "answer"\nearly = 4\ntrain = 300\ntest = 40\n'
    text = head.replace("steps = 40", "steps = 8").replace("[plan]", "[plan]\nequal_compute = true")
    (tmp_path / "plan.toml").write_text(text + task + REVERSE + "[objectives.ntp]\n")
    command = ["lab", "run", str(tmp_path / "plan.toml"), "--jobs=2", "--output"]
    whole = tmp_path / "whole"
    assert main([*command, str(whole)]) == 0
    results = {file.relative_to(whole): json.loads(file.read_text()) for file in whole.rglob(RESULT)}
    assert len(results) == 4 + 2, "runs of two objectives and budgets, and a reverse model for each budget"
    trained = {result["run"]["steps"] for path, result in results.items() if path.parts[0] == "reverse"}
    using = [result for result in results.values() if result["run"].get("objective") == "reverse"]
    assert trained == {result["steps"] for result in using} and len(trained) == 2
    spent = {(r["run"]["objective"], r["run"]["budget"]): operations(r) for r in results.values() if r["figures"]}
    assert spent["reverse", "compute"] < spent["reverse", "tokens"] / 2, "its training is counted"
    assert table(whole).count("steps: 1 of 1 trained, held-out loss of the row ") == 2, (
        "a line for each number of steps"
    )
    (ntp,) = (r for r in results.values() if r["run"].get("objective") == "ntp" and r["run"]["budget"] == "tokens")
    # The trainer's validation and the evaluation both look at the answer alone.
    assert ntp["held_out"][-1]["loss"] == pytest.approx(ntp["figures"]["loss_answer"], rel=1e-5)

    copied = tmp_path / "copied"  # results alone, but that of the run of the objective at equal tokens
    missing = Path("runs", "sum", "reverse", "tokens-seed-0", RESULT)
    for path in results.keys() - {missing}:
        (copied / path).parent.mkdir(parents=True)
        shutil.copy(whole / path, copied / path)
    assert main([*command, str(copied)]) == 0
    again = json.loads((copied / missing).read_text())
    assert again == json.loads((whole / missing).read_text()), "the same tasks, weights and reverse model"
    assert len([*copied.rglob("log.txt")]) == 2, "that run and its reverse model"


def test_runs_wait_for_their_reverse_model(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def start(folder: Path, _environment: dict[str, str]) -> subprocess.Popen[bytes]:
        begun.append(folder.relative_to(tmp_path / "out").as_posix())
        if folder.parts[-3] == "reverse" and "siblings" in folder.parts:
            return subprocess.Popen(["sh", "-c", f"sleep 1; echo what is wrong > {folder}/log.txt; exit 3"])
        result = {"figures": {"exact": 0.5}, "held_out": [{"loss": 1.0}]}
        return subprocess.Popen(["sh", "-c", f"sleep 0.5; echo '{json.dumps(result)}' > {folder}/result.json"])

    monkeypatch.setattr("flame_ext.lab.run._start", start)
    (tmp_path / "plan.toml").write_text(TINY.read_text() + REVERSE)
    command = ["lab", "run", str(tmp_path / "plan.toml"), "--output", str(tmp_path / "out"), "--jobs=3"]
    assert main(command) == 2
    found, name = capfd.readouterr(), "tokens-seed-0"
    assert "6 runs, 0 done; 2 reverse models to train for them" in found.out
    assert begun == [
        *(f"runs/star/ntp/{name}", f"runs/star/mtp/{name}", "reverse/star/40-steps-seed-0"),
        *begun[3:],
    ]
    assert begun.index(f"runs/star/reverse/{name}") > 3 and f"runs/siblings/reverse/{name}" not in begun
    assert "reverse/siblings/40-steps-seed-0: 1 runs wait for it and are not begun" in found.out
    assert "1 of 8 runs failed, the first with: what is wrong (" in found.err


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "out"
    plan = read_plan(TINY)
    prepare(plan, list(plan.runs()), folder)
    return folder


def test_objectives_start_from_the_same_weights_and_another_seed_from_others(prepared: Path) -> None:
    import torch
    from safetensors.torch import load_file

    said = [json.loads(file.read_text()) for file in sorted(prepared.glob("runs/star/*/*/run.json"))]
    assert len(said) == 2 and said[0]["operations_per_token"]["total"] > said[1]["operations_per_token"]["total"]
    jobs = [file.read_text() for file in sorted(prepared.glob("runs/star/*/*/job.toml"))]
    assert all(f'initial_load_path = "{prepared}/models/star/seed-0"' in job for job in jobs)
    plan = read_plan(TINY)
    prepare(plan, [Run("star", "ntp", 1, "tokens")], prepared)
    one, other = (load_file(prepared / "models" / "star" / f"seed-{n}" / "model.safetensors") for n in (0, 1))
    assert one.keys() == other.keys()
    key = next(key for key in one if key.endswith("q_proj.weight"))
    assert not torch.equal(one[key], other[key])


def test_initial_weights_that_are_lost_are_made_again(prepared: Path) -> None:
    plan, file = read_plan(TINY), prepared / "models" / "star" / "seed-0" / "model.safetensors"
    before = file.read_bytes()
    file.unlink()
    prepare(plan, list(plan.runs()), prepared)
    assert file.read_bytes() == before


def test_equal_compute_is_that_of_the_cheapest_objective() -> None:
    from types import SimpleNamespace as Names

    def facts(total: float, steps: int) -> tuple[Any, Any]:
        training = Names(steps=steps, global_batch_size=-1, local_batch_size=4, seq_len=8)
        return Names(training=training), Names(total=total)

    of = {"ntp": facts(10.0, 100), "top": facts(25.0, 100)}
    assert _steps_of_equal_compute(Run("t", "ntp", 0, "compute"), of) == 100
    assert _steps_of_equal_compute(Run("t", "top", 0, "compute"), of) == 40


def test_configurations_of_equal_compute_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(arguments: list[str]) -> Any:
        config = parse(arguments)
        if config.training.steps < 40:
            raise ConfigError("too few steps")
        return config

    monkeypatch.setattr("flame_ext.lab.run.parse", parsed)
    text, _, _ = TINY.read_text().partition("[tasks.siblings]")
    objectives = "[objectives.ntp]\n[objectives.mtp]\nmtp.enable = true\n"
    (tmp_path / "tiny.toml").write_text(text.replace("[plan]", "[plan]\nequal_compute = true") + objectives)
    plan = read_plan(tmp_path / "tiny.toml")
    with pytest.raises(ConfigError, match="too few steps"):
        prepare(plan, list(plan.runs()), tmp_path / "out")
    assert not (tmp_path / "out" / "plan.json").exists()


def test_another_plan_in_the_folder_is_refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "out"
    shutil.copytree(prepared, folder)
    for file in folder.glob("runs/*/*/*/job.toml"):
        file.write_text(file.read_text().replace(str(prepared), str(folder)).replace("lr = 0.003", "lr = 0.03"))
    assert main(["lab", "run", str(TINY), "--output", str(folder)]) == 2
    assert "was begun with 'lr = 0.03', and the plan now says 'lr = 0.003'" in capsys.readouterr().err
    assert not (folder / ".lock").exists(), "the folder is free again"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_hidden_layers = 2", "num_hidden_layers = 1", "model.num_hidden_layers = 2, and the plan now says 1:"),
        (
            "num_key_value_heads = 2",
            "num_key_value_heads = 2\nrms_norm_eps = 0.5",
            "model.rms_norm_eps = None, and the plan",
        ),
        ("generations = 100", "generations = 99", "plan.generations = 100, and the plan now says 99:"),
        (
            "generations = 100",
            "generations = 100\ntemperature = 0.5",
            "plan.temperature = 1.0, and the plan now says 0.5:",
        ),
    ],
)
def test_what_no_job_says_is_recorded_too(prepared: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TINY.read_text()
    (tmp_path / "tiny.toml").write_text(TINY.read_text().replace(old, new))
    plan = read_plan(tmp_path / "tiny.toml")
    with pytest.raises(ConfigError, match=message):
        prepare(plan, list(plan.runs()), prepared)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train = 100\n", "train = 99\n", "holds something else"),
        ("hidden_size = 32", "hidden_size = 64", "model.hidden_size = 32"),
        ("loss_weight = 0.3", "loss_weight = 0.4", "was begun with 'loss_weight = 0.3'"),
        ("generations = 100", "generations = 99", "generations = 100"),
    ],
)
def test_a_plan_that_is_refused_leaves_the_folder_as_it_was(
    prepared: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    more = """[tasks.first]\nkind = "path_star"\ntrain = 10\ntest = 5\n\n[tasks.star]"""
    text = (
        TINY.read_text().replace("[tasks.star]", more).replace("[objectives.ntp]", "[objectives.new]\n[objectives.ntp]")
    )
    assert old in text
    (tmp_path / "tiny.toml").write_text(text.replace(old, new))
    before = {file: file.read_bytes() for file in prepared.rglob("*") if file.is_file()}
    plan = read_plan(tmp_path / "tiny.toml")
    with pytest.raises(UserError, match=message):
        prepare(plan, list(plan.runs()), prepared)
    assert {file: file.read_bytes() for file in prepared.rglob("*") if file.is_file()} == before


RUN = Path("runs", "star", "mtp", "tokens-seed-0")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        (
            {"digest": "another"},
            f"{RUN / RESULT} is the result of another plan: digest is 'another', and that of this plan",
        ),
        ({"origin": None}, None),  # of an earlier version
        (
            {"origin": {"rows": "0", "weights": "0"}},
            "is a result of other rows than those that are there now (made with unknown",
        ),
        (
            {"origin": {"weights": "0", "versions": {"torch": "2.0"}}},
            "of other initial weights than those that are there now (made with torch 2.0;",
        ),
        ({"digest": None}, None),
        ({"digest": None, "steps": 39}, "is the result of another plan: steps is 39, and that of this plan 40"),
        (
            {"digest": None, "operations_per_token": {"total": 1.0}},
            "of another plan: operations_per_token is {'total': 1.0}",
        ),
    ],
)
def test_results_of_another_plan_are_refused(
    prepared: Path, tmp_path: Path, changed: dict[str, Any], message: str | None
) -> None:
    said = json.loads((prepared / RUN / "run.json").read_text()) | {"figures": {}, "held_out": []} | changed
    shutil.copytree(prepared / "tasks", tmp_path / "tasks")
    shutil.copytree(prepared / "models", tmp_path / "models")
    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / RESULT).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    plan = read_plan(TINY)
    runs = [run for run in plan.runs() if run.folder == RUN]
    if message is None:
        prepare(plan, runs, tmp_path)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(plan, runs, tmp_path)


def test_the_digest_says_data_model_and_options_and_not_where(prepared: Path, tmp_path: Path) -> None:
    text, found = TINY.read_text(), []
    for old, new in (
        ("", ""),
        ("lr = 3e-3", "lr = 3e-2"),
        ("hidden_size = 32", "hidden_size = 64"),
        ("train = 100\n", "train = 99\n"),
    ):
        assert old in text
        (tmp_path / "tiny.toml").write_text(text.replace(old, new) if old else text)
        plan = read_plan(tmp_path / "tiny.toml")
        run = next(run for run in plan.runs() if run.task == "siblings")
        found.append(_digest(plan, run))
    assert len(set(found)) == 4
    assert json.loads((prepared / run.folder / "run.json").read_text())["digest"] == found[0]


def test_the_task_is_found_though_runs_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere" / "deep" / "star" / "ntp" / "seed").mkdir(parents=True)
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "runs").symlink_to(tmp_path / "elsewhere" / "deep")
    folder, asked = tmp_path / "plan" / "runs" / "star" / "ntp" / "seed", []
    said = {"run": {"objective": "ntp", "seed": 0}, "task_folder": "../../../../tasks/star", "steps": 1}
    (folder / "run.json").write_text(json.dumps(said | {"generations": 1, "temperature": 1.0}))
    monkeypatch.setattr("flame_ext.train.main", lambda _arguments: None)
    monkeypatch.setattr("flame_ext.lab.evaluate.evaluate", lambda _export, task, *_: asked.append(task) or {})
    monkeypatch.setattr("flame_ext.lab.job.held_out", lambda *_: [])
    run(folder)
    assert asked == [tmp_path / "plan" / "tasks" / "star"]


@pytest.mark.parametrize("lost", ["test", "train.npy"])
def test_a_task_that_lacks_one_form_of_its_rows_is_completed(tmp_path: Path, lost: str) -> None:
    task = KINDS["path_star"](train=10, test=5)
    write_task(task, tmp_path)
    before = digest_of_rows(tmp_path)
    if (tmp_path / lost).is_dir():
        shutil.rmtree(tmp_path / lost)
    else:
        (tmp_path / lost).unlink()
    assert not is_written(task, tmp_path)
    write_task(task, tmp_path)
    assert is_written(task, tmp_path) and (tmp_path / "test" / "dataset_info.json").is_file()
    assert digest_of_rows(tmp_path) == before


def test_a_run_that_fails_does_not_keep_the_others_from_running(
    prepared: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        assert int(environment["OMP_NUM_THREADS"]) >= 1
        fails = "echo what is wrong > {0}/log.txt; exit 3"
        done = """echo '{{"figures": {{"exact": 0.5, "accuracy_by_position": [1.0]}}}}' > {0}/result.json"""
        return subprocess.Popen(["sh", "-c", (fails if "/star/mtp/" in str(folder) else done).format(folder)])

    monkeypatch.setattr("flame_ext.lab.run._start", start)
    assert main(["lab", "run", str(TINY), "--output", str(prepared), "--jobs=2"]) == 2
    found = capfd.readouterr()
    assert "1 of 4 runs failed, the first with: what is wrong (" in found.err and found.err.count("\n") == 1
    assert (
        found.out.count("exact 0.5000") == 3
        and "runs/star/mtp/tokens-seed-0: failed with exit code 3, see" in found.out
    )
    assert len([*prepared.glob("runs/*/*/*/result.json")]) == 3
