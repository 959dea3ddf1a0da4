"""Patches torchtitan 0.2.2, but not during a step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def trainer_built_with(checkpoint_manager: type) -> Iterator[None]:
    """Patch ``Trainer.__init__``, which calls both by their global names in torchtitan/train.py.

    No option or TrainSpec field names another CheckpointManager; and the warning of ``ensure_pp_loss_visible`` that one rank
    alone knows a pipeline's losses is wrong here.
    """
    import torchtitan.train  # here: the model's files need the other function alone

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
