"""Pipeline parallelism: the schedules that run micro-batches through the stages of :mod:`flame_ext.model.pipeline_stages`."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleGPipe, ScheduleLoopedBFS
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import LossFunction
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.distributed import gathered
from flame_ext.host.names import BaseModelArgs, ParallelizeFunction, build_pipeline_schedule
from flame_ext.model.freezing import freeze_parameters
from flame_ext.model.hf_causal_lm import HFCausalLM, LossOutput, Stage
from flame_ext.model.pipeline_stages import layers_of_stages, shares_embedding, stage_of
from flame_ext.model.runner import ModelRunner, StageInputs, sum_of_parts


class _Stage(PipelineStage):
    """torch's stage with keyword arguments made for each micro-batch, since torch can only cut tensors by sequences."""

    inputs_of: Callable[[int], dict[str, Any]]
    outputs: list[Any]
    dtype: torch.dtype

    def forward_one_chunk(self, fwd_chunk_id: int, args: Any, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        return super().forward_one_chunk(fwd_chunk_id, args, self.inputs_of(fwd_chunk_id), *more, **options)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Keeps what the last stage returned, which can be of any kind and shape, and gives torch a scalar."""
        output = super().forward_maybe_with_nosync(*args, **kwargs)
        if not self.is_last:
            if output.dtype != self.dtype:  # newer versions of torch do not check, and the next stage would read noise
                raise TypeError(f"hidden states of a stage are {output.dtype}, the next one expects {self.dtype}")
            return output.contiguous()
        self.outputs.append(LossOutput(output.loss.detach(), output.parts) if self.has_backward else output)
        return output.loss if self.has_backward else torch.zeros((), device=self.device)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)


class Pipeline(ModelRunner):
    """Runs this rank's parallelised stages, by schedules that all ranks of a pipeline run together.

    The first and the last stage may both hold the input embedding. The copies take the same steps by the same gradient; the
    last stage's counts neither in the norm of gradients nor as parameters, and checkpoints hold both under one name.
    """

    group: dist.ProcessGroup

    def __init__(
        self, parts: list[HFCausalLM], parallel_dims: ParallelDims, config: FlameJobConfig, device: torch.device
    ) -> None:
        super().__init__(parts, parallel_dims)
        self.group, self._config, self._device = parallel_dims.get_mesh("pp").get_group(), config, device
        self._replicas = None
        if parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled:
            self._replicas = parallel_dims.get_mesh("dp_replicate").get_group()
        self.has_first, self.has_last = parts[0].stage.is_first, parts[-1].stage.is_last
        ranks = dist.get_process_group_ranks(self.group)
        self._first_rank, self._last_rank = ranks[0], ranks[-1]  # of the first and the last stage
        training = config.training
        # The dtype of the hidden states: under pipeline parallelism there is no mixed precision but FSDP's.
        mixed = isinstance(parts[0], FSDPModule)
        self._dtype = TORCH_DTYPE_MAP[training.mixed_precision_param if mixed else training.dtype]
        length = training.seq_len // parts[0].context.ranks  # of sequences on a rank
        self._stages = self._build_stages(config.parallelism.pipeline_parallel_microbatch_size, length)
        # The last stage's forward computes the loss itself, since FSDP gathers the heads only while it runs.
        self._schedule = build_pipeline_schedule(config, self._stages, lambda output, _target: output)
        self._forward_only: dict[tuple[int, int, int], tuple[Any, list[_Stage]]] = {}

    def losses(self, inputs: Tensor, inputs_of: StageInputs) -> LossOutput:
        count = len(inputs) // self._config.parallelism.pipeline_parallel_microbatch_size
        found: list[Tensor] = []
        self._run(self._schedule, self._stages, inputs, count, inputs_of, losses=found)
        loss = torch.stack(found).sum().detach() if found else torch.zeros((), device=self._device)
        dist.all_reduce(loss, group=self.group)
        return LossOutput(loss, sum_of_parts(self._stages[-1].outputs))

    def backward(self, loss: Tensor) -> None:
        """Does nothing: the schedule has run it."""

    @torch.no_grad()
    def forward(self, inputs: Tensor, inputs_of: StageInputs) -> list[Any] | None:
        size = min(len(inputs), self._config.parallelism.pipeline_parallel_microbatch_size)
        size = next(n for n in range(size, 0, -1) if len(inputs) % n == 0)
        count, seq_len = len(inputs) // size, inputs.shape[1]
        if (count, size, seq_len) not in self._forward_only:
            stages = self._build_stages(size, seq_len)
            single = len(stages) == 1
            schedule: Any = ScheduleGPipe(stages[0], count) if single else ScheduleLoopedBFS([*stages], count)
            self._forward_only[count, size, seq_len] = schedule, stages
        schedule, stages = self._forward_only[count, size, seq_len]
        self._run(schedule, stages, inputs, count, inputs_of)
        outputs = stages[-1].outputs
        for stage in stages:
            stage.clear_runtime_states()
            stage.outputs = []
        return outputs if self.has_last else None

    def cuts(self, batch: int) -> bool:
        return batch > self._config.parallelism.pipeline_parallel_microbatch_size

    def from_last(self, value: Any) -> Any:
        described = (value.shape, value.dtype) if isinstance(value, Tensor) else value
        found = gathered(described, in_step=True)[self._last_rank]
        if not (isinstance(found, tuple) and isinstance(found[0], torch.Size)):
            return found
        shared = value.contiguous() if self.has_last else torch.empty(found[0], dtype=found[1], device=self._device)
        dist.broadcast(shared, src=self._last_rank, group=self.group)
        return shared

    def copies(self) -> list[nn.Parameter]:
        return [] if self._shared is None or not self.has_last else [self._shared]

    def finish_gradients(self) -> None:
        if self._replicas is not None:  # DDP cannot follow a pipeline, which runs many forwards before a backward
            grads: list[Any] = [p.grad for part in self.parts for p in part.parameters() if p.grad is not None]
            local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
            for work in [dist.all_reduce(grad, group=self._replicas, async_op=True) for grad in local]:
                work.wait()
        if self._shared is not None and self._shared.requires_grad:
            self._exchange_gradients(self._shared)

    def norm_over_stages(self, norm: Tensor) -> Tensor:
        square = norm**2
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    @cached_property
    def _shared(self) -> nn.Parameter | None:
        """This rank's copy of an input embedding that both ends hold. Collective the first time, once it is allocated.

        Raises on all ranks if the two are sharded differently, since shards of different rows would be added.
        """
        weight = mine = None
        if (self.has_first or self.has_last) and shares_embedding(self.model.whole):
            weight = self.parts[-1 if self.has_last else 0].get_input_embeddings().weight
            mine = str(getattr(weight, "placements", None)), tuple(weight.shape), weight.dtype
        found = gathered(mine)
        if len(ends := {placement for placement in found if placement is not None}) > 1:
            raise RuntimeError(f"the first and the last stage hold the input embedding differently: {ends}")
        return weight

    @torch.no_grad()
    def _exchange_gradients(self, weight: nn.Parameter) -> None:
        """Adds the gradient of the other copy. Collective for the two ranks."""
        if weight.grad is None:  # the last stage may only look embeddings up
            weight.grad = torch.zeros_like(weight)
        local: Tensor = weight.grad
        if isinstance(local, DTensor):  # under tensor parallelism its placement is that of the last operation
            placed: Any = weight
            weight.grad = local.redistribute(placed.device_mesh, placed.placements)
            local = weight.grad.to_local()
        peer, other = self._first_rank if self.has_last else self._last_rank, torch.empty_like(local)
        exchange = [dist.P2POp(dist.isend, local, peer, self.group), dist.P2POp(dist.irecv, other, peer, self.group)]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        local.add_(other)  # a + b on one side, b + a on the other: the same bits

    def _run(
        self,
        schedule: Any,
        stages: list[_Stage],
        inputs: Tensor,
        count: int,
        inputs_of: StageInputs,
        losses: list[Tensor] | None = None,
    ) -> None:
        size = len(inputs) // count
        for stage in stages:
            stage.inputs_of = lambda chunk: inputs_of(slice(chunk * size, (chunk + 1) * size))
            stage.outputs = []
        tokens = [inputs] if self.has_first else []
        trained = {"target": inputs, "losses": losses} if self.has_last and losses is not None else {}
        schedule.step(*tokens, **trained, return_outputs=False)

    def _build_stages(self, size: int, seq_len: int) -> list[_Stage]:
        """Builds stages with all shapes given, so that torch does not run a forward and backward to infer them."""
        hidden_size = self.parts[0].config.get_text_config().hidden_size
        tokens = torch.empty(size, seq_len, dtype=torch.int64, device="meta")
        hidden = torch.empty(size, seq_len, hidden_size, dtype=self._dtype, device="meta", requires_grad=True)
        scalar = torch.empty((), device="meta", requires_grad=True)
        stages = []
        for part in self.parts:
            place = part.stage
            given, returned = tokens if place.is_first else hidden, scalar if place.is_last else hidden
            stages.append(_Stage(part, place.index, place.count, self._device, given, returned, group=self.group))
            stages[-1].dtype = self._dtype
        return stages


def pipeline_hf_causal_lm(
    model: HFCausalLM,
    parallel_dims: ParallelDims,
    job_config: FlameJobConfig,
    device: torch.device,
    model_args: BaseModelArgs,
    parallelize_fn: ParallelizeFunction,
    loss_fn: LossFunction,
) -> tuple[Pipeline, list[HFCausalLM], bool, bool]:
    """Builds this rank's stages and the :class:`Pipeline` that runs them; the ``pipelining_fn`` of the TrainSpec."""
    mesh = parallel_dims.get_mesh("pp")
    freeze_parameters(model, job_config.training.freeze)
    stages = layers_of_stages(job_config.parallelism, len(model.layers))
    parts = []
    for index in range(mesh.get_local_rank(), len(stages), mesh.size()):
        part = stage_of(model, Stage(index, len(stages)), stages[index])
        layers = f"{stages[index][0]} to {stages[index][-1]}" if stages[index] else "none"
        logger.info(f"Stage {index} of {len(stages)}: layers {layers}")
        parts.append(parallelize_fn(part, parallel_dims, job_config))
    pipeline = Pipeline(parts, parallel_dims, job_config, device)
    return pipeline, parts, pipeline.has_first, pipeline.has_last
