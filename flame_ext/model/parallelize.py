"""Tensor and context parallelism, activation checkpointing, compilation, data parallelism for :class:`HFCausalLM`, in the host's order.

No ``from __future__ import annotations`` here: DDP looks at the types in its communication hook's signature.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.models.llama3.infra.parallelize import (
    _op_sac_save_list,
    apply_compile,
    apply_ddp,
    disable_fsdp_gradient_division,
)
from torchtitan.tools.logging import logger

from flame_ext.heads.own import enabled_heads
from flame_ext.model.context_parallel import ContextParallel
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.tensor_parallel import apply_tensor_parallel


def parallelize_hf_causal_lm(model: HFCausalLM, parallel_dims: ParallelDims, job_config: JobConfig) -> HFCausalLM:
    """Apply what the job asks for, in place; the model is still on meta.

    Parallelisms that this model does not have are refused with the configuration (preflight/checks.py).
    """
    compile_model = job_config.compile.enable and "model" in job_config.compile.components
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        # A head of the user's own is given logits as the plain tensor that it would be given anywhere.
        loss_parallel = not job_config.parallelism.disable_loss_parallel and not enabled_heads(job_config)
        apply_tensor_parallel(model, mesh, loss_parallel)
        maybe_enable_async_tp(job_config, mesh)
        if compile_model:
            # DTensors of unknown size can not always be split: each batch shape is compiled by itself. Probe, teacher, student and
            # validation have five to seven, which all layers count as recompilations of one function.
            torch._dynamo.config.automatic_dynamic_shapes = False
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if parallel_dims.cp_enabled:
        model.context = ContextParallel(
            parallel_dims.get_mesh("cp"), job_config.parallelism.context_parallel_load_balancer
        )
        logger.info("Applied Context Parallel to the model")
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compile_model,
            op_sac_save_list=_op_sac_save_list,
            base_folder=job_config.job.dump_folder,
        )
    if compile_model:
        apply_compile(model, job_config.compile)
    if parallel_dims.fsdp_enabled:
        hybrid = parallel_dims.dp_replicate_enabled
        apply_fsdp(model, parallel_dims.get_mesh(["dp_replicate", "fsdp"] if hybrid else ["fsdp"]), job_config)
        logger.info(f"Applied {'HSDP' if hybrid else 'FSDP'} to the model")
    elif parallel_dims.dp_replicate_enabled and not parallel_dims.pp_enabled:  # see sum_over_replicas
        mesh = parallel_dims.get_mesh("dp_replicate")
        apply_ddp(model, mesh, enable_compile=compile_model)
        # The loss is already divided by the global number of tokens: gradients are summed. DDP alone would average.
        replicated: Any = model  # composable DDP gives it another class
        replicated.register_comm_hook(mesh.get_group(), sum_gradients)
    return model


def apply_fsdp(model: HFCausalLM, mesh: DeviceMesh, job_config: JobConfig) -> None:
    """FSDP2 over embedding, each decoder layer, each head and the output embedding; the rest is the root's.

    Tied embeddings have to be gathered together, so they stay with the root.
    """
    policy = job_config.parallelism.fsdp_reshard_after_forward
    mp_policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
    )
    offload = job_config.training.enable_cpu_offload
    offload_policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()

    def shard(module: nn.Module, reshard_after_forward: bool | None) -> None:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=mp_policy,
            offload_policy=offload_policy,
            reshard_after_forward=reshard_after_forward,
        )

    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.tied_modules
    if embedding not in tied and any(True for _ in embedding.parameters()):  # a later stage has none
        shard(embedding, policy != "never")
    for layer in model.layers.children():
        shard(layer, policy != "never")
    # What runs last is needed first in the backward: keep it gathered unless told otherwise (as the host does).
    for module in (output, *(model.get_submodule(name) for name in model.head_names)):
        if module is not None and module not in tied and any(True for _ in module.parameters()):
            shard(module, policy == "always")
    shard(model, None)
    disable_fsdp_gradient_division(model)
    if mesh.device_type == "cpu":
        # Any gradient scaling factor, even 1, makes FSDP use PREMUL_SUM, which gloo does not have.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def sum_gradients(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: all-reduce a bucket of gradients without DDP's division by the number of ranks."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def sum_over_replicas(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """All-reduce the gradients of a step once, where a pipeline runs many forwards before a backward, which DDP can not follow.

    Collective.
    """
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    for work in [dist.all_reduce(grad, group=mesh.get_group(), async_op=True) for grad in grads]:
        work.wait()
