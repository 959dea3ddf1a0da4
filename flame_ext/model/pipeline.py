"""Pipeline parallelism: the model in stages, and the schedules that run micro-batches through them.

Which layers lie on which stage is the host's arithmetic, which modules begin and end the model is transformers' own pipeline
plan. A stage is the whole model with the layers of other stages passed over: positions in the list of layers, and so
parameter names, layer types and masks, stay what they are, and each architecture's own ``forward`` runs on every stage.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    ScheduleGPipe,
    ScheduleLoopedBFS,
    get_schedule_class,
)
from torchtitan.components.loss import LossFunction
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.config.job_config import Parallelism
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import build_pipeline_schedule, generate_llm_fqn_per_model_part
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import ParallelizeFunction
from torchtitan.tools.logging import logger

from flame_ext.errors import ConfigError
from flame_ext.model.hf_causal_lm import HFCausalLM, Stage

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B")
"""Of torch's, those whose stages lie on the ranks in turn and whose backward is one piece."""

# What the host calls the modules around the layers.
_HOST_NAMES = ("tok_embeddings", "norm", "output")

StageInputs = Callable[[slice], dict[str, Any]]
"""Rows of the batch to what a stage's forward gets for them beside tokens or hidden states."""


# -- which stage has what ------------------------------------------------------------------------------------------------


def layers_of_stages(parallelism: Parallelism, num_layers: int) -> list[list[int]]:
    """Numbers of the decoder layers of each stage, by the host's options and arithmetic.

    Raises:
        ConfigError: they make no pipeline.
    """
    degree, per_stage = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_layers_per_stage
    first_less = parallelism.pipeline_parallel_first_stage_less_layers
    last_less = parallelism.pipeline_parallel_last_stage_less_layers
    single = _one_stage_a_rank(parallelism.pipeline_parallel_schedule)
    if parallelism.module_fqns_per_model_part is not None:
        stages = _layers_by_name(parallelism.module_fqns_per_model_part, num_layers)
        option = "module_fqns_per_model_part"
    else:
        count, option = degree * (1 if single else 2), "pipeline_parallel_degree"
        if per_stage is not None:
            option = "pipeline_parallel_layers_per_stage"
            if per_stage < 1:
                raise ConfigError(f"parallelism.{option} must be >= 1, got {per_stage}")
            count = math.ceil((num_layers + first_less + last_less) / per_stage)
        try:
            names = generate_llm_fqn_per_model_part(count, num_layers, first_less, last_less)
        except ValueError as e:
            raise ConfigError(
                f"parallelism.{option} gives {count} stages for a model of {num_layers} layers "
                f"(pipeline_parallel_first_stage_less_layers {first_less}, last {last_less}): {e}"
            ) from e
        stages = _layers_by_name(names, num_layers)
    per_rank = len(stages) / degree
    if (per_rank != 1) if single else (per_rank < 2 or per_rank % 1):
        needed = "one stage for each rank" if single else "at least two stages for each rank, as many for each"
        raise ConfigError(
            f"parallelism.{option} gives {len(stages)} stages on {degree} ranks; pipeline_parallel_schedule "
            f"{parallelism.pipeline_parallel_schedule!r} needs {needed}"
        )
    return stages


def _one_stage_a_rank(schedule: str) -> bool:
    return issubclass(get_schedule_class(schedule), PipelineScheduleSingle)


def _layers_by_name(stages: Sequence[Sequence[str]], num_layers: int) -> list[list[int]]:
    """``[["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]`` to ``[[0], [1]]``."""
    last_words = [[name.rpartition(".")[2] for name in names] for names in stages]
    numbers = [[int(word) for word in words if word.isdigit()] for words in last_words]
    others = {word for words in last_words for word in words if not word.isdigit()}
    if [n for names in numbers for n in names] != list(range(num_layers)) or not others <= set(_HOST_NAMES):
        raise ConfigError(
            f"parallelism.module_fqns_per_model_part must hold layers.0 to layers.{num_layers - 1} in order, each once, and "
            f"beside them at most {', '.join(_HOST_NAMES)}, got {[list(names) for names in stages]}"
        )
    empty = next((i for i, names in enumerate(numbers[1:-1], start=1) if not names), None)
    if empty is not None:
        raise ConfigError(f"parallelism.module_fqns_per_model_part: stage {empty} has no layer")
    return numbers


