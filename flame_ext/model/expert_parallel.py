"""Expert parallelism: each rank holds some experts of every layer, and sends its tokens to the ranks that hold those they chose.

Each rank has tokens of its own, as in torchtitan/distributed/expert_parallel.py, whose steps these are. The experts' own code
runs on the tokens that have arrived, each of which it sees as a token with a single choice.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchtitan.tools.logging import logger
from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

from flame_ext.model.experts import is_stacked, stacked_experts
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.local_parameters import with_local_parameters


def expert_parallel_problems(model: HFCausalLM, degree: int, shards: int) -> list[str]:
    """Lists the reasons why the experts of a whole model cannot be spread over ``degree`` ranks, with ``shards`` of each by FSDP."""
    where = f"parallelism.expert_parallel_degree = {degree} with {model.architecture}"
    problems = dict.fromkeys(replace_layer_number_by_wildcard(problem) for problem in _problems(model, degree, shards))
    return [f"{where}: {problem}" for problem in problems]  # a problem of every layer is reported once


def _problems(model: HFCausalLM, degree: int, shards: int) -> Iterator[str]:
    experts = stacked_experts(model)
    if not experts:
        yield "no layer holds experts as stacked parameters; set it to 1, and scale with data_parallel_shard_degree (FSDP)"
    for name, module in experts.items():
        if not is_stacked(module) or len(inspect.signature(module.forward).parameters) != 3:
            yield (
                f"{name!r} ({type(module).__name__}) does not hold each expert as a row of its parameters, to be called with tokens, "
                "indices and weights; set it to 1, and scale with data_parallel_shard_degree (FSDP)"
            )
            continue
        count = module.num_experts
        if count % degree:
            yield f"{name!r} has {count} experts, which it does not divide; lower it"
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if _sharded_dim(parameter.shape, degree, shards) is None:
                yield (
                    f"the {count // degree} experts of a rank in '{name}.{key}' {list(parameter.shape)} are to be sharded over {shards} "
                    "ranks, which divide neither them nor the next axis; choose other degrees"
                )


def apply_expert_parallel(model: HFCausalLM, mesh: DeviceMesh, tp_mesh: DeviceMesh | None = None) -> None:
    """Spreads the experts of a model, or a stage of one, on meta over a one-dimensional ``mesh``, in place, a slice a rank.

    The ranks of ``tp_mesh`` have the same tokens, and share them out; to be called before tensor parallelism is applied.
    """
    for module in stacked_experts(model).values():
        module.num_experts = module.num_experts // mesh.size()  # its code is that of the experts which it holds
        parameters = dict(module.named_parameters(recurse=False))
        for name, parameter in parameters.items():
            sharded = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        module_class: Any = type(module)
        dispatched: Any = _with_dispatch(module_class)
        module.__class__ = with_local_parameters(dispatched, tuple(parameters), gradient_is_partial=False)
        module.group, module.tp_mesh = mesh.get_group(), tp_mesh
    logger.info(f"Applied Expert Parallel to the model ({mesh.size()} ranks)")


def placement_of_experts(model: HFCausalLM, mesh: DeviceMesh) -> Callable[[nn.Parameter], Any]:
    """Returns the ``shard_placement_fn`` by which FSDP shards the experts of a rank over ``mesh``, the ranks that have the same.

    ``mesh`` has the dimension "efsdp", with replicas before it under HSDP. One FSDP module then has parameters on two meshes,
    rather than one within another: FSDP's hooks stay outside of layers, which are recomputed and compiled.
    """
    # Private, but how torchtitan does it too; from torch 2.12 on.
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

    ranks = FSDPMeshInfo(mesh, 0) if mesh.ndim == 1 else HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    placements = {}
    for module in model.modules():
        if isinstance(module, DispatchedExperts):
            for parameter in module.parameters(recurse=False):
                dim = _sharded_dim(parameter.shape, module.group.size(), mesh["efsdp"].size())
                assert dim is not None, "preflight refuses these degrees"
                placements[parameter] = ShardPlacementResult(Shard(dim), ranks)
    return placements.get


class DispatchedExperts(nn.Module):
    """Experts of which this rank holds a slice; mixed into the architecture's class by :func:`apply_expert_parallel`."""

    group: dist.ProcessGroup
    tp_mesh: DeviceMesh | None  # of ranks that are called with the same tokens
    num_experts: int  # of this rank

    @torch.compiler.disable  # how many tokens arrive is known on the host, and different in each step
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes the weighted sums of the chosen experts. Collective over the group, and so is its backward.

        Args:
            hidden_states: (N, D), this rank's own tokens.
            top_k_index: (N, K) numbers of experts of the whole layer.
            top_k_weights: (N, K).

        Returns (N, D). Raises ValueError for indices and weights of another shape, or of no expert.
        """
        if top_k_index.shape != top_k_weights.shape:
            raise ValueError(f"experts were chosen with shape {top_k_index.shape}, weighted with {top_k_weights.shape}")
        if self.tp_mesh is None:
            return self._dispatched(hidden_states, top_k_index, top_k_weights)
        # The gradients of slices are gathered again, and a rank takes its slice of the gradient of the whole.
        slices = [
            DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
            .redistribute(placements=[Shard(0)])
            .to_local()
            for tensor in (hidden_states, top_k_index, top_k_weights)
        ]
        part, shape = self._dispatched(*slices), hidden_states.shape
        return DTensor.from_local(
            part.contiguous(), self.tp_mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
        ).full_tensor()

    def _dispatched(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As :meth:`forward`, of tokens that no other rank has."""
        ranks, local = dist.get_world_size(self.group), self.num_experts
        choices = top_k_index.reshape(-1)
        order = torch.argsort(choices, stable=True)  # pairs of token and choice by expert, so by the rank that holds it
        counts = torch.bincount(choices, minlength=ranks * local + 1)
        if len(counts) > ranks * local + 1:
            raise ValueError(f"expert {len(counts) - 1} was chosen, of {ranks * local}")
        # This rank's pairs by rank and expert. The number after the last expert's is none: architectures skip a choice by it.
        counts = counts[:-1].view(ranks, local)
        arriving = _exchange(
            counts, [1] * ranks, [1] * ranks, self.group
        )  # pairs by the rank they come from and expert
        sent, received = torch.stack([counts.sum(1), arriving.sum(1)]).tolist()
        order = order[: sum(sent)]
        tokens = _Exchange.apply(hidden_states[order // top_k_index.shape[1]], received, sent, self.group)
        experts = torch.arange(local, device=choices.device).repeat(ranks)
        experts = experts.repeat_interleave(arriving.view(-1), output_size=sum(received))
        results = _Exchange.apply(self._run(tokens, experts, top_k_weights.dtype), sent, received, self.group)
        # The weights stay on the token's rank, and the sum over a token's choices is in the order of transformers' own.
        of_pairs = results.new_zeros(len(choices), results.shape[1]).index_copy(0, order, results)
        weighted = of_pairs * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _run(self, tokens: Tensor, experts: Tensor, dtype: torch.dtype) -> Tensor:
        """Runs the architecture's code on (M, D) tokens with one choice each, this rank's ``experts`` (M,)."""
        count = len(tokens)
        if count == 0:
            # A token of zeros, whose result is dropped: the backward, and FSDP's in it, is collective on this rank too.
            tokens, experts = tokens.sum(0, keepdim=True), experts.new_zeros(1)
        ones = tokens.new_ones((len(tokens), 1), dtype=dtype)
        return super().forward(tokens, experts.unsqueeze(1), ones)[:count]


@functools.cache  # one class for all layers
def _with_dispatch(cls: Any) -> type[nn.Module]:
    return type(cls.__name__, (DispatchedExperts, cls), {})


def _sharded_dim(shape: torch.Size, degree: int, shards: int) -> int | None:
    """The axis of a stacked parameter that FSDP shards beside the experts: whole experts if they suffice, else the next axis."""
    if shape[0] // degree % shards == 0:
        return 0
    return 1 if shape[1] % shards == 0 else None


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends ``sent[r]`` rows to each rank r, which has ``received[r]`` for this one."""
    pending = torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), received, sent, group.group_name)
    return torch.ops._c10d_functional.wait_tensor(pending)


class _Exchange(torch.autograd.Function):
    """:func:`_exchange`, whose backward sends the gradients back. The result has been waited for, which kernels do not do."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchange(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _exchange(gradients[0], ctx.sent, ctx.received, ctx.group), None, None, None
