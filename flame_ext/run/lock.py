"""One run writes to a ``job.dump_folder``: a second would delete, replace and purge the steps of the first.

The lock is a file that says which process holds it. A process is known by its number *and* the kernel's count of when it
started, so a number that was given away again is not mistaken for the holder, and no clock is ever compared.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from torchtitan.tools.logging import logger

from flame_ext.errors import CheckpointError

LOCK_NAME = ".lock"

# A lock is created empty and filled at once; one that stays unreadable for this long was not cut off a moment ago.
_ATTEMPTS, _PAUSE = 50, 0.02


@dataclass(frozen=True)
class Holder:
    """A process, as far as another one on any machine can tell it from others."""

    host: str
    pid: int
    start: str
    """Clock ticks between the kernel's boot and the process's start; "" where there is no /proc."""
    boot: str
    """The kernel's boot identifier."""
    pid_namespace: str
    """Process numbers mean something inside it only: containers on one machine do not see each other's."""
    time: str
    """When the lock was taken, for people."""
    token: str
    """Tells locks of the same process apart."""


class FolderLock:
    """Exclusive use of a folder, from :meth:`acquire` to :meth:`release`; also a context manager. For one rank.

    A lock whose process on this machine has ended is taken over. On another machine that can not be known, so the lock is
    respected until someone removes it. Machines are told apart by their host names.

    Args:
        folder: is created if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK_NAME
        self._mine: Holder | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            CheckpointError: another process holds it, or the file is damaged.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        mine = _this_process()
        while not (self._create(mine) or self._take_over(mine)):
            pass  # the lock that was in the way has gone
        self._mine = mine

    def release(self) -> None:
        """Remove the lock if it is ours; does nothing without one, or a second time."""
        mine, self._mine = self._mine, None
        if mine is None:
            return
        try:
            holder = self._read()
        except CheckpointError as e:
            logger.warning(f"{e} (left as it is)")
            return
        if holder == mine:
            self.file.unlink(missing_ok=True)
        elif holder is not None:
            logger.warning(f"{self.file} now names {_named(holder)}: left to it")

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Nobody else is there to release it while its owner is being built."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _create(self, mine: Holder) -> bool:
        """Whether there was no lock and now there is ours."""
        try:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                _write(stream, mine)
        except BaseException:  # a full disk must not leave a lock that nobody holds
            self.file.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self, mine: Holder) -> bool:
        """Replace the lock of a process that has ended; False if someone else was faster, or it was released.

        Only processes on the holder's machine get here with a dead holder, so a kernel's lock on the file is enough to make
        them go one by one. The file is never absent meanwhile: nobody can create one.
        """
        holder = self._read()
        if holder is None:
            return False
        self._require_dead(holder, mine)
        try:
            stream = self.file.open("r+b")  # over NFS, only what is open for writing can be locked
        except FileNotFoundError:
            return False
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as e:
                raise CheckpointError(
                    f"{self.file}: {_named(holder)} has ended, but its lock can not be taken over on this file system "
                    f"({e.strerror}); remove {self.file}"
                ) from e
            # Whoever had the kernel's lock before us has put another file there.
            if not self._is_still(stream.fileno()) or self._read() != holder:
                return False
            temporary = self.file.with_name(f"{LOCK_NAME}.{mine.token}")
            try:
                with temporary.open("w", encoding="utf-8") as new:
                    _write(new, mine)
                temporary.replace(self.file)
            finally:
                temporary.unlink(missing_ok=True)
        logger.warning(f"{self.file}: {_named(holder)} has ended without releasing it; taken over")
        return True

    def _is_still(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.file.stat())
        except FileNotFoundError:
            return False

    def _require_dead(self, holder: Holder, mine: Holder) -> None:
        in_use = (
            f"{self.file.parent} is in use by {_named(holder)}, and two runs in one job.dump_folder destroy each other's "
            "steps; give this run another one, or "
        )
        if holder.host != mine.host or (holder.boot == mine.boot and holder.pid_namespace != mine.pid_namespace):
            place = "machine" if holder.host != mine.host else "container"
            raise CheckpointError(f"{in_use}if that process is known to have ended on its {place}, remove {self.file}")
        if holder.boot == mine.boot and _start_of(holder.pid) == holder.start:
            raise CheckpointError(f"{in_use}wait until that process has ended, or end it")

    def _read(self) -> Holder | None:
        """Who holds the lock; None if there is none.

        Raises:
            CheckpointError: the file does not say.
        """
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE)
            try:
                return _parse(self.file.read_bytes())
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, RecursionError) as e:
                reason = e
        raise CheckpointError(
            f"{self.file}: does not say which process holds it ({reason}): damaged file; if no run uses {self.file.parent}, "
            "remove it"
        )


def _parse(raw: bytes) -> Holder:
    holder = Holder(**json.loads(raw))
    if type(holder.pid) is not int or not all(isinstance(v, str) for k, v in asdict(holder).items() if k != "pid"):
        raise TypeError("a value has the wrong type")
    return holder


def _write(stream: TextIO, holder: Holder) -> None:
    json.dump(asdict(holder), stream, indent=2)
    stream.write("\n")
    stream.flush()
    os.fsync(stream.fileno())


def _named(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host} (since {holder.time})"


def _this_process() -> Holder:
    boot, namespace = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    pid = os.getpid()
    return Holder(socket.gethostname(), pid, _start_of(pid) or "", boot, namespace, now, uuid.uuid4().hex)


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since boot; None if it has ended, "" if the system does not say."""
    try:
        # The second field, the command's name, may hold spaces and parentheses: count from its end (proc(5)).
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else ""
    return None if state in "ZXx" else fields[18]
