"""What follows an export, such as an upload: a process for each export, in the order in which they are made, while training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.distributed import describe
from flame_ext.run.child import Child


def _always(_step: int, _is_last: bool) -> bool:
    return True


@dataclass(frozen=True)
class Follower:
    """A command of ``flame-ext`` for each export that is due. A failure is said, and never ends the run."""

    name: str
    """What it does, for messages, such as "upload"; also the folder of its marks."""

    command: Callable[[int, Path], list[str]]
    """Maps the number of a step and the folder of its export to the command's arguments. It has an option ``--end-with``, ends with
    exit code 0 if it is done, and says on the last line of its output what it has done, or of its errors why not."""

    due: Callable[[int, bool], bool] = _always
    """Maps the number of a step, and whether it is the run's last one, to whether its export is followed."""

    target: str = ""
    """What its outcome depends on beside the export: where it changes, what was done for another target is done again."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the process, which otherwise sees no device and uses one core."""


class Followers:
    """Follows the exports in a folder. For one rank; each follower has a thread, so that none waits for another.

    Marks in ``folder/.followed`` say which export, by its identity, a follower is done with: an interrupted run makes up for the
    rest, and nothing is done twice.

    Args:
        identity: maps an export's folder to a text that another export of the same name does not have.
    """

    def __init__(self, followers: list[Follower], folder: Path, identity: Callable[[Path], str]) -> None:
        self._followers, self._folder, self._identity = followers, folder, identity
        self._children = {follower.name: Child() for follower in followers}
        self._threads = {f.name: ThreadPoolExecutor(1, thread_name_prefix=f.name) for f in followers}
        self._jobs: dict[str, Future[None]] = {}
        self._failed: dict[str, list[Path]] = {}  # by follower, since it last succeeded
        self._second: set[str] = set()  # jobs that are tried again
        self._ending = False

    def start(self, export: Path, is_last: bool = False) -> None:
        """Has a complete export followed by all for which it is due and that are not done with it."""
        for follower in self._followers:
            job = _job(follower, export)
            waits = job in self._jobs and not self._jobs[job].done()
            if follower.due(_step(export), is_last) and not waits:
                self._submit(follower, export)

    def waiting(self) -> list[str]:
        """Returns what is being done, or waits for its turn, such as "upload of step-4"."""
        # Asked twice, since one that has just ended may have begun another.
        return self._not_done() or self._not_done()

    def _not_done(self) -> list[str]:
        return [job for job, future in list(self._jobs.items()) if not future.done()]

    def end(self) -> list[str]:
        """Returns what is left to do at the end of the run; behind a failure nothing more is begun, lest the run wait for each."""
        self._ending = True
        return self.waiting()

    def cancel(self) -> None:
        """Ends what is running and starts nothing else; the next run makes up for it."""
        for child in self._children.values():
            child.cancel()
        for thread in self._threads.values():
            thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, follower: Follower, export: Path) -> None:
        with suppress(RuntimeError):  # cancelled meanwhile: the next run makes up for it
            self._jobs[_job(follower, export)] = self._threads[follower.name].submit(self._follow, follower, export)

    def _follow(self, follower: Follower, export: Path) -> None:
        """Runs the command for one export, unless that was done. Never raises: nobody looks."""
        step, job = _step(export), _job(follower, export)
        try:
            mark = self._folder / ".followed" / follower.name / export.name
            marked = f"{self._identity(export)} {follower.target}\n"
            if mark.is_file() and mark.read_text() == marked:
                return
            if self._ending and follower.name in self._failed:
                raise ChildProcessError("not begun, after the failure before")
            outcome = self._children[follower.name].run(follower.command(step, export), job, follower.environment)
            if outcome is None:
                return
            if outcome.code != 0:
                raise ChildProcessError(outcome.last_line)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(marked)
            logger.info(f"{job}: {outcome.last_line}")
            for failed in self._failed.pop(follower.name, []):  # whatever was down is up again
                if (other := _job(follower, failed)) not in self._second:
                    self._second.add(other)
                    self._submit(follower, failed)
        except Exception as e:
            self._failed.setdefault(follower.name, []).append(export)
            reason = str(e) if isinstance(e, ChildProcessError) else describe(e)
            when = (
                "its next start tries again"
                if job in self._second
                else "tries again after a success, or at its next start"
            )
            logger.warning(f"The {job} failed: {reason}; the run goes on, and {when}")


def _step(export: Path) -> int:
    return int(export.name.removeprefix("step-"))


def _job(follower: Follower, export: Path) -> str:
    return f"{follower.name} of {export.name}"


def followers_of(config: FlameJobConfig) -> list[Follower]:
    """Returns what the options ask for."""
    export, found = config.export, []
    if export.upload:
        found.append(
            Follower(
                name="upload",
                command=lambda _, folder: ["upload", str(folder), export.upload],
                target=export.upload,
            )
        )
    if export.push_to_hub:
        place, public = f"hf://{export.push_to_hub}", [] if export.hub_private else ["--public"]
        found.append(
            Follower(
                name="push",
                command=lambda _, folder: ["upload", str(folder), place, *public],
                due=lambda _, is_last: is_last or export.push == "every",
                target=place,
            )
        )
    return found
