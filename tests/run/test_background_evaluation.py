"""From ``[evaluation]`` to lines in ``evaluations.jsonl`` and figures in TensorBoard, while a run goes on."""

from __future__ import annotations

import json
import multiprocessing as mp
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flame_ext.checkpoint.run_hooks import RunHooks
from flame_ext.config.sections import FlameJobConfig
from flame_ext.run.background_evaluation import background_evaluation
from flame_ext.tools.evaluate import add_parser
from tests.harness_tasks import CHOICE, TEXT, naive_figures, write_tasks
from tests.ranks import train
from tests.run.test_evaluations import tensorboard

FAST = (
    "--training.seq_len=32", "--training.local_batch_size=2", "--seed.verify=none", "--training.steps=4",
    "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0", "--checkpoint.export_dtype=float32", "--export.interval=1",
)  # fmt: skip


def job(**options: Any) -> FlameJobConfig:
    config = FlameJobConfig()
    config.job.dump_folder, config.evaluation.tasks = "runs/one", ["hellaswag", "own/"]
    for name, value in options.items():
        setattr(config.evaluation, name, value)
    return config


def parsed(config: FlameJobConfig) -> Any:
    """The options of the command that follows an export, as it reads them."""
    import argparse

    (follower,) = background_evaluation(config)
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(follower.command(4, Path("runs/one/hf/step-4")))


def test_options_are_those_of_the_job() -> None:
    assert background_evaluation(FlameJobConfig()) == []
    plain = parsed(job())
    assert (plain.path, plain.output) == (Path("runs/one/hf/step-4"), Path("runs/one/evaluations.jsonl"))
    assert (plain.tasks, plain.batch_size, plain.num_fewshot, plain.limit) == (["hellaswag", "own/"], 8, None, None)
    assert not plain.apply_chat_template and not plain.trust_remote_code and plain.module is None
    config = job(
        num_fewshot=0, limit=0.5, batch_size=2, include_path=["a", "b"], apply_chat_template=True, dtype="float32"
    )
    config.seed.trust_remote_code, config.experimental.custom_import = True, "my_model"
    full = parsed(config)
    assert (full.num_fewshot, full.limit, full.batch_size, full.include_path) == (0, 0.5, 2, ["a", "b"])
    assert full.apply_chat_template and full.trust_remote_code and full.dtype == "float32" and full.module == "my_model"


@pytest.mark.parametrize(("interval", "expected"), [(4, [4, 8, 10]), (0, [10])])
def test_exports_of_the_interval_and_the_last_one_are_due(interval: int, expected: list[int]) -> None:
    (follower,) = background_evaluation(job(interval=interval))
    assert [step for step in (2, 4, 6, 8, 10) if follower.due(step, step == 10)] == expected


def test_what_changes_figures_has_exports_evaluated_anew() -> None:
    def target(**options: Any) -> str:
        return background_evaluation(job(**options))[0].target

    assert target() == target(interval=8, batch_size=1, device="cuda:1")
    assert len({target(), target(limit=10.0), target(num_fewshot=1), target(tasks=["arc_easy"])}) == 4


def test_a_device_is_seen_by_the_process_alone_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert "CUDA_VISIBLE_DEVICES" not in background_evaluation(job())[0].environment
    assert background_evaluation(job(device="cuda:1"))[0].environment["CUDA_VISIBLE_DEVICES"] == "2,3"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("finishing", "now", "last"), [(False, 4, 6), (False, 6, 6), (True, 4, 4)])
def test_the_last_steps_export_is_known_where_ranks_export_none(finishing: bool, now: int, last: int) -> None:
    config, started = FlameJobConfig(), []
    config.training.steps = 6
    hooks: Any = SimpleNamespace(
        _config=config,
        _trainer=SimpleNamespace(step=now, finishing=finishing),
        followers=SimpleNamespace(start=lambda export, is_last: started.append((export.name, is_last))),
    )
    for step in (2, 4, 6):
        RunHooks._follow(hooks, Path(f"hf/step-{step}"))
    assert started == [(f"step-{step}", step == last) for step in (2, 4, 6)]


