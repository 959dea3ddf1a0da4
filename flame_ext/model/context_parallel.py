"""Context parallelism: a rank has a part of each sequence's queries, and gathers the keys and values of all of it.

Llama 3 was trained so (https://arxiv.org/abs/2407.21783, section 3.3.2). Unlike torchtitan's ring it needs only a mask.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchtitan.distributed.context_parallel import cp_shard
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flame_ext.model.attention import BOOLEAN_ATTENTION, mask_problem, supports

LOAD_BALANCERS = ("headtail", None)

# Without the wrappers of _functional_collectives, which wait at once where a layer is compiled, and in the backward.
collectives = torch.ops._c10d_functional
_PIECES = 4  # in which a layer's keys and values travel, or fewer where the number of their heads has not this factor


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


class SequenceParts:
    """Which of a sequence's T positions this rank has: here all of them. :class:`ContextParallel` has n of them, in chunks.

    What is made of tokens alone is known of whole sequences, and cut (:meth:`shard`, :meth:`shard_ahead`). What is made of hidden
    states is known of a rank's positions, and comes from other ranks as far as it is needed (:meth:`following`, :meth:`joined`).
    """

    is_split = False
    mesh: DeviceMesh | None = None
    rank = 0  # of ``ranks`` that share each sequence
    ranks = 1
    chunks = 1  # runs of consecutive positions of a rank

    def order(self, seq_len: int, device: torch.device) -> Tensor:
        """Returns the (T,) int64 positions of all ranks, one rank after the other."""
        return torch.arange(seq_len, device=device)

    def positions(self, seq_len: int, device: torch.device) -> Tensor:
        """Returns this rank's (n,) int64 positions."""
        return self.order(seq_len, device).chunk(self.ranks)[self.rank]

    def places(self, seq_len: int, device: torch.device) -> Tensor:
        """Returns the (T,) int64 places of all positions in :meth:`order`."""
        return self.order(seq_len, device)

    def shard(self, tensor: Tensor) -> Tensor:
        """Cuts (B, T, …) down to this rank's (B, n, …)."""
        return tensor

    def shard_ahead(self, tensor: Tensor, steps: int, fill: int) -> Tensor:
        """Cuts (B, T) to (B, k, c + steps): each of this rank's k chunks of c positions, and what follows; ``fill`` after the end."""
        seq_len = tensor.shape[1]
        begins = self.positions(seq_len, tensor.device).view(self.chunks, -1)
        reach = torch.arange(begins.shape[1] + steps, device=tensor.device)
        return F.pad(tensor, (0, steps), value=fill)[:, begins[:, :1] + reach]

    def following(self, values: Tensor, steps: int) -> Tensor:
        """Maps this rank's (B, n, D) to (B, k, c + steps, D), as :meth:`shard_ahead` does, with zeros after the end.

        Only the ``steps`` positions after each chunk travel; gradients travel back. Collective.
        """
        return F.pad(values, (0, 0, 0, steps)).unsqueeze(1)

    def joined(self, values: Tensor, dim: int = 1) -> Tensor:
        """Gathers a dimension of all ranks' values, in :meth:`order`; gradients come back as sums over ranks. Collective."""
        return values

    def unshard(self, part: Tensor) -> Tensor:
        """Gathers every rank's (B, n, …) into (B, T, …) in the order of the sequence, without gradient. Collective."""
        return part


WHOLE = SequenceParts()
"""Every rank has whole sequences."""


