"""Lets one run at a time write to a ``job.dump_folder``. ``.lock``, created exclusively, names its process on any host; a kernel
lock on ``.lock.HOST``, which ends with the process, tells the runs of that host whether the process is still there.
"""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout
from torchtitan.tools.logging import logger

from flame_ext.errors import CheckpointError

LOCK_NAME = ".lock"
_PATIENCE = 1.0  # seconds, in which another process that has the kernel lock has written its record
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Holder:
    """The process that uses the folder, since ``time``."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.time})"


class FolderLock:
    """Keeps a folder, which it creates, for this process. It takes over from a process of this host that has ended; the record of
    another host stands until someone removes it. For one rank.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK_NAME
        self._kernel_file = folder / f"{LOCK_NAME}.{socket.gethostname()}"
        self._kernel = FileLock(self._kernel_file, fallback_to_soft=False, on_acquired=self._require_in_place)
        self._mine: Holder | None = None

    def acquire(self) -> None:
        """Takes the lock; raises a CheckpointError if another process holds it, or the record is damaged."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        mine, no_flock = Holder(), ""
        try:
            self._kernel.acquire(timeout=_PATIENCE)
        except Timeout:
            raise self._in_use(self._read(), "wait until that process has ended, or end it") from None
        except OSError as e:
            if e.errno not in _NO_FLOCK:
                raise
            self._kernel_file.unlink(missing_ok=True)
            no_flock = f"this file system has no flock ({e.strerror})"
        try:
            ended = self._read()
            if ended is not None and ended.host != mine.host:
                raise self._in_use(ended, f"if that process is known to have ended on its machine, remove {self.file}")
            if ended is not None and no_flock:
                remedy = f"make sure yourself that it has ended, as {no_flock}; remove {self.file} then"
                raise self._in_use(ended, remedy)
            if ended is not None:
                self.file.unlink(missing_ok=True)
            self._write(mine)
        except BaseException:
            self._kernel_file.unlink(missing_ok=True)
            self._kernel.release()
            raise
        self._mine = mine
        if ended is not None:
            logger.warning(f"{self.file}: {ended} has ended without releasing it; taken over")
        if no_flock:
            logger.warning(f"{no_flock}: if this run is killed, remove {self.file} before you start it again")

    def release(self) -> None:
        """Removes the lock, if :meth:`acquire` took it and the record is still this process's."""
        mine, self._mine = self._mine, None
        if mine is None:
            return
        try:
            holder = self._read()
            if holder == mine:
                self.file.unlink(missing_ok=True)
                self._kernel_file.unlink(missing_ok=True)
            elif holder is not None:
                logger.warning(f"{self.file} now names {holder}: left to it")
        except CheckpointError as e:
            logger.warning(f"{e} (left as it is)")
        finally:
            self._kernel.release()

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Releases the lock if the body, which builds the object that releases it later, fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def _require_in_place(self, descriptor: int) -> None:
        """Refuses a locked file that its last holder has removed since: the next process would lock a new one."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), self._kernel_file.stat()):
                return
        raise CheckpointError(f"{self.file.parent} was in use until this moment: start again")

    def _read(self) -> Holder | None:
        try:
            values = json.loads(self.file.read_bytes())
            holder = Holder(values["host"], values["pid"], values["time"])
            if [type(value) for value in asdict(holder).values()] != [str, int, str]:
                raise TypeError("a value has the wrong type")
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, LookupError, RecursionError) as e:
            damage = f"does not say which process holds it ({e}): damaged file"
            raise CheckpointError(f"{self.file}: {damage}; if no run uses {self.file.parent}, remove it") from e
        return holder

    def _write(self, mine: Holder) -> None:
        try:
            stream = self.file.open("x", encoding="utf-8")
        except FileExistsError:  # a run on another host was faster
            raise self._in_use(self._read(), "wait until that process has ended, or end it") from None
        try:
            with stream:
                json.dump(asdict(mine), stream, indent=2)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:  # such as a full disk: no record may stay that nobody holds
            self.file.unlink(missing_ok=True)
            raise

    def _in_use(self, holder: Holder | None, remedy: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.parent} is in use by {holder or f'a process that has locked {self._kernel_file}'}, and two runs in "
            f"one job.dump_folder destroy each other's steps; give this run another one, or {remedy}"
        )
