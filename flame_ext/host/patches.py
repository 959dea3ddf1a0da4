"""Patches torchtitan 0.2.2, but not during a step."""

from collections.abc import Iterator
from contextlib import contextmanager
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


def compile_each_batch_shape() -> None:
    """Has torch.compile compile the layers for every batch shape, where it would otherwise make sizes dynamic.

    DTensors of unknown size cannot always be split. Probe, teacher, student and validation have five to seven shapes, which all
    layers count as recompilations of one function; torchtitan/models/llama3/infra/parallelize.py compiles them one by one.
    """
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