@dataclass(frozen=True)
class PipelinePlan:
    """A backbone's own plan (``base_model_pp_plan``), by names of its children."""

    before: list[str]
    """What lies before the layers: the embedding, and what is applied to it."""
    layers: str
    """The list of decoder layers."""
    after: list[str]
    """What lies after them."""


def pipeline_plan(model: HFCausalLM) -> PipelinePlan | None:
    """None if transformers has none for this architecture."""
    base = model.base_model
    names = list(getattr(base.config, "base_model_pp_plan", None) or {})
    lists = [i for i, name in enumerate(names) if isinstance(base.get_submodule(name), nn.ModuleList)]
    if len(lists) != 1:
        return None
    (at,) = lists
    return PipelinePlan(names[:at], names[at], names[at + 1 :])


@torch.no_grad()
def not_pipelined(model: HFCausalLM) -> str | None:
    """Why the layers of this backbone can not be spread over stages; None if nothing speaks against it.

    A stage hands its hidden states on as the next one's input embeddings. So the backbone without all that its plan names
    has to give back its input embeddings, to the last bit: whatever else it does to them would be done once by each stage.

    Args:
        model: its parameters may be on meta.
    """
    if pipeline_plan(model) is None:
        return "transformers has no pipeline plan for it (base_model_pp_plan)"
    nothing = stage_of(model, Stage(1, 3), [])
    left = [name for name, _ in nothing.base_model.named_parameters()]
    if left:
        return f"its pipeline plan leaves out {', '.join(left[:3])}"
    states = torch.randn(1, 8, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    try:
        unchanged = torch.equal(states, nothing(states))
    except Exception as e:  # an architecture's own code, which may need what a stage does not have
        return f"its forward does not run without embedding and layers ({type(e).__name__}: {str(e)[:200]})"
    return (
        None if unchanged else "its forward does more to hidden states than its layers do, and every stage would do it"
    )


# -- a stage of the model ------------------------------------------------------------------------------------------------


class PassedOver(nn.Module):
    """In the place of a layer that lies on another stage."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """(B, T, D), as they are."""
        return hidden_states


class StageLayers(nn.ModuleList):
    """The list of all layers on one stage. Its children are this stage's own; iterated over, the others are passed over."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """What checkpointing, compilation and sharding are applied to."""
        return (child for child in super().named_children() if not isinstance(child[1], PassedOver))


def stage_of(whole: HFCausalLM, stage: Stage, layers: Sequence[int]) -> HFCausalLM:
    """A copy of the model, on meta, of which one stage is left.

    The heads lie on the last stage, and there the input embedding lies as well where the output embedding is tied to it or
    the action layer looks candidates up in it (:class:`flame_ext.model.shared_embedding.SharedEmbedding`).

    Args:
        whole: with its heads; left as it is.
        stage: which one.
        layers: numbers of its layers.
    """
    plan = pipeline_plan(whole)
    assert plan is not None, "refused by preflight/checks.py"
    model = copy.deepcopy(whole)
    base = model.base_model
    embedding = model.get_input_embeddings()
    shared = stage.is_last and shares_embedding(whole)
    for name in plan.before:
        if not stage.is_first and not (shared and base.get_submodule(name) is embedding):
            base.set_submodule(name, nn.Identity())
    for name in plan.after if not stage.is_last else ():
        base.set_submodule(name, nn.Identity())
    own = set(layers)
    base.set_submodule(
        plan.layers,
        StageLayers(layer if i in own else PassedOver() for i, layer in enumerate(base.get_submodule(plan.layers))),
    )
    if not stage.is_last:
        for name in model.head_names:
            delattr(model, name)
        model.head_names, model.head_optimization = [], {}
        for name, child in list(model.named_children()):
            if child is not base:
                setattr(model, name, nn.Identity())
    model.stage, model.of_whole = stage, (whole,)
    model.remember_state()
    return model


def shares_embedding(whole: HFCausalLM) -> bool:
    """Whether the last stage needs the input embedding as well."""
    return whole.get_input_embeddings() in whole.tied_modules or "action_layer" in whole.head_names


# -- running it ----------------------------------------------------------------------------------------------------------


class _Stage(PipelineStage):
    """torch's stage, which is told what to compute for each micro-batch.

    torch cuts keyword arguments into micro-batches along their first dimension; masks that all sequences share, and
    functions, have none.
    """

    inputs_of: Callable[[int], dict[str, Any]]
    outputs: list[Any]
    dtype: torch.dtype

    def forward_one_chunk(self, fwd_chunk_id: int, args: Any, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        return super().forward_one_chunk(fwd_chunk_id, args, self.inputs_of(fwd_chunk_id), *more, **options)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """What a forward alone gives can be of any kind and shape: torch gets a scalar instead, as in training."""
        output = super().forward_maybe_with_nosync(*args, **kwargs)
        if not self.is_last:
            if output.dtype != self.dtype:  # torch's newer versions do not look, and the next stage would read noise
                raise TypeError(f"hidden states of a stage are {output.dtype}, the next one expects {self.dtype}")
            return output.contiguous()
        if self.has_backward:
            return output
        self.outputs.append(output)
        return torch.zeros((), device=self.device)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)


class Pipeline:
    """This rank's stages, and the schedules that all ranks of a pipeline run together.

    Args:
        parts: the stages of this rank, parallelised.
        mesh: of the ranks of a pipeline.
        config: of the job.
        device: of the parts.
    """

    def __init__(self, parts: list[HFCausalLM], mesh: DeviceMesh, config: JobConfig, device: torch.device) -> None:
        self.parts, self.group, self._config, self._device = parts, mesh.get_group(), config, device
        self.has_first = any(_stage(part).is_first for part in parts)
        self.has_last = any(_stage(part).is_last for part in parts)
        ranks = dist.get_process_group_ranks(self.group)
        self.first_rank, self.last_rank = ranks[0], ranks[-1]
        """Global ranks with the first and the last stage."""
        training = config.training
        # FSDP computes, and hands on, in the dtype of its mixed precision; otherwise there is none under PP.
        sharded = isinstance(parts[0], FSDPModule)
        self._dtype = TORCH_DTYPE_MAP[training.mixed_precision_param if sharded else training.dtype]
        self._stages = self._build_stages(config.parallelism.pipeline_parallel_microbatch_size, training.seq_len)
        self._schedule = build_pipeline_schedule(config, self._stages, _as_it_is)
        self._forward_only: dict[tuple[int, int, int], tuple[Any, list[_Stage]]] = {}

    def step(self, inputs: Tensor, inputs_of: StageInputs) -> Tensor:
        """Forward and backward of a local batch, by the configured schedule. Collective.

        Args:
            inputs: (B, T) tokens.
            inputs_of: see :data:`StageInputs`; has ``compute``, which gives the loss of the rows as a scalar.

        Returns:
            The sum of the losses, on every rank of the pipeline.
        """
        count = len(inputs) // self._config.parallelism.pipeline_parallel_microbatch_size
        losses: list[Tensor] = []
        self._run(self._schedule, self._stages, inputs, count, inputs_of, target=inputs, losses=losses)
        loss = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self._device)
        dist.all_reduce(loss, group=self.group)
        return loss

    @torch.no_grad()
    def forward(self, inputs: Tensor, inputs_of: StageInputs) -> list[Any] | None:
        """Forward alone. Collective.

        Args:
            inputs: (B, T) tokens.
            inputs_of: see :data:`StageInputs`.

        Returns:
            What the last stage gave for each micro-batch; None on ranks without it.
        """
        size = min(len(inputs), self._config.parallelism.pipeline_parallel_microbatch_size)
        size = next(n for n in range(size, 0, -1) if len(inputs) % n == 0)
        count, seq_len = len(inputs) // size, inputs.shape[1]
        if (count, size, seq_len) not in self._forward_only:
            stages = self._build_stages(size, seq_len)
            schedule: Any = ScheduleGPipe(stages[0], n_microbatches=count)
            if len(stages) > 1:
                schedule = ScheduleLoopedBFS([*stages], n_microbatches=count)
            self._forward_only[count, size, seq_len] = schedule, stages
        schedule, stages = self._forward_only[count, size, seq_len]
        self._run(schedule, stages, inputs, count, inputs_of)
        outputs = stages[-1].outputs
        for stage in stages:
            stage.clear_runtime_states()
            stage.outputs = []
        return outputs if self.has_last else None

    def cuts(self, batch: int) -> bool:
        """Whether a batch of so many sequences goes through in several parts."""
        return batch > self._config.parallelism.pipeline_parallel_microbatch_size

    def from_last(self, tensor: Tensor | None) -> Tensor:
        """A tensor of the last stage on every rank of the pipeline. Collective.

        Args:
            tensor: None where this is not the last stage.
        """
        described = [None if tensor is None else (tensor.shape, tensor.dtype)]
        dist.broadcast_object_list(described, src=self.last_rank, group=self.group)
        (found,) = described
        assert found is not None
        shared = torch.empty(found[0], dtype=found[1], device=self._device) if tensor is None else tensor.contiguous()
        dist.broadcast(shared, src=self.last_rank, group=self.group)
        return shared

    def _run(
        self,
        schedule: Any,
        stages: list[_Stage],
        inputs: Tensor,
        count: int,
        inputs_of: StageInputs,
        target: Tensor | None = None,
        losses: list[Tensor] | None = None,
    ) -> None:
        size = len(inputs) // count
        for stage in stages:
            stage.inputs_of = lambda chunk: inputs_of(slice(chunk * size, (chunk + 1) * size))
            stage.outputs = []
        tokens = [inputs] if self.has_first else []
        if not self.has_last:
            target = losses = None
        schedule.step(*tokens, target=target, losses=losses, return_outputs=False)

    def _build_stages(self, size: int, seq_len: int) -> list[_Stage]:
        """With all shapes given, so that torch does not find them out by a forward and backward of its own."""
        hidden_size = self.parts[0].config.get_text_config().hidden_size
        tokens = torch.empty(size, seq_len, dtype=torch.int64, device="meta")
        hidden = torch.empty(size, seq_len, hidden_size, dtype=self._dtype, device="meta", requires_grad=True)
        scalar = torch.empty((), device="meta", requires_grad=True)
        stages = []
        for part in self.parts:
            role = _stage(part)
            stage = _Stage(
                part,
                role.index,
                role.count,
                self._device,
                input_args=tokens if role.is_first else hidden,
                output_args=scalar if role.is_last else hidden,
                group=self.group,
            )
            stage.dtype = self._dtype
            stages.append(stage)
        return stages


