"""Stop signals, what all ranks agree on, and the exit code for the launching script."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import flame_ext.train as command
from flame_ext.config.sections import FlameJobConfig
from flame_ext.run.signals import (
    EXIT_FILE_VARIABLE,
    EXIT_PREEMPTED,
    STOP_SIGNALS,
    Circumstances,
    StopSignals,
    agree,
    note_exit_code,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_is_remembered_until_the_handlers_are_restored(number: signal.Signals) -> None:
    seen: list[int] = []
    before = {stop: signal.signal(stop, lambda number, _: seen.append(number)) for stop in STOP_SIGNALS}
    try:
        handlers = [signal.getsignal(stop) for stop in STOP_SIGNALS]
        signals = StopSignals()
        signals.install()
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received is number and seen == []
        signals.restore()
        assert [signal.getsignal(stop) for stop in STOP_SIGNALS] == handlers
        os.kill(os.getpid(), number)
        assert seen == [number]
        signals.restore()  # a second time, nothing
        assert [signal.getsignal(stop) for stop in STOP_SIGNALS] == handlers
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


def _stops_again_and_again() -> None:
    """The end of a run of the command, to which each signal comes whenever what is done about it changes."""
    set_handler = signal.signal

    def set_and_send(number: int, handler: Any) -> Any:
        before = set_handler(number, handler)
        os.kill(os.getpid(), number)
        return before

    def trainer(*_: Any) -> SimpleNamespace:
        return SimpleNamespace(train=lambda: None, close=lambda: None, preempted=True)

    for number in STOP_SIGNALS:
        set_handler(number, signal.SIG_DFL)
    with (
        mock.patch.object(command, "__name__", "__main__"),
        mock.patch.object(command, "FutureTrainer", trainer),
        mock.patch.object(signal, "signal", set_and_send),
    ):
        os._exit(command._train(FlameJobConfig()))


def test_no_signal_can_end_a_run_that_has_saved() -> None:
    process = multiprocessing.get_context("fork").Process(target=_stops_again_and_again)
    process.start()
    process.join()
    assert process.exitcode == EXIT_PREEMPTED


def test_a_signal_that_was_held_back_until_the_handlers_are_there_counts() -> None:
    signals = StopSignals()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.raise_signal(signal.SIGTERM)  # to this thread: others have not blocked it
    signals.install()
    try:
        assert signals.received is signal.SIGTERM
    finally:
        signals.restore()


def test_one_process_agrees_with_itself() -> None:
    circumstances = Circumstances(stop=True, save_failed=True)
    assert agree(circumstances) == circumstances and agree(Circumstances()) == Circumstances()


def _agreed(of_ranks: list[list[Circumstances]]) -> list[Circumstances]:
    dist.init_process_group("gloo")
    agreed = [agree(of_step[dist.get_rank()]) for of_step in of_ranks]
    dist.destroy_process_group()
    return agreed


def test_what_is_true_on_one_rank_is_true_on_all(tmp_path: Path) -> None:
    steps = [[Circumstances(), Circumstances()]]
    for number in range(len(Circumstances._fields)):
        one = Circumstances(*(index == number for index in range(len(Circumstances._fields))))
        steps += [[one, Circumstances()], [Circumstances(), one], [one, one]]
    steps.append([Circumstances(stop=True), Circumstances(data_failed=True)])
    expected = [Circumstances(*(a or b for a, b in zip(*of_step, strict=True))) for of_step in steps]
    for rank in run_ranks(_agreed, 2, steps, folder=tmp_path):
        assert rank.value == expected, rank.output
        assert all(type(flag) is bool for agreed in rank.value for flag in agreed)


def test_the_exit_code_is_left_where_the_launching_script_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(EXIT_FILE_VARIABLE, raising=False)
    note_exit_code(75)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(EXIT_FILE_VARIABLE, str(tmp_path / "code"))
    note_exit_code(75)
    assert (tmp_path / "code").read_text() == "75\n"


def test_an_exit_code_that_cannot_be_left_stays_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(EXIT_FILE_VARIABLE, str(tmp_path / "missing" / "code"))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        command.main([])
    assert end.value.code == 2 and "warning: the exit code 2 cannot be written" in capsys.readouterr().err
