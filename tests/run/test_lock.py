"""One writer for a folder, among real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

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
    """A record of this host whose process nobody knows."""
    record = {
        "host": socket.gethostname(),
        "pid": 2**22 + 1,
        "time": "2020-01-01T00:00:00+00:00",
        "boot": lock._boot_id(),
        "kernel": True,
    }
    record |= values
    (folder / ".lock").write_text(json.dumps(record))


def older(folder: Path, host: str) -> FileLock:
    """What a process of the version before heartbeats leaves: a record, and the lock on ``.lock.HOST``, which it has if it lives."""
    left_behind(folder, host=host)
    (folder / ".lock").write_text(
        json.dumps({k: v for k, v in contents(folder).items() if k in ("host", "pid", "time")})
    )
    os.utime(folder / ".lock", (0, 0))
    kernel = FileLock(folder / f".lock.{host}", fallback_to_soft=False)
    kernel.acquire(timeout=0)
    return kernel


def wait_until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    folder_lock = FolderLock(folder)
    folder_lock.acquire()
    try:
        yield
    finally:
        folder_lock.release()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", 0.05)
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(lock, "_SILENCE", 2.0)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)


@pytest.mark.usefixtures("impatient")
def test_the_lock_names_its_process_and_goes_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new"
    with held(folder):
        assert (
            contents(folder).keys() == {"host", "pid", "time", "boot", "kernel"}
            and contents(folder)["pid"] == os.getpid()
        )
        with pytest.raises(CheckpointError, match=f"{folder} is in use by process {os.getpid()} on .* .since 20"):
            FolderLock(folder).acquire()
        assert sorted(p.name for p in folder.iterdir()) == [".lock", ".lock.kernel"]
    assert list(folder.iterdir()) == [] and not caplog.text


def test_a_second_process_is_refused_while_the_first_lives_and_not_after_it_was_killed(
    tmp_path: Path, contend: Callable[[Path], Contender], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = contend(tmp_path), contend(tmp_path)
    first.pipe.send("go")
    assert first.pipe.recv() == "acquired"
    second.pipe.send("go")
    refused, held_by = second.pipe.recv(), contents(tmp_path)
    assert refused == (
        f"{tmp_path} is in use by process {first.process.pid} on {held_by['host']} (since {held_by['time']}), and two runs in one "
        "job.dump_folder destroy each other's steps; give this run another one, or wait until that process has ended, or "
        "end it, or, if it is known to have ended, set checkpoint.take_over_lock = true"
    )
    second.leave()  # a lock that was not had is not released
    assert contents(tmp_path) == held_by
    first.process.kill()
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)  # ended, but not reaped: a zombie holds nothing
    with held(tmp_path):
        assert contents(tmp_path)["pid"] == os.getpid()
    assert f"process {first.process.pid} on {held_by['host']}" in caplog.text
    assert "has ended without releasing it; taken over" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_the_holder_has_forked_does_not_keep_the_lock(
    tmp_path: Path, contend: Callable[[Path], Contender]
) -> None:
    """A dataloader's worker outlives a killed run for a moment."""
    folder_lock = FolderLock(tmp_path)
    folder_lock.acquire()
    contend(tmp_path / "elsewhere")  # a fork of this process, which has the lock
    folder_lock._kernel.release()  # the kernel does so when the holder is killed
    with held(tmp_path):
        pass
    folder_lock.release()


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
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".lock.kernel"]
    winner.leave()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("impatient")
def test_two_that_have_seen_the_same_dead_holder_do_not_both_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(tmp_path)
    faster, slower = FolderLock(tmp_path), FolderLock(tmp_path)
    flock = fcntl.flock

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        faster.acquire()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    with pytest.raises(CheckpointError, match="is in use by"):
        slower.acquire()
    faster.release()
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_lock_on_a_file_that_its_holder_has_removed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps the removed file, with a link, as long as a process has it open; filelock cannot see that it is gone."""
    holder, late = FolderLock(tmp_path), FolderLock(tmp_path)
    holder.acquire()
    flock = fcntl.flock

    def released_meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".nfs").hardlink_to(tmp_path / ".lock.kernel")
        holder.release()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", released_meanwhile)
    with pytest.raises(CheckpointError, match="was in use until this moment: start again"):
        late.acquire()
    with held(tmp_path):
        assert contents(tmp_path)["pid"] == os.getpid()


def test_of_two_hosts_that_find_no_record_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel locks of hosts do not know of each other, the record is created by one of them."""
    read = FolderLock._read

    def overtaken(self: FolderLock) -> lock.Holder | None:
        monkeypatch.setattr(FolderLock, "_read", read)
        found = self._read()
        left_behind(tmp_path, host="elsewhere")
        return found

    monkeypatch.setattr(FolderLock, "_read", overtaken)
    with pytest.raises(CheckpointError, match="is in use by process .* on elsewhere"):
        FolderLock(tmp_path).acquire()
    assert contents(tmp_path)["host"] == "elsewhere"


