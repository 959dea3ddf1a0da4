"""The gradients of a step between backward and update: summed, clipped, and dropped where they are not finite."""

import math

import torch
from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import UserError
from flame_ext.model.runner import ModelRunner


class Gradients:
    """Clips the gradients of each step, and counts the steps whose gradient norm is not finite."""

    def __init__(self, runner: ModelRunner, config: FlameJobConfig, parallel_dims: ParallelDims) -> None:
        self._runner, self._parallel_dims = runner, parallel_dims
        # On every rank, before step 1: a pipeline compares the two copies the first time.
        self._copies = {id(p) for p in runner.copies()}
        self._max_norm, self._limit = config.training.max_norm, config.checkpoint.max_nonfinite_steps
        self.norm = 0.0
        """The gradient norm of the latest step, before clipping, over all ranks."""
        self.skipped_steps = 0
        """Steps of this process without an update."""
        self._in_a_row = 0

    def clip(self, step: int) -> float:
        """Clip the gradients of all ranks by their common norm, in place, and return it. Collective; waits for the device.

        If the norm is not finite, no gradient is left: optimizers then leave everything as it is.
        """
        self._runner.finish_gradients()
        parameters = [p for part in self._runner.parts for p in part.parameters()]
        norm = dist_utils.clip_grad_norm_(
            [p for p in parameters if id(p) not in self._copies],
            self._max_norm,
            foreach=True,
            pp_mesh=self._parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self._parallel_dims.ep_enabled,
        )
        if self._copies:
            torch.nn.utils.clip_grads_with_norm_([p for p in parameters if id(p) in self._copies], self._max_norm, norm)
        self.norm = norm.item()  # of all ranks: they decide alike
        if math.isfinite(self.norm):
            self._in_a_row = 0
            return self.norm
        drop_gradients(parameters)
        self._in_a_row += 1
        self.skipped_steps += 1
        logger.warning(
            f"Step {step}: the gradient norm is {self.norm}: no update (skipped so far: {self.skipped_steps})"
        )
        return self.norm

    def require_progress(self, step: int) -> None:
        """Raise a UserError, on all ranks alike, if too many steps in a row, up to ``step``, had no update."""
        if self._in_a_row >= self._limit:
            raise UserError(
                f"the gradient norm was not finite on {self._in_a_row} steps in a row, the last one step {step} "
                "(checkpoint.max_nonfinite_steps): lower optimizer.lr, look at the data of these steps, or continue from an "
                "earlier step with checkpoint.load_step"
            )


def drop_gradients(parameters: list[nn.Parameter]) -> None:
    """Leave no gradient rather than zero, so that no optimizer moves the parameters."""
    for parameter in parameters:
        parameter.grad = None
