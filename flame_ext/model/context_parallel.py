"""Context parallelism: a rank has a part of each sequence's queries, and gathers the keys and values of all of it.

Llama 3 was trained so (https://arxiv.org/abs/2407.21783, section 3.3.2). Unlike torchtitan's ring it needs only a mask.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchtitan.distributed.context_parallel import cp_shard
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flame_ext.model.attention import BOOLEAN_ATTENTION, mask_problem, supports

LOAD_BALANCERS = ("headtail", None)


def not_context_parallel(config: PreTrainedConfig) -> str | None:
    """Says why a backbone cannot run on a part of the sequence; None if no reason is known.

    :func:`flame_ext.seeding.proof.attention.prove_context_parallel` measures what the rest of its code does with positions.
    """
    if reason := mask_problem(config):
        return reason
    if not supports("attention_backend", config):
        return "its own attention code cannot be exchanged for one that gathers keys and values"
    config = config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(of_kind for of_kind in rope.values() if isinstance(of_kind, dict))):
        if (kind := parameters.get("rope_type")) in ("dynamic", "longrope"):
            return f"its RoPE ({kind!r}) depends on the length of what a rank sees"
    return None


class ContextParallel:
    """Splits sequences of T positions over the ranks of a one-dimensional mesh, n = T / degree each.

    The load balancer "headtail" gives a rank a chunk of the first half and the mirrored one of the second, so that all ranks
    see as many keys; None = chunks in order.
    """

    def __init__(self, mesh: DeviceMesh, load_balancer: str | None) -> None:
        self._mesh, self._load_balancer = mesh, load_balancer
        self._orders: dict[int, Tensor] = {}
        for name in ("sdpa", BOOLEAN_ATTENTION, "flex_attention"):
            AttentionInterface.register(self.attention_name(name), partial(_attend, name, mesh))

    @staticmethod
    def attention_name(name: str) -> str:
        """transformers' name for the attention ``name`` after a gathering of keys and values."""
        return f"flame_ext_gathered_{name}"

    def shard(self, tensor: Tensor) -> Tensor:
        """Cuts (B, T) down to this rank's (B, n)."""
        (part,), _ = cp_shard(self._mesh, (tensor,), None, self._load_balancer)
        return part

    def order(self, seq_len: int) -> Tensor:
        """Returns the (T,) int64 position of each gathered key. Collective on the first call for a length."""
        if seq_len not in self._orders:
            positions = self.shard(torch.arange(seq_len, device=self._mesh.device_type)[None])
            self._orders[seq_len] = self._gathered(positions)[0]
        return self._orders[seq_len]

    def positions(self, seq_len: int) -> Tensor:
        """Returns this rank's (n,) int64 positions."""
        return self.order(seq_len).chunk(self._mesh.size())[self._mesh.get_local_rank()]

    def unshard(self, part: Tensor) -> Tensor:
        """Gathers every rank's (B, n, …) into (B, T, …) in the order of the sequence, without gradient. Collective."""
        gathered = self._gathered(part)
        return gathered[:, self.order(gathered.shape[1]).argsort()]

    def _gathered(self, part: Tensor) -> Tensor:
        return DTensor.from_local(part.detach(), self._mesh, [Shard(1)], run_check=False).full_tensor()


def _attend(
    name: str, mesh: DeviceMesh, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **kwargs: Any
) -> Any:
    """Runs the attention ``name`` of (B, H, n, d) queries over the keys and values of all ranks, by a mask of n rows, T columns."""
    size = key.shape[-1]
    both = DTensor.from_local(torch.cat((key, value), dim=-1), mesh, [Shard(2)], run_check=False)
    # A rank's gradient of all keys is that of its own queries: the backward sums over ranks and cuts out the rank's part.
    gathered = both.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    key, value = gathered[..., :size].contiguous(), gathered[..., size:].contiguous()
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, *mask, **kwargs)