@pytest.mark.parametrize("values", [{"pid": os.getppid()}, {"pid": os.getpid()}, {"pid": 1}])
def test_a_number_given_to_another_process_and_a_reboot_are_seen(tmp_path: Path, values: dict[str, Any]) -> None:
    left_behind(tmp_path, **values)
    with held(tmp_path):
        assert contents(tmp_path)["pid"] == os.getpid()


@pytest.mark.usefixtures("impatient")
def test_a_process_of_another_host_is_seen_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where hosts do not see each other's kernel locks; each acts as if the other's did not exist."""
    mine = FolderLock(tmp_path)
    mine.acquire()
    before = contents(tmp_path)
    monkeypatch.setattr(lock, "_boot_id", lambda: "another kernel")  # under the same name of a host, as pods have it
    monkeypatch.setattr(lock, "FileLock", lambda file, **options: FileLock(f"{file}.another", **options))
    monkeypatch.setattr(FolderLock, "_is_in_place", lambda *_: True)
    with pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()} on "):
        FolderLock(tmp_path).acquire()
    assert (tmp_path / ".lock.kernel").exists()  # the next process of its own host would lock a new one
    mine._end.set()  # from now on it is as if it had been killed
    mine._beats.join()
    with held(tmp_path):
        assert contents(tmp_path) != before and mine.error() is None
    assert "may be alive; waiting up to" in caplog.text and "has ended without releasing it; taken over" in caplog.text
    mine._kernel.release()


@pytest.mark.usefixtures("impatient")
def test_who_took_over_is_not_taken_over_from_when_the_first_one_ends(tmp_path: Path) -> None:
    first, mine = FolderLock(tmp_path), FolderLock(tmp_path, take_over=True)
    first.acquire()
    mine.acquire()
    assert not contents(tmp_path)["kernel"]
    first.release()  # as it does when it hears of it
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} "):
        FolderLock(tmp_path).acquire()
    wait_until(lambda: contents(tmp_path)["kernel"])
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} "):
        FolderLock(tmp_path).acquire()
    assert mine.error() is None
    mine.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("later", [False, True])
def test_who_could_not_have_a_lock_of_the_kernel_is_not_taken_over_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    mine = FolderLock(tmp_path)

    def none_left(**_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(mine._kernel, "acquire", none_left)
        mine.acquire()
        if not later:
            with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} "):
                FolderLock(tmp_path).acquire()
            assert mine.error() is None
    if later:
        wait_until(lambda: contents(tmp_path)["kernel"])
        mine._end.set()  # from now on it is as if it had been killed
        mine._beats.join()
        mine._kernel.release()
        monkeypatch.setattr(lock, "_SILENCE", 1e9)  # no heartbeat has to be waited for
        with held(tmp_path):
            pass
    mine.release()


@pytest.mark.usefixtures("impatient")
def test_a_file_of_the_kernels_lock_that_someone_removes_is_locked_again(tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / ".lock.kernel").unlink()
        wait_until((tmp_path / ".lock.kernel").exists)
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} "):
            FolderLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_refused_process_has_left_is_removed_in_the_end(tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / ".lock.kernel").unlink()
        (tmp_path / ".lock.kernel").touch()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("impatient")
def test_a_run_of_the_version_before_heartbeats_is_seen(tmp_path: Path) -> None:
    kernel = older(tmp_path, socket.gethostname())
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"in use by process {before['pid']} on .*take_over_lock"):
        FolderLock(tmp_path).acquire()
    assert contents(tmp_path) == before
    kernel.release()  # it is killed
    with held(tmp_path):
        assert contents(tmp_path)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("host", ["elsewhere", None])
def test_a_run_of_the_version_before_heartbeats_that_cannot_be_seen_has_to_be_known_to_have_ended(
    tmp_path: Path, host: str | None
) -> None:
    """It is on another host, or the file system had no locks of the kernel."""
    older(tmp_path, host or socket.gethostname()).release()
    if host is None:
        (tmp_path / f".lock.{socket.gethostname()}").unlink()
    with pytest.raises(CheckpointError, match="in use by process .*take_over_lock"):
        FolderLock(tmp_path).acquire()
    knows = FolderLock(tmp_path, take_over=True)
    knows.acquire()
    assert contents(tmp_path)["pid"] == os.getpid()
    knows.release()


@pytest.mark.usefixtures("impatient")
def test_who_cannot_write_its_record_again_hears_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record was removed, and another process writes one when this one is about to."""
    mine = FolderLock(tmp_path)
    mine.acquire()
    read = mine._read

    def overtaken() -> lock.Holder | str | None:
        monkeypatch.setattr(mine, "_read", read)
        left_behind(tmp_path, host="elsewhere")
        return None

    monkeypatch.setattr(mine, "_read", overtaken)
    mine._beats.join(10)
    assert not mine._beats.is_alive() and "in use by process 4194305 on elsewhere" in (mine.error() or "")
    mine.release()
    assert contents(tmp_path)["host"] == "elsewhere"


