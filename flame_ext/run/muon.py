"""``optimizer.name = "Muon"``: orthogonal updates of a backbone's matrices, on any layout those of one process; AdamW for the rest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim._muon import (
    DEFAULT_A,
    DEFAULT_B,
    DEFAULT_C,
    DEFAULT_NS_STEPS,
    EPS,
    _zeropower_via_newtonschulz,
)
from torchtitan.tools.logging import logger
from transformers.pytorch_utils import Conv1D

from flame_ext.model.hf_causal_lm import HFCausalLM


class Muon(torch.optim.AdamW):
    """AdamW, except for the groups that have ``muon_momentum``: their updates are those of ``torch.optim.Muon`` with Nesterov.

    Such a matrix W of A x B becomes (1 - lr·decay) W - lr·0.2·√max(A, B)·O (arXiv 2502.16982). O is about the orthogonal factor
    U Vᵀ of M = U S Vᵀ, with M = (1 - μ) g + μ b, b ← μ b + (1 - μ) g, and ``muon_momentum`` μ. The state is b, ``momentum_buffer``.

    O depends on the whole matrix. As many sharded matrices as share a matrix between ranks are gathered one by one, in bfloat16, in
    which torch computes O; each rank computes that of one of them, and sends it to the others. Collective.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every group."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "muon_momentum" not in group]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "muon_momentum" in group:
                self._step_of(group)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's wants a number of steps in the state of every tensor

    def _step_of(self, group: dict[str, Any]) -> None:
        # Matrices of a round are alike in size, so that no rank waits for another.
        trained = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: -p.numel())
        together = defaultdict(list)
        for p in trained:
            together[_sharing(p)].append(p)
        for sharing, matrices in together.items():
            size = 1 if sharing is None else sharing.size()
            for begin in range(0, len(matrices), size):
                of_round = matrices[begin : begin + size]
                updates = (self._update(p, group["muon_momentum"]) for p in of_round)
                for p, factor in zip(of_round, _factors(updates, sharing), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    _local(p).add_(_part(factor, p), alpha=-group["lr"] * (0.2 * math.sqrt(max(p.shape))))

    def _update(self, p: Tensor, momentum: float) -> Tensor:
        state, grad = self.state[p], cast(Tensor, p.grad)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum)


def _sharing(p: Tensor) -> ProcessGroup | None:
    """The ranks between which a matrix is sharded, along the first dimension of its mesh that shards it; None if none does."""
    if not isinstance(p, DTensor):
        return None
    return next((p.device_mesh.get_group(n) for n, placement in enumerate(p.placements) if placement.is_shard()), None)


def _factors(updates: Iterable[Tensor], sharing: ProcessGroup | None) -> Iterator[Tensor]:
    """Returns the orthogonal factor of each matrix, of as many as there are ranks, in bfloat16; each rank computes one."""
    wholes: list[Tensor] = []
    for number, update in enumerate(updates):
        whole, device = update.bfloat16(), update.device
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        # Of the others' matrices nothing is kept but their shape.
        wholes.append(whole if sharing is None or number == sharing.rank() else whole.to("meta"))
    for number, whole in enumerate(wholes):
        if not whole.is_meta:
            wholes[number] = _zeropower_via_newtonschulz(
                whole, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS
            )
    for number, whole in enumerate(wholes):
        factor = torch.empty(whole.shape, dtype=whole.dtype, device=device) if whole.is_meta else whole.contiguous()
        if sharing is not None:
            dist.broadcast(factor, group=sharing, group_src=number)
        yield factor


def _part(factor: Tensor, p: Tensor) -> Tensor:
    """Cuts a whole matrix down to what this rank has of ``p``."""
    if not isinstance(p, DTensor):
        return factor
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return factor[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def take_matrices(optimizer: torch.optim.Optimizer, model: HFCausalLM, momentum: float) -> None:
    """Makes a :class:`Muon` of torchtitan's AdamW, and moves the model's matrices out of its one group into a second one.

    These are the trained weights of the backbone's linear layers, but for the output embedding, and for those of one row or column.
    Embeddings, vectors, stacks of experts, routers with code of their own and heads stay with AdamW; the log says how many.
    """
    optimizer.__class__ = Muon
    (rest,) = optimizer.param_groups
    matrices = {id(p): p for p in _matrices(model)}
    rest["params"] = [p for p in rest["params"] if id(p) not in matrices]
    if matrices:
        optimizer.add_param_group({"params": [*matrices.values()], "muon_momentum": momentum})
    elements = [sum(p.numel() for p in params) for params in (matrices.values(), rest["params"])]
    logger.info(
        f"Muon updates {len(matrices)} matrices of the backbone ({elements[0]:,} elements), AdamW the other {len(rest['params'])} "
        f"tensors ({elements[1]:,} elements)"
    )


def _matrices(model: HFCausalLM) -> Iterator[nn.Parameter]:
    others = [model.get_submodule(name) for name in model.heads]
    others += [output] if (output := model.get_output_embeddings()) is not None else []
    left = {id(p) for module in others for p in module.parameters()}
    for module in model.modules():
        # Not module.weight, which under tensor parallelism may be what the parameter is multiplied as.
        own = dict(module.named_parameters(recurse=False)) if isinstance(module, (nn.Linear, Conv1D)) else {}
        weight = own.get("weight")
        if weight is not None and weight.requires_grad and min(weight.shape) > 1 and id(weight) not in left:
            yield weight