def _stage(part: HFCausalLM) -> Stage:
    assert part.stage is not None
    return part.stage


def _as_it_is(output: Tensor, _target: Tensor) -> Tensor:
    """The schedule's loss function: losses are computed in the last stage's forward, where FSDP has the heads gathered."""
    return output


def pipeline_hf_causal_lm(
    model: HFCausalLM,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
    device: torch.device,
    model_args: BaseModelArgs,
    parallelize_fn: ParallelizeFunction,
    loss_fn: LossFunction,
) -> tuple[Pipeline, list[HFCausalLM], bool, bool]:
    """The TrainSpec's ``pipelining_fn``: this rank's stages, parallelised, and what runs them."""
    mesh = parallel_dims.get_mesh("pp")
    stages = layers_of_stages(job_config.parallelism, len(model.layers))
    parts = []
    for index in range(mesh.get_local_rank(), len(stages), mesh.size()):
        part = stage_of(model, Stage(index, len(stages)), stages[index])
        logger.info(f"Stage {index} of {len(stages)}: layers {_span(stages[index])}")
        parts.append(parallelize_fn(part, parallel_dims, job_config))
    pipeline = Pipeline(parts, mesh, job_config, device)
    return pipeline, parts, pipeline.has_first, pipeline.has_last


def _span(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if layers else "none"
