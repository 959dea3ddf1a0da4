"""Ranks that fail together: an error on one rank is raised on all of them, at once and with its own words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from flame_ext.errors import UserError


def is_main_rank() -> bool:
    """Whether this process writes the files that exist once per run."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def failing_together(error_type: type[UserError], group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the body on every rank; if it fails anywhere, raise ``error_type`` everywhere with the first rank's message.

    The body must not contain collectives: a rank that fails in the middle would leave the others waiting in them.
    Leaving the context is a collective over ``group``, which has to hold all ranks (default: the default group).

    Raises:
        error_type: on all ranks, when the body raised on any. The exception of the rank itself is its ``__cause__``.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:  # every kind: the other ranks have to hear of it before it is raised
        error = e
    messages: list[str | None] = [None] if error is None else [describe(error)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, messages[0], group=group)
        messages = gathered
    for rank, message in enumerate(messages):
        if message is not None:
            where = f"[rank {rank}] " if len(messages) > 1 and any(m != message for m in messages) else ""
            raise error_type(where + message) from error


def describe(error: BaseException) -> str:
    """The message of a user's error alone; the type as well for any other."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
