"""Rehearses a job in this process: its trainer is built and makes two steps on tensors without memory, among ranks that are not there.

``python -m flame_ext.planning.rehearsal {gpu,cpu} [OPTION ...]``, with torchrun's environment, for the rank that it names. The last
line of its output is a JSON object: the fields of :class:`Rehearsal`, or an ``error``.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any

from flame_ext.imports import without_collection

with without_collection():
    import torch
    import torch.distributed as dist
    from torch import Tensor
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
    from torch.distributed.tensor import DTensor
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torchtitan.config import TORCH_DTYPE_MAP
    from torchtitan.distributed import ParallelDims
    from torchtitan.tools.logging import init_logger

    from flame_ext.assembly import build_train_spec
    from flame_ext.config.model_config import load_model_config
    from flame_ext.config.sections import FlameJobConfig
    from flame_ext.errors import SeedError, UserError
    from flame_ext.heads.registry import teacher_of
    from flame_ext.host.names import Trainer, register_train_spec
    from flame_ext.model.hf_causal_lm import HFCausalLM
    from flame_ext.model.parameters import parameters_of
    from flame_ext.model.quantization import plain
    from flame_ext.operations import operations_per_token
    from flame_ext.planning import stand_ins
    from flame_ext.planning.figures import Rehearsal
    from flame_ext.planning.memory_log import MemoryLog
    from flame_ext.preflight.parse import parse
    from flame_ext.seeding.sources.open import open_source
    from flame_ext.trainer import FutureTrainer

_NAME = "rehearsal"  # of a TrainSpec without data
_STEPS = 2  # the second one has moments
_MICROBATCHES = 2  # the second one adds to gradients
_SETTINGS = (
    *("training.local_batch_size", "training.global_batch_size", "training.seq_len", "training.enable_cpu_offload"),
    *("activation_checkpoint.mode", "compile.enable", "parallelism.data_parallel_replicate_degree"),
    *("parallelism.data_parallel_shard_degree", "parallelism.pipeline_parallel_degree"),
)
_PARTS = {  # a piece of a file's name to what its functions make
    "flame_ext/objective/cross_entropy": "logits",
    "flame_ext/objective/": "objective",
    "flame_ext/heads/": "objective",
    "flame_ext/step/teacher": "teacher and keys",
    "torch/distributed/fsdp": "weights in use",
    "torch/optim/": "optimizer",
    "torch/nn/utils/clip_grad": "optimizer",
}
_OF_DATA = (
    "this job cannot be rehearsed, since sizes in its forward depend on values ({}), as those of experts that run in a loop or on other "
    "ranks do: plan it with moe.experts_implementation = 'grouped_mm' and parallelism.expert_parallel_degree = 1"
)
_OFFLOADED = ("weights", "gradients", "moments")


class _Trainer(FutureTrainer):
    """A trainer that is given its batches, and writes nothing."""

    batches: list[Any]
    # torchtitan sets the rank's number, and fake tensors of cpu and cpu:0 do not mix.
    device = property(lambda self: torch.device("cpu"), lambda self, _device: None)

    def init_distributed(self) -> ParallelDims:
        return Trainer.init_distributed(self)

    def _batches_for_all(self, data_iterator: Any) -> list[Any]:
        return self.batches


class _Namer:
    """Says what a new tensor belongs to."""

    def __init__(self) -> None:
        self._shapes: set[torch.Size] = set()
        self._vocabularies: set[int] = set()

    def look_at(self, models: list[HFCausalLM]) -> None:
        for model in models:
            self._shapes.update(parameter.shape for parameter in model.parameters())
            output = model.get_output_embeddings()
            weight = getattr(output, "weight", None)  # a stage of a pipeline may have none
            if weight is not None:
                self._vocabularies |= {len(weight), len(weight.to_local() if isinstance(weight, DTensor) else weight)}

    def part_of(self, tensor: Tensor, files: list[str]) -> str:
        """Files of functions, innermost first; else copies and gradients of weights by their shape, and logits by theirs."""
        for file in files:
            for piece, part in _PARTS.items():
                if piece in file:
                    return part
        if tensor.shape in self._shapes:
            return "weights in use"
        return "logits" if tensor.ndim > 1 and tensor.shape[-1] in self._vocabularies else "activations"


def rehearse(args: list[str], on_gpu: bool) -> Rehearsal:
    """Rehearses the rank that the environment names; once in a process. Raises a UserError for what preflight refuses."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with ExitStack() as stack:
        if on_gpu:
            stack.enter_context(stand_ins.accelerator_is_there())
        config = parse(args)
    settings = {name: attrgetter(name)(config) for name in _SETTINGS}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    fake_mode, namer, models = FakeTensorMode(allow_non_fake_inputs=True), _Namer(), list[HFCausalLM]()
    log = MemoryLog(fake_mode, namer.part_of)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(stand_ins.weights_without_memory(fake_mode, models))
        stack.enter_context(stand_ins.no_other_ranks(log))
        stack.enter_context(stand_ins.no_compiler(log))
        if on_gpu:
            stack.enter_context(stand_ins.as_on_gpu())
        trainer = _build(config, Path(folder))
        namer.look_at(models)
        for model in models:
            log.add([plain(parameter) for parameter in model.parameters()], "weights")
            log.hold(sum(buffer.nbytes for buffer in model.buffers()), "buffers")
        _run(trainer, log, fake_mode)
    ranks, _ = trainer._data_ranks()
    training, whole = config.training, trainer.model_parts[-1].whole
    training.global_batch_size = training.local_batch_size * ranks * trainer.gradient_accumulation_steps
    offloaded = _OFFLOADED if on_gpu and training.enable_cpu_offload else ()
    peak = log.peak(lambda part: part not in offloaded)
    heads = {name: parameters_of(whole.get_submodule(name)) for name in whole.heads}
    return Rehearsal(
        rank=rank,
        peak=peak.size,
        parts=peak.parts,
        on_host=log.peak(lambda part: part in offloaded).size,
        parameters={"backbone": parameters_of(whole) - sum(heads.values()), **heads},
        local_parameters=sum(_local(p).numel() for part in trainer.model_parts for p in part.parameters()),
        tokens=training.global_batch_size * training.seq_len,
        operations=dataclasses.asdict(operations_per_token(config)),
        checkpoint=_step_bytes(trainer, whole),
        export=parameters_of(whole) * TORCH_DTYPE_MAP[config.checkpoint.export_dtype].itemsize,
        **_source(config),
        settings=settings,
    )