@pytest.mark.matrix
def test_a_run_evaluates_its_exports_beside_training(tmp_path: Path, dump_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path / "own")
    options = (*FAST, f"--evaluation.tasks={tasks}", "--evaluation.interval=2", "--metrics.enable-tensorboard")
    options += (
        "--training.steps=3",
        "--checkpoint.no-last_save_in_hf",
    )  # the last export, too, is made in the background
    run = train(dump_folder, *options, world_size=2, timeout=300)
    assert [line["step"] for line in lines(dump_folder)] == [2, 3]
    (board,) = (dump_folder / "tb").iterdir()
    for line in lines(dump_folder):
        expected = naive_figures(dump_folder / "hf" / f"step-{line['step']}")
        assert {name: value for name, value in line.items() if "/" in name} == pytest.approx(expected, rel=1e-4)
        assert line["export"]["files_sha256"] and line["tasks"] == [str(tasks)]
        for name, value in expected.items():
            assert tensorboard(board, f"evaluation/{name}")[line["step"]] == pytest.approx(value, rel=1e-4)
    perplexities = [line[f"{TEXT}/word_perplexity"] for line in lines(dump_folder)]
    assert perplexities[0] != perplexities[1], "each of its own step"
    assert set(tensorboard(board, f"evaluation/{CHOICE}/acc")) == {2, 3}
    assert f"evaluation of step-2: {CHOICE}/acc " in run.ranks[0].output
    again = train(dump_folder, *options, "--training.local_batch_size=4", timeout=300)  # on one rank
    assert "Already complete" in again.ranks[0].output and "evaluation of step-2: " not in again.ranks[0].output


@pytest.mark.matrix
def test_what_a_killed_run_has_not_evaluated_the_next_one_does(tmp_path: Path, dump_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    options = (
        *FAST,
        f"--evaluation.tasks={write_tasks(tmp_path / 'own')}",
        "--evaluation.interval=2",
        "--metrics.enable-tensorboard",
    )

    def kill(processes: list[mp.Process]) -> None:
        deadline = time.monotonic() + 100
        while not (dump_folder / "hf" / "step-4" / "export.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        processes[0].kill()

    killed = train(dump_folder, *options, watch=kill, check=False, timeout=300)
    assert killed.exit_codes == [-9] and not (dump_folder / "evaluations.jsonl").exists()
    train(dump_folder, *options, timeout=300)
    assert [line["step"] for line in lines(dump_folder)] == [2, 4]
    boards = [tensorboard(folder, f"evaluation/{CHOICE}/acc") for folder in (dump_folder / "tb").iterdir()]
    assert {step for board in boards for step in board} == {2, 4}


@pytest.mark.matrix
def test_an_evaluation_that_fails_is_said_and_the_run_ends_well(tmp_path: Path, dump_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path / "own")
    (tasks / f"{CHOICE}.jsonl").unlink()
    run = train(dump_folder, *FAST, f"--evaluation.tasks={tasks / f'{CHOICE}.yaml'}", timeout=300)
    assert run.exit_codes == [0] and run.metrics[-1]["step"] == 4
    reason = "lm-eval cannot evaluate .*: FileNotFoundError: .*own_choice.jsonl"
    said = f"The evaluation of step-4 failed: {reason}.*next start"
    assert re.search(said, run.ranks[0].output)
    assert not (dump_folder / "evaluations.jsonl").exists()


@pytest.mark.matrix
def test_a_name_that_lm_eval_does_not_know_ends_all_ranks_before_the_first_step(dump_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    run = train(dump_folder, *FAST, "--evaluation.tasks=hellaswagg", world_size=2, check=False)
    assert run.exit_codes == [1, 1]
    for rank in run.ranks:
        assert "evaluation.tasks: lm-eval has no task 'hellaswagg'; did you mean" in rank.output
    assert not (dump_folder / "metrics.jsonl").exists()
