"""Tensor and context parallelism, activation checkpointing, compilation and data parallelism, applied in torchtitan's order.

There is no ``from __future__ import annotations`` here: DDP reads the types in the signature of its communication hook.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.tools.logging import logger

from flame_ext.host.names import apply_compile, apply_ddp, disable_fsdp_gradient_division, op_sac_save_list
from flame_ext.host.patches import compile_each_batch_shape
from flame_ext.model.context_parallel import ContextParallel
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.tensor_parallel import apply_tensor_parallel


def parallelize_hf_causal_lm(model: HFCausalLM, parallel_dims: ParallelDims, job_config: JobConfig) -> HFCausalLM:
    """Applies the parallelisms of the job to a model on meta, in place. Preflight has refused those that it cannot have."""
    options = job_config.parallelism
    compile_model = job_config.compile.enable and "model" in job_config.compile.components
    if model.beside_text and model.stage.is_first:
        parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in model.beside_text)
        logger.info(
            f"{model.architecture} is multimodal and trained on text: {', '.join(parts)} ({len(model.beside_text)} parameters) are "
            "frozen, and exported as they are"
        )
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        # A head that reads logits is given the plain tensor that it would be given anywhere.
        needs_logits = any(head.needs_logits for head in model.whole.heads.values())
        loss_parallel = not options.disable_loss_parallel and not needs_logits
        apply_tensor_parallel(model, mesh, loss_parallel)
        maybe_enable_async_tp(job_config, mesh)
        if compile_model:
            compile_each_batch_shape()
    if parallel_dims.cp_enabled:
        model.context = ContextParallel(parallel_dims.get_mesh("cp"), options.context_parallel_load_balancer)
        logger.info("Applied Context Parallel to the model")
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compile_model,
            op_sac_save_list=op_sac_save_list,
            base_folder=job_config.job.dump_folder,
        )
    if compile_model:
        apply_compile(model, job_config.compile)
    if parallel_dims.fsdp_enabled:
        hybrid = parallel_dims.dp_replicate_enabled
        apply_fsdp(model, parallel_dims.get_mesh(["dp_replicate", "fsdp"] if hybrid else ["fsdp"]), job_config)
        logger.info(f"Applied {'HSDP' if hybrid else 'FSDP'} to the model")
    elif parallel_dims.dp_replicate_enabled and not parallel_dims.pp_enabled:  # see Pipeline.finish_gradients
        mesh = parallel_dims.get_mesh("dp_replicate")
        apply_ddp(model, mesh, enable_compile=compile_model)
        # The loss is already divided by the global number of tokens: sum gradients, which DDP would average.
        replicated: Any = model  # composable DDP gives it another class
        replicated.register_comm_hook(mesh.get_group(), sum_gradients)
    return model


def apply_fsdp(model: HFCausalLM, mesh: DeviceMesh, job_config: JobConfig) -> None:
    """Applies FSDP2 to the embedding, each decoder layer and head, the output embedding, and the root with tied embeddings."""
    policy, training = job_config.parallelism.fsdp_reshard_after_forward, job_config.training
    mp_policy = MixedPrecisionPolicy(
        TORCH_DTYPE_MAP[training.mixed_precision_param], TORCH_DTYPE_MAP[training.mixed_precision_reduce]
    )
    offload_policy: OffloadPolicy = OffloadPolicy()
    if training.enable_cpu_offload:
        offload_policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    shard = partial(fully_shard, mesh=mesh, mp_policy=mp_policy, offload_policy=offload_policy)
    for module in (model.get_input_embeddings(), *model.layers.children()):
        if module not in model.tied_modules and any(
            True for _ in module.parameters()
        ):  # a later stage has no embedding
            shard(module, reshard_after_forward=policy != "never")
    # The backward needs first what the forward runs last: keep it gathered unless told otherwise, as torchtitan does.
    for module in (model.get_output_embeddings(), *(model.get_submodule(name) for name in model.heads)):
        if module is not None and module not in model.tied_modules and any(True for _ in module.parameters()):
            shard(module, reshard_after_forward=policy == "always")
    shard(model)
    disable_fsdp_gradient_division(model)
    # Any gradient scaling factor, even 1, makes FSDP use PREMUL_SUM, which gloo lacks.
    for module in model.modules() if mesh.device_type == "cpu" else ():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def sum_gradients(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sums a bucket of gradients over ranks, without DDP's division by their number; a DDP communication hook."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
