"""Shares objects among all ranks, and raises an error of one rank on all of them, with the same message."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flame_ext.errors import CheckpointError, UserError

T = TypeVar("T")

_TIMEOUT = timedelta(days=1)  # how long one rank may work on files, such as a download, while the others wait
_group: dist.ProcessGroup | None = None
_step_group: dist.ProcessGroup | None = None


def make_groups(step_timeout: timedelta) -> None:
    """Makes the groups that objects, and the flags of a step, are shared by from now on, beside the device's. Collective.

    The default group's timeout is made for steps; and a collective on it would have the host wait for the device.
    """
    global _group, _step_group
    if dist.get_world_size() > 1:
        # That a rank does not come to this is to be noticed sooner.
        _group = _all_ranks(step_timeout)
        dist.distributed_c10d._set_pg_timeout(_TIMEOUT, _group)
        _step_group = None if dist.get_backend() == "gloo" else _all_ranks(step_timeout)


def _all_ranks(timeout: timedelta) -> dist.ProcessGroup:
    group: Any = dist.new_group(backend="gloo", timeout=timeout)  # an integer only on ranks that it leaves out
    return group


def set_step_timeout(timeout: timedelta) -> None:
    """Sets how long ranks wait for each other's flags from now on, as torchtitan does for its own groups after the first step."""
    if _step_group is not None:
        dist.distributed_c10d._set_pg_timeout(timeout, _step_group)


def object_group() -> dist.ProcessGroup | None:
    """Return the group of all ranks for collectives of objects; None is the default group, where no other has been made."""
    return _group


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_rank() -> bool:
    """Return whether this process writes the files that a run has once."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def failing_together(error_type: type[UserError]) -> Iterator[None]:
    """Run the body, which must not contain collectives; leaving it is a collective.

    Raises ``error_type`` on all ranks if the body raised on any, with the first one's message, and this rank's exception as cause.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:  # of any type: the other ranks have to know before it is raised
        error = e
    messages = gathered(None if error is None else describe(error))
    for rank, message in enumerate(messages):
        if message is not None:
            where = f"[rank {rank}] " if len(messages) > 1 and any(m != message for m in messages) else ""
            raise error_type(where + message) from error


def on_main_rank(action: Callable[..., T], *arguments: Any) -> T | None:
    """Calls ``action`` on the main rank alone; if it fails, raises a CheckpointError on all ranks. Collective."""
    result = None
    with failing_together(CheckpointError):
        if is_main_rank():
            result = action(*arguments)
    return result


def from_main_rank(value: T) -> T:
    """Returns the main rank's value on all ranks, by way of pickle. Collective."""
    values = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0, group=_group)
    return values[0]


def gathered(value: T, in_step: bool = False) -> list[T]:
    """Return the values of all ranks, by rank and by way of pickle; ``in_step`` with the timeout of a step. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_step_group if in_step else _group)
    return values


def any_rank(flags: Iterable[bool]) -> list[bool]:
    """Return, for each of a step's flags, whether it is set on any rank. Collective, between hosts; no device is waited for."""
    combined = torch.tensor([*flags], dtype=torch.uint8)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(combined, op=dist.ReduceOp.MAX, group=_step_group)
    return [bool(flag) for flag in combined.tolist()]


def lost_rank(error: RuntimeError) -> str | None:
    """Return the last line of an exception that a collective raises where another rank has ended or stands still, else None."""
    # gloo raises plain RuntimeErrors, which name its source files.
    is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    return f"{error}".strip().splitlines()[-1] if is_lost else None


def describe(error: BaseException) -> str:
    """Return the message of an exception, with its type unless it is a :class:`UserError`."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