def _build(config: FlameJobConfig, folder: Path) -> _Trainer:
    """Builds the trainer, without data and whatever is written or shown."""
    register_train_spec(_NAME, dataclasses.replace(build_train_spec(), build_dataloader_fn=None))
    config.model.name, config.job.dump_folder = _NAME, str(folder)
    config.checkpoint.enable = config.validation.enable = config.profiling.enable_profiling = False
    for tracker in ("tensorboard", "wandb", "trackio"):
        setattr(config.metrics, f"enable_{tracker}", False)
    trainer = _Trainer(config)
    trainer.metrics_processor.should_log = lambda _step: False
    return trainer


def _run(trainer: _Trainer, log: MemoryLog, fake_mode: FakeTensorMode) -> None:
    """Makes the steps, and says what the tensors that are there after each of them are."""
    config, teacher = trainer.job_config, teacher_of(trainer.job_config)
    shape = (config.training.local_batch_size, config.training.seq_len)
    with fake_mode:
        inputs, labels = ({"input": torch.zeros(shape, dtype=torch.int64)}, torch.zeros(shape, dtype=torch.int64))
        if config.data.document_attention:
            inputs |= {name: torch.zeros(shape, dtype=torch.int64) for name in ("doc_ids", "positions")}
    # Keys of the whole step are held together.
    all_of_them = teacher is not None and getattr(config, teacher).negatives == "global"
    count = trainer.gradient_accumulation_steps
    trainer.batches = [(inputs, labels)] * (count if all_of_them else min(count, _MICROBATCHES))
    with log.logging():
        for trainer.step in range(1, _STEPS + 1):
            trainer.train_step(iter(()))
            parameters = [p for part in trainer.model_parts for p in part.parameters()]
            for parameter in parameters:
                log.add(parameter.grad, "gradients")
            for optimizer in trainer.optimizers:
                log.add([list(state.values()) for state in optimizer.state.values()], "moments")


def _step_bytes(trainer: _Trainer, whole: HFCausalLM) -> int:
    """Bytes of a step on disk: the weights that it holds, and moments, by their share of the weights that this rank's stages train."""
    held = {name: p for name, p in whole.named_parameters() if not whole.is_left_to_source(name)}
    trained = sum(p.numel() for part in trainer.model_parts for p in part.parameters() if p.requires_grad)
    states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
    moments = sum(moment.numel() for state in states for moment in state.values() if moment.ndim)
    of_all = sum(p.nbytes for p in held.values() if p.requires_grad)
    return sum(p.nbytes for p in held.values()) + round(of_all * moments / trained)


def _source(config: FlameJobConfig) -> dict[str, Any]:
    """Bytes of a parameter in the source: by its headers if it is here, else by config.json."""
    path = config.checkpoint.initial_load_path or config.model.hf_assets_path
    try:
        entries = open_source(path, config.seed.allow_pickle, config.seed.follow_links).model_part().entries.values()
        elements = sum(math.prod(entry.shape) for entry in entries)
        return {"stored_parameter": sum(entry.nbytes for entry in entries) / elements, "source": path}
    except SeedError:
        dtype = getattr(load_model_config(config), "dtype", None) or torch.float32
        return {"stored_parameter": dtype.itemsize, "source": f"{config.model.hf_assets_path}/config.json"}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    """Runs the command."""
    init_logger()
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    try:
        found = dataclasses.asdict(rehearse(sys.argv[2:], on_gpu=sys.argv[1] == "gpu"))
    except UserError as e:
        found = {"error": str(e)}
    except DynamicOutputShapeException as e:
        found = {"error": _OF_DATA.format(e)}
    print(json.dumps(found), flush=True)
    os._exit(0)  # at its end, an interpreter looks for processes of the group


if __name__ == "__main__":
    main()