@pytest.mark.usefixtures("impatient")
def test_a_process_that_is_taken_over_from_hears_of_it(tmp_path: Path) -> None:
    """By someone who said so, or because it stood still for too long."""
    mine, other = FolderLock(tmp_path), FolderLock(tmp_path, take_over=True)
    mine.acquire()
    other.acquire()
    mine._beats.join(10)
    assert "now names process" in mine.error() and "has taken" in mine.error() and other.error() is None
    mine.release()
    assert (tmp_path / ".lock").exists()
    other.release()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("made_anew", [False, True])  # as whoever writes a file to it does
def test_a_folder_that_is_removed_is_heard_of_and_left_alone(tmp_path: Path, made_anew: bool) -> None:
    mine = FolderLock(tmp_path / "run")
    mine.acquire()
    assert mine.error() is None
    shutil.rmtree(tmp_path / "run")
    if made_anew:
        (tmp_path / "run").mkdir()
    mine._beats.join(10)
    assert "was removed while this run was writing to it" in mine.error()
    mine.release()
    assert list(tmp_path.rglob("*")) == ([tmp_path / "run"] if made_anew else []) and not mine._kernel.is_locked


def test_a_folder_whose_parent_is_a_file_now_is_heard_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = FolderLock(tmp_path / "outputs" / "run")
    mine.acquire()
    shutil.rmtree(tmp_path / "outputs")
    (tmp_path / "outputs").touch()
    assert "was removed while this run was writing to it" in (mine.error() or "")
    mine.release()
    assert "Not a directory" in caplog.text and not mine._kernel.is_locked


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_folder_that_cannot_be_read_is_a_reason_and_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with held(tmp_path):
        folder_lock = FolderLock(tmp_path)
        folder_lock._folder = os.open(tmp_path, os.O_RDONLY)
        with monkeypatch.context() as patch:
            patch.setattr(lock.os, "fstat", fails)
            assert os.strerror(number) in (folder_lock.error() or "")
        assert folder_lock.error() is None


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("day", ["1999-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
def test_clocks_do_not_matter(tmp_path: Path, day: str) -> None:
    with held(tmp_path):
        change(tmp_path, time=day)
        with pytest.raises(CheckpointError, match="is in use by"):
            FolderLock(tmp_path).acquire()
    left_behind(tmp_path, time=day)
    with held(tmp_path):
        pass


def test_a_live_process_whose_record_was_removed_is_still_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", 0.05)
    with held(tmp_path):
        (tmp_path / ".lock").unlink()
        with pytest.raises(CheckpointError, match=r"in use by a process that has locked .*\.lock\..*wait until"):
            FolderLock(tmp_path).acquire()


@pytest.mark.usefixtures("impatient")
def test_a_record_that_someone_removes_is_written_again(tmp_path: Path) -> None:
    with held(tmp_path):
        before = contents(tmp_path)
        (tmp_path / ".lock").unlink()
        while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text().endswith("}"):
            time.sleep(0.01)
        assert contents(tmp_path) == before


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0" * 100, "[" * 100_000])
def test_a_damaged_record_does_not_lock_anyone_out(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".lock").write_text(text)
    with held(tmp_path):
        assert contents(tmp_path)["pid"] == os.getpid()
    assert "damaged file" in caplog.text and list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_does_not_lock_anyone_out(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "nowhere")
    with held(tmp_path):
        assert contents(tmp_path)["pid"] == os.getpid() and not (tmp_path / ".lock").is_symlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_flock", "impatient")
def test_without_locks_of_the_kernel_the_heartbeat_tells_whether_a_process_lives(tmp_path: Path) -> None:
    mine = FolderLock(tmp_path)
    mine.acquire()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} "):
        FolderLock(tmp_path).acquire()
    mine._end.set()
    mine._beats.join()
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_release_leaves_the_lock_of_another_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = FolderLock(tmp_path)
    mine.acquire()
    change(tmp_path, host="elsewhere")
    mine.release()
    assert contents(tmp_path)["host"] == "elsewhere" and "left to it" in caplog.text
    mine.release()
    (tmp_path / ".lock").unlink()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("dead", [False, True])
def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: bool) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if dead:
        left_behind(tmp_path)
    monkeypatch.setattr(lock.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        FolderLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []
