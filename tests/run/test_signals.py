"""Stop signals, what all ranks agree on, and the exit code for the launching script."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flame_ext.run.signals import EXIT_FILE_VARIABLE, STOP_SIGNALS, Circumstances, StopSignals, agree, note_exit_code
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
    assert agree(circumstances, CPU) == circumstances and agree(Circumstances(), CPU) == Circumstances()


def _agreed(of_ranks: list[list[Circumstances]]) -> list[Circumstances]:
    dist.init_process_group("gloo")
    agreed = [agree(of_step[dist.get_rank()], CPU) for of_step in of_ranks]
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