class ContextParallel(SequenceParts):
    """Splits sequences of T positions over the ranks of a one-dimensional mesh, n = T / degree each.

    The load balancer "headtail" gives a rank a chunk of the first half and the mirrored one of the second, so that all ranks
    see as many keys; None = chunks in order.
    """

    is_split = True
    mesh: DeviceMesh

    def __init__(self, mesh: DeviceMesh, load_balancer: str | None) -> None:
        self.mesh, self._load_balancer = mesh, load_balancer
        self.rank, self.ranks, self.chunks = mesh.get_local_rank(), mesh.size(), 2 if load_balancer else 1
        self._orders: dict[int, Tensor] = {}
        self._places: dict[int, Tensor] = {}
        self._halos: dict[tuple[int, int], _Halo] = {}
        group = mesh.get_group().group_name
        for name in ("sdpa", BOOLEAN_ATTENTION, "flex_attention"):
            AttentionInterface.register(self.attention_name(name), partial(_attend, name, self.ranks, group))

    @staticmethod
    def attention_name(name: str) -> str:
        """transformers' name for the attention ``name`` after a gathering of keys and values."""
        return f"flame_ext_gathered_{name}"

    def order(self, seq_len: int, device: torch.device) -> Tensor:
        """As documented above, by torchtitan's function that cuts the inputs. Collective on the first call for a length."""
        if seq_len not in self._orders:
            every = torch.arange(seq_len, device=device)[None]
            (positions,), _ = cp_shard(self.mesh, (every,), None, self._load_balancer)
            self._orders[seq_len] = self.joined(positions)[0]
        return self._orders[seq_len]

    def places(self, seq_len: int, device: torch.device) -> Tensor:
        if seq_len not in self._places:
            self._places[seq_len] = self.order(seq_len, device).argsort()
        return self._places[seq_len]

    def shard(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(1, self.positions(tensor.shape[1], tensor.device))

    def following(self, values: Tensor, steps: int) -> Tensor:
        halo = self._halo(values.shape[1] * self.ranks, steps, values.device)
        sent = values.index_select(1, halo.sent).transpose(0, 1).contiguous()
        travel: Any = funcol.all_to_all_single
        if values.requires_grad and torch.is_grad_enabled():
            travel = funcol.all_to_all_single_autograd
        received = funcol.wait_tensor(travel(sent, halo.received_of, halo.sent_to, self.mesh.get_group()))
        own, nothing = values.index_select(1, halo.own), torch.zeros_like(values[:, :1])
        ahead = torch.cat([received.transpose(0, 1), own, nothing], dim=1).index_select(1, halo.places)
        return torch.cat([part.unflatten(1, (self.chunks, -1)) for part in (values, ahead)], dim=2)

    def joined(self, values: Tensor, dim: int = 1) -> Tensor:
        return joined(values, self.mesh, dim)

    def unshard(self, part: Tensor) -> Tensor:
        gathered = self.joined(part.detach())
        return gathered[:, self.places(gathered.shape[1], part.device)]

    def _halo(self, seq_len: int, steps: int, device: torch.device) -> "_Halo":
        if (seq_len, steps) not in self._halos:
            order = self.order(seq_len, device).tolist()
            self._halos[seq_len, steps] = _halo(order, self.ranks, self.rank, self.chunks, steps, device)
        return self._halos[seq_len, steps]


class _Halo(NamedTuple):
    """What travels so that each chunk has the positions that follow it."""

    sent: Tensor  # (S,) which of this rank's positions, rank by rank
    sent_to: list[int]  # how many of them to each rank
    received_of: list[int]  # how many come from each rank
    own: Tensor  # (O,) which of this rank's positions follow another chunk of its own
    places: Tensor  # (k * steps,) of what follows each chunk, among what is received, then own, then nothing


def _halo(order: list[int], ranks: int, rank: int, chunks: int, steps: int, device: torch.device) -> _Halo:
    """Plans it from the positions of all ranks, which each rank knows of the others."""
    seq_len, count = len(order), len(order) // ranks
    place = {position: at for at, position in enumerate(order)}
    ends = [[order[r * count + (i + 1) * (count // chunks) - 1] for i in range(chunks)] for r in range(ranks)]

    def needed(by: int, of: int) -> list[int]:
        """Which of a rank's own positions another one needs, each once."""
        ahead = {p for end in ends[by] for p in range(end + 1, min(end + 1 + steps, seq_len))}
        return sorted(place[p] - of * count for p in ahead if place[p] // count == of)

    sent = [needed(other, rank) if other != rank else [] for other in range(ranks)]
    received = [needed(rank, other) if other != rank else [] for other in range(ranks)]
    own = needed(rank, rank)
    slots = [of * count + slot for of, every in enumerate(received) for slot in every] + [rank * count + s for s in own]
    found = {order[slot]: at for at, slot in enumerate(slots)}
    places = [found.get(end + 1 + step, len(slots)) for end in ends[rank] for step in range(steps)]

    def on_device(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    counts = [len(every) for every in sent], [len(every) for every in received]
    return _Halo(on_device([slot for every in sent for slot in every]), *counts, on_device(own), on_device(places))


def joined(values: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """Gathers a dimension over the ranks of a mesh, differentiably. Collective."""
    whole = DTensor.from_local(values, mesh, [Shard(dim)], run_check=False).redistribute(placements=[Replicate()])
    # A rank's gradient of all values is that of its own results: the backward sums over ranks and cuts out the rank's part.
    return whole.to_local(grad_placements=[Partial()])


class _Kept(torch.autograd.Function):
    """Returns a tensor as it is; its backward waits for the gradient, which is still on its way (:class:`_Arrived`)."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return collectives.wait_tensor(gradient)


class _Arrived(torch.autograd.Function):
    """Waits for a rank's (n, B, h, k + v) ``part``, gathered to T positions, and returns (B, h, T, k) keys and (B, h, T, v) values.

    Its backward begins to sum their gradients over ranks and to cut out the rank's part, and waits for nothing.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, gathered: Tensor, size: int, ranks: int, group: str) -> tuple[Tensor, Tensor]:
        ctx.ranks, ctx.group = ranks, group
        whole = collectives.wait_tensor(gathered).movedim(0, 2)
        return whole[..., :size], whole[..., size:]

    @staticmethod
    def backward(ctx: Any, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
        gradient = torch.cat((key, value), dim=-1).movedim(2, 0).contiguous()
        return collectives.reduce_scatter_tensor(gradient, "sum", ctx.ranks, ctx.group), None, None, None, None


def _attend(
    name: str,
    ranks: int,
    group: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *mask: Any,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Runs the attention ``name`` of (B, H, n, d) queries over the keys and values of all ranks, by a mask of n rows, T columns.

    Heads attend one by one, so keys and values travel in pieces of some heads: those of the next heads while these attend, and
    in the backward the gradients of these while the next ones are computed.
    """
    pieces = math.gcd(key.shape[1], _PIECES)
    pairs = zip(key.movedim(2, 0).chunk(pieces, dim=2), value.movedim(2, 0).chunk(pieces, dim=2), strict=True)
    parts = [_Kept.apply(torch.cat(pair, dim=-1)) for pair in pairs]
    gathered = [collectives.all_gather_into_tensor(part.detach(), ranks, group) for part in parts]
    sinks = [None] * pieces if s_aux is None else s_aux.chunk(pieces)
    outputs = []
    # The backward runs what was called last first: each sum begins as soon as its piece has its gradients, all waits come at the end.
    for part, whole, queries, of_heads in zip(parts, gathered, query.chunk(pieces, dim=1), sinks, strict=True):
        keys_and_values = _Arrived.apply(part, whole, key.shape[-1], ranks, group)
        given = kwargs if of_heads is None else {**kwargs, "s_aux": of_heads}
        outputs.append(ALL_ATTENTION_FUNCTIONS[name](module, queries, *keys_and_values, *mask, **given)[0])
    return torch.cat(outputs, dim=2), None
