"""``optimizer.name = "Muon"``: orthogonal updates of a backbone's matrices, on any layout those of one process; AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim._muon import (
    DEFAULT_A,
    DEFAULT_B,
    DEFAULT_C,
    DEFAULT_NS_STEPS,
    EPS,
    _adjust_lr,
    _zeropower_via_newtonschulz,
)
from torchtitan.tools.logging import logger

from flame_ext.model.hf_causal_lm import HFCausalLM


class Muon(torch.optim.AdamW):
    """AdamW, except for the groups that have ``muon_momentum``: their updates are those of ``torch.optim.Muon`` with Nesterov.

    Such a matrix is W ← (1 - lr·decay) W - lr·s·O, where O is about the orthogonal factor U Vᵀ of the update M = U S Vᵀ,
    M = (1 - μ) g + μ b and b ← μ b + (1 - μ) g; μ is ``muon_momentum``, s the factor of ``muon_adjust_lr`` (sources in
    ``torch.optim.Muon``). Its state is one tensor of its size, ``momentum_buffer``.

    O depends on the whole matrix, so that of a sharded one is gathered, in bfloat16, in which torch computes O. The ranks along
    the first dimension of its mesh take turns with computing, and send O to each other. Collective.
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
        trained = [p for p in group["params"] if p.grad is not None]
        for number, p in enumerate(trained):
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
            buffer.lerp_(p.grad, 1 - group["muon_momentum"])
            update = _orthogonal(p.grad.lerp(buffer, group["muon_momentum"]), number)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            _local(p).add_(update, alpha=-_adjust_lr(group["lr"], group["muon_adjust_lr"], p.shape))


def _orthogonal(update: Tensor, turn: int) -> Tensor:
    """Returns this rank's part of the orthogonal factor of a matrix, computed by the rank whose ``turn`` it is."""
    if not isinstance(update, DTensor):
        return _factor(update)
    mesh, whole = update.device_mesh, cast(DTensor, update.bfloat16()).full_tensor()
    owner = turn % mesh.size(0)
    # contiguous(): of a tall matrix torch returns a transpose, which no broadcast takes.
    factor = _factor(whole).contiguous() if mesh.get_local_rank(0) == owner else torch.empty_like(whole)
    dist.broadcast(factor, group=mesh.get_group(0), group_src=owner)
    shape, offset = compute_local_shape_and_global_offset(update.shape, mesh, update.placements)
    return factor[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]


def _factor(update: Tensor) -> Tensor:
    return _zeropower_via_newtonschulz(update, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def take_matrices(optimizer: torch.optim.Optimizer, model: HFCausalLM, momentum: float, adjust_lr: str) -> None:
    """Makes a :class:`Muon` of torchtitan's AdamW, and moves the model's matrices out of its one group into a second one.

    These are the trained matrices of the backbone, without embeddings, of tokens or positions, and the output embedding. Heads,
    vectors and stacks of experts, which torch's Muon does not take either, stay with AdamW; the log says how many elements are whose.
    """
    optimizer.__class__ = Muon
    (rest,) = optimizer.param_groups
    matrices = {id(p): p for p in _matrices(model)}
    rest["params"] = [p for p in rest["params"] if id(p) not in matrices]
    group = {"params": [*matrices.values()], "muon_momentum": momentum, "muon_adjust_lr": adjust_lr}
    if matrices:
        optimizer.add_param_group(group)
    elements = [sum(p.numel() for p in params) for params in (matrices.values(), rest["params"])]
    stacked = sum(p.ndim > 2 for p in rest["params"])
    beside = f" ({stacked} of them stacks of experts)" if stacked else ""
    logger.info(
        f"Muon updates {len(matrices)} matrices of the backbone ({elements[0]:,} elements), AdamW the other {len(rest['params'])} "
        f"tensors{beside} ({elements[1]:,} elements)"
    )


def _matrices(model: HFCausalLM) -> Iterable[nn.Parameter]:
    others: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    others += [model.get_submodule(name) for name in model.heads]
    others += [output] if (output := model.get_output_embeddings()) is not None else []
    left = {id(p) for module in others for p in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in left]
