"""Lets one run at a time write to a ``job.dump_folder``. A kernel lock on ``.lock.kernel`` ends with its process, whichever host or
container that was in, if the file system has such locks and its hosts share them. ``.lock`` names the process for people, and its
time of change is the process's heartbeat for hosts that cannot see its kernel lock.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout
from torchtitan.tools.logging import logger

from flame_ext.errors import CheckpointError

LOCK_NAME = ".lock"
_PATIENCE = 1.0  # seconds, in which another process that has the kernel lock has written its record
_BEAT = 5.0  # seconds between two heartbeats
_SILENCE = 30.0  # seconds without a heartbeat after which a process has ended
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Holder:
    """The process that uses the folder, since ``time``."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="microseconds"))
    # Of the kernel, which containers share, and hosts of one name do not.
    boot: str = field(default_factory=lambda: _boot_id())
    # Whether it has the kernel lock, so that whoever gets that one knows that this process has ended.
    kernel: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.time})"


def _boot_id() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else socket.gethostname()


class FolderLock:
    """Keeps a folder, which it creates, for this process. It takes over from a process that has ended. For one rank.

    Args:
        take_over: also takes over from a process that seems to be alive, whose run then ends.
    """

    def __init__(self, folder: Path, take_over: bool = False) -> None:
        self.file, self.take_over = folder / LOCK_NAME, take_over
        self._kernel_file = folder / f"{LOCK_NAME}.kernel"
        # Not of a thread: that of the heartbeats may get what this one releases.
        self._kernel = FileLock(
            self._kernel_file, thread_local=False, fallback_to_soft=False, on_acquired=self._require_in_place
        )
        self._kernel_descriptor = -1
        self._mine: Holder | None = None
        self._lost: str | None = None
        self._folder: int | None = None  # a descriptor
        self._beats: threading.Thread | None = None
        self._end = threading.Event()

    def acquire(self) -> None:
        """Takes the lock; raises a CheckpointError if another process holds it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock_kernel(_PATIENCE)
        except Timeout:
            if not self.take_over:
                raise self._in_use(self._read()) from None
        try:
            before = self._read()
            if not self.take_over:
                self._require_ended(before)
            self._mine = Holder(kernel=self._kernel.is_locked)
            self._write(self._mine, before)
        except CheckpointError:
            self._mine = None
            self._kernel.release()  # but its file stays: a process whose lock this host cannot see may have locked it, too
            raise
        except BaseException:
            self._mine = None
            self._release_kernel()
            raise
        if before is not None:
            logger.warning(f"{self.file}: {before} has ended without releasing it; taken over")
        self._folder = os.open(self.file.parent, os.O_RDONLY)
        self._end.clear()
        self._beats = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._beats.start()

    def release(self) -> None:
        """Removes the lock, if :meth:`acquire` took it and the record is still this process's."""
        self._end.set()
        if self._beats is not None:
            self._beats.join()
        mine, self._mine = self._mine, None
        if mine is None:
            return
        try:
            self._remove(mine)
        except OSError as e:  # such as a folder that is gone: what ends the run is said already
            logger.warning(f"{self.file} cannot be removed: {e}")
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def error(self) -> str | None:
        """Returns why this process must not write to the folder any more; None if it may. Raises nothing: other ranks wait."""
        if self._folder is not None and self._lost is None:
            try:
                if os.path.samestat(os.fstat(self._folder), self.file.parent.stat()):
                    return None
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as e:  # of a file system that may be back at the next heartbeat
                return f"{self.file.parent} cannot be read: {e}"
            self._lost = f"{self.file.parent} was removed while this run was writing to it"
        return self._lost

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Releases the lock if the body, which builds the object that releases it later, fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def _remove(self, mine: Holder) -> None:
        try:
            holder = self._read()
            if holder == mine:
                self.file.unlink(missing_ok=True)
            elif holder is not None:
                logger.warning(f"{self.file} now names {holder}: left to it")
        finally:
            with suppress(Timeout, CheckpointError, OSError):  # a process that was refused may have left its file
                kept = self._kernel.is_locked and self._is_in_place(self._kernel_descriptor)
                if not kept and self.error() is None:  # FileLock would make a folder that is gone
                    self._kernel.release()
                    self._lock_kernel(0)
            self._release_kernel()

    def _lock_kernel(self, timeout: float) -> None:
        """Gets the kernel lock, if the file system has such locks. Raises a Timeout if another process has it."""
        was_there = self._kernel_file.exists()
        try:
            self._kernel.acquire(timeout=timeout)
        except OSError as e:
            if e.errno not in _NO_FLOCK:
                raise
            if not was_there:
                self._kernel_file.unlink(missing_ok=True)

    def _release_kernel(self) -> None:
        try:
            if self._kernel.is_locked and self._is_in_place(self._kernel_descriptor):
                self._kernel_file.unlink(missing_ok=True)
        finally:
            self._kernel.release()

    def _require_in_place(self, descriptor: int) -> None:
        """Refuses a locked file that its last holder has removed since: the next process would lock a new one."""
        if not self._is_in_place(descriptor):
            raise CheckpointError(f"{self.file.parent} was in use until this moment: start again")
        self._kernel_descriptor = descriptor

    def _is_in_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._kernel_file.stat())
        except FileNotFoundError:
            return False

    def _require_ended(self, before: "Holder | str | None") -> None:
        """Raises a CheckpointError if the process of the record is alive: it has a heartbeat, or had one a moment ago and this
        process cannot know better.
        """
        if isinstance(before, Holder) and not before.boot:
            self._require_older_ended(before)
            return
        # If it lived, this process could not have the lock that it had.
        had_lock = isinstance(before, Holder) and before.kernel and before.boot == _boot_id()
        if before is None or (had_lock and self._kernel.is_locked):
            return
        first = self._last_beat()
        if first is not None and first[1] <= _SILENCE:
            logger.warning(f"{self.file}: {before} may be alive; waiting up to {_SILENCE - first[1]:.0f} seconds")
        while first is not None and (last := self._last_beat()) is not None and last[1] <= _SILENCE:
            if last[0] != first[0] or self._read() != before:
                raise self._in_use(self._read())
            time.sleep(_BEAT / 5)

    def _require_older_ended(self, before: Holder) -> None:
        """Raises a CheckpointError unless the process, whose version knew no heartbeat, is known to have ended: on its own host, by
        its lock on ``.lock.HOST``.
        """
        file = self.file.with_name(f"{LOCK_NAME}.{before.host}")
        if before.host == socket.gethostname() and file.is_file():  # it is left by a process that was killed
            with suppress(OSError), FileLock(file, timeout=0, fallback_to_soft=False):
                file.unlink(missing_ok=True)
                return
        raise self._in_use(before)

    def _last_beat(self) -> tuple[float, float] | None:
        """Returns when the last heartbeat was and how many seconds ago, by the clock of the file system; None without a record."""
        probe = self.file.with_name(f"{LOCK_NAME}.{os.getpid()}.{socket.gethostname()}")
        try:
            probe.touch()
            with self.file.open("rb") as stream:  # opened: a network file system then asks its server
                beat = os.fstat(stream.fileno()).st_mtime
            return beat, probe.stat().st_mtime - beat
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while self._lost is None and not self._end.wait(_BEAT):
            try:
                self._keep()
            except OSError as e:  # the next one may succeed
                logger.warning(f"{self.file} cannot be written: {e}")
            except Exception as e:  # such as another's record: who has no heartbeat is taken over from
                self._lost = f"{self.file} cannot be kept any longer: {e}"

    def _keep(self) -> None:
        """One heartbeat, if nothing says that the folder is lost."""
        holder = self._read()
        if holder is not None and holder != self._mine:
            self._lost = f"{self.file} now names {holder}: another run has taken {self.file.parent} over"
        self.error()
        if self._lost is not None or self._mine is None:
            return
        if holder is None:  # someone has removed it
            self._write(self._mine, None)
        os.utime(self.file)
        self._keep_kernel(self._mine)

    def _keep_kernel(self, mine: Holder) -> None:
        """Gets the kernel lock if another had it, there was none, or its file was removed; the record says whether that succeeded."""
        if self._kernel.is_locked and not self._is_in_place(self._kernel_descriptor):
            self._kernel.release()
        if not self._kernel.is_locked:
            with suppress(Timeout, CheckpointError):
                self._lock_kernel(0)
        if mine.kernel != self._kernel.is_locked:
            now = replace(mine, kernel=self._kernel.is_locked)
            self._rewrite(now)
            self._mine = now

    def _read(self) -> Holder | str | None:
        """Returns the process of the record, or what is wrong with the record; None if there is none."""
        try:
            values = json.loads(self.file.read_bytes())
            holder = Holder(
                values["host"], values["pid"], values["time"], values.get("boot", ""), values.get("kernel", False)
            )
            if [type(value) for value in asdict(holder).values()] != [str, int, str, str, bool]:
                raise TypeError("a value has the wrong type")
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
            return f"a process that {self.file} does not name ({e}: damaged file)"
        return holder

    def _write(self, mine: Holder, before: "Holder | str | None") -> None:
        """Replaces the record that is known to be dead; of two processes, one writes the new one."""
        if self._read() != before:
            raise self._in_use(self._read())
        if before is not None or self.file.is_symlink():
            self.file.unlink(missing_ok=True)
        try:
            stream = self.file.open("x", encoding="utf-8")
        except FileExistsError:  # a run on another host was faster
            raise self._in_use(self._read()) from None
        try:
            with stream:
                json.dump(asdict(mine), stream, indent=2)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:  # such as a full disk: no record may stay that nobody holds
            self.file.unlink(missing_ok=True)
            raise

    def _rewrite(self, mine: Holder) -> None:
        """Replaces this process's record in one go."""
        new = self.file.with_name(f"{LOCK_NAME}.new")
        try:
            new.write_text(json.dumps(asdict(mine), indent=2))
            new.replace(self.file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def _in_use(self, holder: Holder | str | None) -> CheckpointError:
        return CheckpointError(
            f"{self.file.parent} is in use by {holder or f'a process that has locked {self._kernel_file}'}, and two runs in "
            "one job.dump_folder destroy each other's steps; give this run another one, or wait until that process has ended, "
            "or end it, or, if it is known to have ended, set checkpoint.take_over_lock = true"
        )
