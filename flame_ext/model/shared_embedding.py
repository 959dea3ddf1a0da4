"""The input embedding that the first and the last stage of a pipeline both hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flame_ext.model.pipeline import Pipeline, shares_embedding


class SharedEmbedding:
    """One parameter in two places: the same values, since both take the same steps by the same gradient.

    The copy is the last stage's. It is counted nowhere: not in the norm of the gradients, not among the parameters; in a
    checkpoint both go under one name.

    Args:
        pipeline: of this rank.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._group = pipeline.group
        self.weight: nn.Parameter | None = None
        """This rank's; None in between, or if nothing is shared."""
        self.is_copy = pipeline.has_last
        self._peer = pipeline.first_rank if self.is_copy else pipeline.last_rank
        part = pipeline.parts[-1 if self.is_copy else 0]
        if (pipeline.has_first or pipeline.has_last) and shares_embedding(part.whole):
            self.weight = part.get_input_embeddings().weight
        self._require_one_placement()

    def _require_one_placement(self) -> None:
        """Raise on all ranks if the ends have sharded it in different ways; shards of different rows would be added."""
        weight = self.weight
        mine = None if weight is None else (str(getattr(weight, "placements", None)), tuple(weight.shape), weight.dtype)
        found: list[object] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, mine, group=self._group)
        if len(ends := {placement for placement in found if placement is not None}) > 1:
            raise RuntimeError(f"the first and the last stage hold the input embedding differently: {ends}")

    def copies(self) -> list[nn.Parameter]:
        """This rank's parameters that are counted on another rank."""
        return [self.weight] if self.weight is not None and self.is_copy else []

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """On both sides the sum of both gradients. Collective for the two; before the gradients are clipped."""
        weight = self.weight
        if weight is None or not weight.requires_grad:
            return
        if weight.grad is None:  # the last stage only looks embeddings up
            weight.grad = torch.zeros_like(weight)
        local: Tensor = weight.grad
        if isinstance(local, DTensor):  # under tensor parallelism it is placed as the operation before has left it
            placed: Any = weight
            weight.grad = local.redistribute(placed.device_mesh, placed.placements)
            local = weight.grad.to_local()
        other = torch.empty_like(local)
        exchange = [
            dist.P2POp(dist.isend, local, self._peer, self._group),
            dist.P2POp(dist.irecv, other, self._peer, self._group),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        local.add_(other)  # a + b on one side, b + a on the other: the same bits
