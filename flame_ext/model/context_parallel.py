"""Context parallelism: a rank has a part of each sequence's queries, and gathers the keys and values of all of it.

The host's way, a ring of causal kernels, knows no windows, no documents and no attention code but its own models'. Here the
mask says everything: it has this rank's positions as rows and all positions as columns, in the order in which they are
gathered (attention does not ask for another). So every backbone that takes a mask at all takes its part of one. Gathering
instead of passing around is what Llama 3 was trained with (https://arxiv.org/abs/2407.21783, section 3.3.2).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchtitan.distributed.context_parallel import cp_shard
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flame_ext.model.attention import BOOLEAN_ATTENTION, mask_problem, supports_attention_backend

LOAD_BALANCERS = ("headtail", None)


def not_context_parallel(config: PreTrainedConfig) -> str | None:
    """Why a backbone can not be right with a part of the sequence; None if nothing speaks against it.

    What else its code does with positions is measured: :func:`flame_ext.seeding.proof.parts.prove_context_parallel`.
    """
    if reason := mask_problem(config):
        return reason
    if not supports_attention_backend(config):
        return "its own attention code can not be exchanged for one that gathers keys and values"
    config = config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(of_kind for of_kind in rope.values() if isinstance(of_kind, dict))):
        if (kind := parameters.get("rope_type")) in ("dynamic", "longrope"):
            return f"its RoPE ({kind!r}) depends on the length of what a rank sees"
    return None


class ContextParallel:
    """The parts of sequences of T positions that the ranks of a mesh have, n = T / degree each.

    Args:
        mesh: one-dimensional.
        load_balancer: ``parallelism.context_parallel_load_balancer``: "headtail" gives a rank one chunk of the first half and
            the opposite one of the second, so that all of them see as many keys; None = chunks in order.
    """

    def __init__(self, mesh: DeviceMesh, load_balancer: str | None) -> None:
        self._mesh = mesh
        self._load_balancer = load_balancer
        self._orders: dict[int, Tensor] = {}
        for name in ("sdpa", BOOLEAN_ATTENTION, "flex_attention"):
            AttentionInterface.register(self.attention_name(name), partial(_attend, name, mesh))

    @staticmethod
    def attention_name(name: str) -> str:
        """What transformers knows an implementation of attention by, that gathers keys and values before."""
        return f"flame_ext_gathered_{name}"

    def shard(self, tensor: Tensor) -> Tensor:
        """(B, T) to this rank's (B, n)."""
        (part,), _ = cp_shard(self._mesh, (tensor,), None, self._load_balancer)
        return part

    def order(self, seq_len: int) -> Tensor:
        """(T,) int64: the position in the sequence of each gathered key. Collective on the first call for a length."""
        if seq_len not in self._orders:
            positions = self.shard(torch.arange(seq_len, device=self._mesh.device_type)[None])
            self._orders[seq_len] = self._gathered(positions, dim=1)[0]
        return self._orders[seq_len]

    def positions(self, seq_len: int) -> Tensor:
        """(n,) int64: those that this rank has."""
        return self.order(seq_len).chunk(self._mesh.size())[self._mesh.get_local_rank()]

    def unshard(self, part: Tensor) -> Tensor:
        """(B, n, …) of every rank to (B, T, …) in the order of the sequence. Collective; no gradient."""
        gathered = self._gathered(part, dim=1)
        return gathered[:, self.order(gathered.shape[1]).argsort()]

    def _gathered(self, part: Tensor, dim: int) -> Tensor:
        return DTensor.from_local(part.detach(), self._mesh, [Shard(dim)], run_check=False).full_tensor()


def _attend(
    name: str,
    mesh: DeviceMesh,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """The attention ``name`` of (B, H, n, d) queries, by a mask of n rows and T columns, over keys and values of all ranks."""
    size = key.shape[-1]
    both = DTensor.from_local(torch.cat((key, value), dim=-1), mesh, [Shard(2)], run_check=False)
    # Each rank has the gradient of its own queries: their sum over ranks, cut again, is that of the part.
    gathered = both.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    key, value = gathered[..., :size].contiguous(), gathered[..., size:].contiguous()
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, attention_mask, **kwargs)
