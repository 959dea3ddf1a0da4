"""Patches torchtitan 0.2.2, and torch, but not during a step."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


@contextmanager
def trainer_built_with(checkpoint_manager: type) -> Iterator[None]:
    """Patch ``Trainer.__init__``, which calls both by their global names in torchtitan/train.py.

    No option or TrainSpec field names another CheckpointManager; and the warning of ``ensure_pp_loss_visible`` that one rank
    alone knows a pipeline's losses is wrong here. Groups of gloo have one thread from then on.
    """
    import torchtitan.train  # here: the model's files need another function alone

    make_gloo_groups_with_one_thread()
    with (
        mock.patch.object(torchtitan.train, "CheckpointManager", checkpoint_manager),
        mock.patch.object(torchtitan.train, "ensure_pp_loss_visible"),
    ):
        yield


@contextmanager
def profiling_any_device() -> Iterator[None]:
    """Patch ``torch.profiler.profile`` while torchtitan trains: tools/profiling.py asks it for the activity None without a GPU."""
    profile = torch.profiler.profile

    def profile_what_there_is(*, activities: Iterable[Any], **options: Any) -> torch.profiler.profile:
        return profile(activities=[activity for activity in activities if activity is not None], **options)

    with mock.patch.object(torch.profiler, "profile", profile_what_there_is):
        yield


def compile_each_batch_shape() -> None:
    """Has torch.compile compile layers, attention and masks for every batch shape, where it would otherwise make sizes dynamic.

    Kernels for a known size are faster, and DTensors of unknown size cannot always be split. Probe, teacher, student and
    validation have five to seven shapes, with windows twice as many masks, which all layers count as recompilations of one function;
    torchtitan/models/llama3/infra/parallelize.py compiles them one by one.
    """
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def make_gloo_groups_with_one_thread() -> None:
    """Has torch make groups of gloo with one thread for their collectives, where it would take two for each network interface.

    After each collective the threads of a group write its name into one string, without a lock (``ProcessGroupGloo::runLoop``).
    A name of over 15 characters lies on the heap, and where two threads meet it is freed twice: the process aborts, or
    goes on with a broken heap. torch 2.11.0, 2.13.0 and 2.15.0 do so, and pass no options on to gloo.
    """
    if dist.is_gloo_available():
        group: Any = dist.ProcessGroupGloo
        if not hasattr(group.__init__, "__wrapped__"):
            group.__init__ = _with_one_thread(group.__init__)


def _with_one_thread(init: Callable[..., None]) -> Callable[..., None]:
    """Returns the initialisation of a group that sets what torch's own ``init`` does, but for the threads."""
    group: Any = dist.ProcessGroupGloo

    @functools.wraps(init)
    def init_with_one_thread(self: Any, *given: Any, timeout: timedelta | None = None, **others: Any) -> None:
        if timeout is None:  # not torch's call: options are given, or a timeout by its place
            return init(self, *given, **others)
        names = os.environ.get("GLOO_SOCKET_IFNAME", "")
        interfaces = [group.create_device(interface=name) for name in names.split(",")] if len(names) > 1 else []
        options = group._Options()
        for field, value in others.items():
            setattr(options, field, value)
        options._devices, options._timeout, options._threads = interfaces or [group.create_default_device()], timeout, 1
        init(self, *given, options)

    return init_with_one_thread
