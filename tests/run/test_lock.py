"""One writer for a folder, among real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from flame_ext.errors import CheckpointError
from flame_ext.run import lock
from flame_ext.run.lock import FolderLock

# Forked, since a fresh interpreter spends seconds on importing torch.
FORK = multiprocessing.get_context("fork")


def contender(folder: Path, pipe: Connection) -> None:
    """Take the lock when told to, say how that went, and hold it until told to go."""
    folder_lock = FolderLock(folder)
    pipe.recv()
    try:
        folder_lock.acquire()
    except CheckpointError as e:
        pipe.send(str(e))
    else:
        pipe.send("acquired")
    pipe.recv()
    folder_lock.release()


class Contender:
    def __init__(self, folder: Path) -> None:
        self.pipe, other = FORK.Pipe()
        self.process = FORK.Process(target=contender, args=(folder, other), daemon=True)
        self.process.start()

    def leave(self) -> None:
        self.pipe.send("leave")
        self.process.join()
        assert self.process.exitcode == 0


@pytest.fixture
def contend() -> Iterator[Callable[[Path], Contender]]:
    started: list[Contender] = []

    def start(folder: Path) -> Contender:
        started.append(Contender(folder))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.join()


def contents(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ".lock").read_text())


def change(folder: Path, **values: Any) -> None:
    (folder / ".lock").write_text(json.dumps({**contents(folder), **values}))


def left_behind(folder: Path, **values: Any) -> None:
    """A lock that nobody releases, of a process on this machine with our number that started at another time."""
    FolderLock(folder).acquire()
    change(folder, **({"start": "1"} | values))


def test_the_lock_names_its_process_and_goes_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with FolderLock(folder):
        assert contents(folder)["pid"] == os.getpid() and contents(folder)["start"].isdigit()
        with pytest.raises(CheckpointError, match=f"{folder} is in use by process {os.getpid()} on .* .since 20"):
            FolderLock(folder).acquire()
        assert [p.name for p in folder.iterdir()] == [".lock"]
    assert list(folder.iterdir()) == []


def test_a_second_process_is_refused_while_the_first_lives_and_not_after_it_was_killed(
    tmp_path: Path, contend: Callable[[Path], Contender], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = contend(tmp_path), contend(tmp_path)
    first.pipe.send("go")
    assert first.pipe.recv() == "acquired"
    second.pipe.send("go")
    refused, held = second.pipe.recv(), contents(tmp_path)
    assert refused == (
        f"{tmp_path} is in use by process {first.process.pid} on {held['host']} (since {held['time']}), and two runs in one "
        "job.dump_folder destroy each other's steps; give this run another one, or wait until that process has ended, or "
        "end it"
    )
    second.leave()  # a lock that was not had is not released
    assert contents(tmp_path) == held
    first.process.kill()
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)  # ended, but not reaped: a zombie holds nothing
    with FolderLock(tmp_path):
        assert contents(tmp_path)["pid"] == os.getpid()
    assert f"process {first.process.pid} on {held['host']}" in caplog.text and "taken over" in caplog.text


@pytest.mark.parametrize("_", range(3))
def test_of_eight_processes_at_a_dead_lock_exactly_one_gets_it(
    tmp_path: Path, contend: Callable[[Path], Contender], _: int
) -> None:
    contenders = [contend(tmp_path) for _ in range(8)]
    left_behind(tmp_path)
    for one in contenders:
        one.pipe.send("go")
    answers = [one.pipe.recv() for one in contenders]
    assert answers.count("acquired") == 1
    winner = contenders[answers.index("acquired")]
    assert contents(tmp_path)["pid"] == winner.process.pid
    assert all(f"in use by process {winner.process.pid} " in text for text in answers if text != "acquired")
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    winner.leave()
    assert list(tmp_path.iterdir()) == []


def test_two_that_have_seen_the_same_dead_holder_do_not_both_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(tmp_path)
    faster, slower = FolderLock(tmp_path), FolderLock(tmp_path)
    flock = lock.fcntl.flock

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(lock.fcntl, "flock", flock)
        faster.acquire()
        flock(*arguments)

    monkeypatch.setattr(lock.fcntl, "flock", overtaken)
    with pytest.raises(CheckpointError, match="is in use by"):
        slower.acquire()
    faster.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [{"pid": os.getppid()}, {"boot": "another"}, {"pid": 2**22 + 1}])
def test_a_number_given_to_another_process_and_a_reboot_are_seen(tmp_path: Path, values: dict[str, Any]) -> None:
    left_behind(tmp_path, **values)
    with FolderLock(tmp_path):
        assert contents(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("values", "place"), [({"host": "elsewhere"}, "machine"), ({"pid_namespace": "pid:[1]"}, "container")]
)
def test_what_can_not_be_known_to_have_ended_is_respected(tmp_path: Path, values: dict[str, str], place: str) -> None:
    left_behind(tmp_path, **values)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError) as e:
        FolderLock(tmp_path).acquire()
    assert str(e.value).endswith(f"known to have ended on its {place}, remove {tmp_path / '.lock'}")
    assert before["host"] in str(e.value) and contents(tmp_path) == before


@pytest.mark.parametrize("day", ["1999-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
def test_clocks_do_not_matter(tmp_path: Path, day: str) -> None:
    with FolderLock(tmp_path):
        change(tmp_path, time=day)
        with pytest.raises(CheckpointError, match="is in use by"):
            FolderLock(tmp_path).acquire()
    left_behind_at = tmp_path / "dead"
    left_behind(left_behind_at, time=day)
    FolderLock(left_behind_at).acquire()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0" * 100, "[" * 100_000])
def test_a_damaged_lock_is_reported_and_left(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PAUSE", 0.001)
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(CheckpointError, match=r"\.lock: does not say which process holds it .*remove it"):
        FolderLock(tmp_path).acquire()
    assert (tmp_path / ".lock").read_text() == text


def test_without_locks_of_the_kernel_nothing_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    left_behind(tmp_path)
    with pytest.raises(CheckpointError, match=r"Function not implemented\); remove .*\.lock"):
        FolderLock(tmp_path).acquire()


def test_release_leaves_the_lock_of_another_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = FolderLock(tmp_path)
    mine.acquire()
    change(tmp_path, host="elsewhere")
    mine.release()
    assert contents(tmp_path)["host"] == "elsewhere" and "left to it" in caplog.text
    mine.release()
    (tmp_path / ".lock").unlink()
    FolderLock(tmp_path).release()


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        FolderLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []
