"""How runs end: by a signal, with the data, by an error on one rank, or because nothing finite comes out any more."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from flame_ext.checkpoint.steps import find_steps
from flame_ext.run.signals import EXIT_PREEMPTED
from tests.ranks import REPOSITORY, TrainRun, train

FAST = (
    "--training.seq_len=32", "--training.local_batch_size=2", "--seed.verify=none", "--lr_scheduler.warmup_steps=0",
    "--checkpoint.keep_latest_k=0",
)  # fmt: skip
WITHOUT_END = (*FAST, "--training.steps=100000", "--checkpoint.interval=100000")


def steps_of(dump_folder: Path) -> list[int]:
    return [step.step for step in find_steps(dump_folder / "checkpoint")[0]]


def metrics_lines(dump_folder: Path) -> list[dict]:
    file = dump_folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_steps(dump_folder: Path, count: int, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while len(metrics_lines(dump_folder)) < count and alive() and time.monotonic() < deadline:
        time.sleep(0.05)


def signalled(dump_folder: Path, rank: int, number: signal.Signals, at: int) -> TrainRun:
    """A run of two ranks, one of which gets a signal after some steps."""

    def send(processes: list[mp.Process]) -> None:
        wait_for_steps(dump_folder, at, processes[0].is_alive)
        os.kill(processes[rank].pid, number)

    return train(dump_folder, *WITHOUT_END, world_size=2, watch=send, check=False)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_from_there(dump_folder: Path) -> None:
    stopped = signalled(dump_folder, rank=1, number=signal.SIGTERM, at=2)
    assert stopped.exit_codes == [EXIT_PREEMPTED] * 2, stopped.ranks[0].output[-3000:]
    (step,) = steps_of(dump_folder)
    assert step == stopped.metrics[-1]["step"] >= 2, "the last step that was run is the one that was saved"
    assert f"Stopped by SIGTERM after step {step}" in stopped.ranks[1].output
    again = signalled(dump_folder, rank=0, number=signal.SIGUSR1, at=step + 1)
    assert again.exit_codes == [EXIT_PREEMPTED] * 2
    assert "Stopped by SIGUSR1" in again.ranks[0].output and f"step-{step}" in again.ranks[0].output
    assert [line["step"] for line in again.metrics] == list(range(1, steps_of(dump_folder)[-1] + 1))
    assert not (dump_folder / "hf").exists(), "only a run that is complete is exported"


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGTERM, 2),
        (signal.SIGINT, 1),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.matrix),
        pytest.param(signal.SIGHUP, 1, marks=pytest.mark.matrix),
    ],
)
def test_a_signal_to_the_launcher_ends_with_the_code_for_requeueing(
    tmp_path: Path, number: signal.Signals, ranks: int
) -> None:
    dump_folder = tmp_path / "run"
    environment = {
        **os.environ,
        "NGPU": str(ranks),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    # A shell cannot trap what was ignored when it began, as SIGINT is in a job in the background and SIGHUP under nohup.
    command = ["env", "--default-signal", "./train.sh", f"--job.dump_folder={dump_folder}"]
    command += ["--metrics.no-enable-tensorboard", *WITHOUT_END]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for_steps(dump_folder, 1, lambda: launcher.poll() is None)
            os.killpg(launcher.pid, number) if number == signal.SIGINT else launcher.send_signal(
                number
            )  # as Ctrl-C does
            assert launcher.wait(timeout=60) == EXIT_PREEMPTED, (tmp_path / "log").read_text()[-3000:]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    assert steps_of(dump_folder) == [metrics_lines(dump_folder)[-1]["step"]]


def test_data_that_end_on_one_rank_end_the_run_on_all_as_its_last_step_does(dump_folder: Path) -> None:
    options = (*FAST, "--training.local_batch_size=1", "--training.global_batch_size=4", "--training.steps=50")
    run = train(dump_folder, *options, "--experimental.custom_import=tests.faults.plugins.data_ends", world_size=2)
    assert steps_of(dump_folder) == [3] and [line["step"] for line in run.metrics] == [1, 2, 3]
    assert (dump_folder / "hf" / "step-3" / "model.safetensors").is_file()
    assert all("The data ended after step 3 of 50" in rank.output for rank in run.ranks)
    assert run.metrics[-1]["tokens_seen"] == 3 * 4 * 32
    again = train(dump_folder, *options, "--experimental.custom_import=tests.faults.plugins.data_ends", world_size=2)
    assert "Already complete: " in again.ranks[0].output and steps_of(dump_folder) == [3]


def test_steps_without_a_finite_gradient_are_skipped_counted_and_never_saved(dump_folder: Path) -> None:
    overflows = "--experimental.custom_import=tests.faults.plugins.loss_overflows"
    options = (*FAST, "--training.steps=9", "--checkpoint.interval=1", "--checkpoint.max_nonfinite_steps=3")
    run = train(dump_folder, *options, overflows, world_size=2, check=False)
    assert run.exit_codes == [1, 1]
    for rank in run.ranks:
        error = rank.output.splitlines()[-1]
        assert error.startswith("error: the gradient norm was not finite on 3 steps in a row, the last one step 6")
    assert "step 4 is not saved: its gradient norm, losses or weights are not finite" in run.ranks[0].output
    assert steps_of(dump_folder) == [1, 2, 3]
    assert run.values("skipped_steps") == [0, 0, 0, 1, 2, 3] and run.values("loss")[3:] == [None] * 3


def test_a_step_without_a_finite_gradient_leaves_the_model_as_it_was(dump_folder: Path) -> None:
    overflows = "--experimental.custom_import=tests.faults.plugins.loss_overflows_once"
    run = train(dump_folder, *FAST, "--training.steps=4", "--checkpoint.interval=1", overflows, world_size=2)
    assert steps_of(dump_folder) == [1, 3, 4] and run.values("skipped_steps") == [0, 1, 1, 1]
    assert run.values("loss")[1] is None and None not in run.values("loss")[2:]


def test_a_step_in_which_no_label_counts_has_no_loss_and_harms_nothing(dump_folder: Path) -> None:
    ignored = "--experimental.custom_import=tests.faults.plugins.labels_ignored"
    run = train(dump_folder, *FAST, "--training.steps=3", ignored, world_size=2)
    assert run.values("loss_ce")[1] == 0.0 and run.values("loss_future")[1] == 0.0
    assert run.values("skipped_steps") == [0, 0, 0] and run.values("loss_ce")[2] > 0
    assert steps_of(dump_folder) == [3]


def test_weights_that_are_not_finite_are_not_saved(dump_folder: Path) -> None:
    overflow = "--experimental.custom_import=tests.faults.plugins.weights_overflow"
    run = train(dump_folder, *FAST, "--training.steps=2", "--checkpoint.interval=1", overflow, check=False)
    assert run.exit_codes == [1] and steps_of(dump_folder) == [1]
    assert "step 2 is not saved: its gradient norm, losses or weights are not finite" in run.ranks[0].output
    assert not (dump_folder / "hf").exists()


def test_an_error_on_one_rank_ends_the_others_and_leaves_the_last_step(dump_folder: Path) -> None:
    raises = "--experimental.custom_import=tests.faults.plugins.rank_raises"
    run = train(
        dump_folder, *FAST, "--training.steps=9", "--checkpoint.interval=2", raises,
        "--comm.train_timeout_seconds=20", "--comm.init_timeout_seconds=20", world_size=2, check=False, timeout=90,
    )  # fmt: skip
    assert all(run.exit_codes) and "this rank has failed" in run.ranks[1].output
    error = run.ranks[0].output.splitlines()[-1]
    assert error.startswith("error: [rank 0] another rank has ended or does not answer (") and str(dump_folder) in error
    assert "Traceback" not in run.ranks[0].output
    assert steps_of(dump_folder) == [2]


@pytest.mark.parametrize("where", ["everywhere", "on one rank"])
def test_data_that_are_not_there_are_said_by_all_before_anything_is_written(dump_folder: Path, where: str) -> None:
    absent = "--experimental.custom_import=tests.faults.plugins.data_absent"
    options = (
        [absent] if where == "on one rank" else ["--training.dataset=json", "--training.dataset_path=nowhere/*.jsonl"]
    )
    run = train(dump_folder, *FAST, *options, world_size=2, check=False)
    assert run.exit_codes == [1, 1] and not (dump_folder / "checkpoint").exists()
    for rank in run.ranks:
        assert re.match(r"error: (\[rank 1\] )?training.dataset: '.*': no file matches", rank.output.splitlines()[-1])


def test_data_that_can_not_be_read_on_one_rank_are_said_by_all(dump_folder: Path) -> None:
    unreadable = "--experimental.custom_import=tests.faults.plugins.data_unreadable"
    run = train(
        dump_folder, *FAST, "--training.steps=9", "--checkpoint.interval=2", unreadable, world_size=2, check=False
    )
    assert run.exit_codes == [1, 1] and steps_of(dump_folder) == [2]
    for rank in run.ranks:
        assert rank.output.splitlines()[-1] == "error: [rank 1] RuntimeError: this sequence cannot be read"


@pytest.mark.parametrize("lost", ["folder", "metrics"])
def test_a_folder_that_is_lost_under_a_run_ends_it_on_all_ranks(dump_folder: Path, lost: str) -> None:
    def lose(processes: list[mp.Process]) -> None:
        wait_for_steps(dump_folder, 2, processes[0].is_alive)
        if lost == "folder":
            dump_folder.rename(dump_folder.with_name("away"))
            return
        (dump_folder / "metrics.jsonl").unlink()
        (dump_folder / "metrics.jsonl").mkdir()

    run = train(dump_folder, *WITHOUT_END, world_size=2, watch=lose, check=False)
    reason = "was removed while this run was writing to it" if lost == "folder" else "metrics.jsonl cannot be written: "
    assert run.exit_codes == [1, 1] and not steps_of(dump_folder)
    for rank in run.ranks:
        assert rank.output.splitlines()[-1].startswith("error: ") and reason in rank.output.splitlines()[-1]
        assert "Traceback" not in rank.output
    assert lost == "metrics" or not dump_folder.exists()


def test_a_signal_while_exports_are_made_ends_the_run_and_the_next_one_makes_them(dump_folder: Path) -> None:
    options = (
        *FAST,
        "--training.steps=2",
        "--checkpoint.interval=2",
        "--export.interval=2",
        "--checkpoint.no-last_save_in_hf",
    )

    def stop(processes: list[mp.Process]) -> None:
        wait_for_steps(dump_folder, 2, processes[0].is_alive)
        while not (dump_folder / "checkpoint" / "step-2").exists() and processes[0].is_alive():
            time.sleep(0.01)
        os.kill(processes[1].pid, signal.SIGTERM)

    stopped = train(dump_folder, *options, world_size=2, watch=stop, check=False)
    assert stopped.exit_codes == [EXIT_PREEMPTED] * 2 and not (dump_folder / "hf" / "step-2").exists()
    assert "Stopped by SIGTERM after step 2, before its exports were made" in stopped.ranks[1].output
    again = train(dump_folder, *options, world_size=2)
    assert "Already complete: " in again.ranks[0].output and (dump_folder / "hf" / "step-2" / "export.json").exists()


@pytest.mark.matrix
def test_exports_that_were_due_are_made_up_for_before_a_run_is_complete(dump_folder: Path) -> None:
    options = (
        *FAST,
        "--training.steps=4",
        "--checkpoint.interval=1",
        "--checkpoint.keep_latest_k=2",
        "--export.interval=2",
    )
    killed = train(dump_folder, *options, env={"FLAME_EXT_FAULT": "during_export"}, check=False)
    assert killed.exit_codes == [-9] and not (dump_folder / "hf" / "step-4").exists()
    again = train(dump_folder, *options)
    assert "Already complete: " in again.ranks[0].output
    assert sorted(p.name for p in (dump_folder / "hf").iterdir()) == ["step-2", "step-4"]
    assert steps_of(dump_folder) == [3, 4], "step 2 was kept until its export was made"
    unbroken = dump_folder.with_name("unbroken")
    train(unbroken, *options)
    assert steps_of(unbroken) == [3, 4] and len(list((unbroken / "hf").iterdir())) == 2
