"""Tensor and context parallelism, activation checkpointing, compilation and data parallelism, applied in torchtitan's order.

There is no ``from __future__ import annotations`` here: DDP reads the types in the signature of its communication hook.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.host.names import (
    Compile,
    apply_ac,
    apply_compile,
    apply_ddp,
    disable_fsdp_gradient_division,
    maybe_enable_async_tp,
    op_sac_save_list,
)
from flame_ext.host.patches import compile_each_batch_shape
from flame_ext.model.context_parallel import ContextParallel
from flame_ext.model.expert_parallel import DispatchedExperts, apply_expert_parallel, placement_of_experts
from flame_ext.model.freezing import freeze_parameters
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.tensor_parallel import apply_tensor_parallel

# Operators whose outputs selective activation checkpointing keeps beside torchtitan's list for dense models, as torchtitan does for
# its mixtures of experts: tokens are not exchanged again in the backward.
_SAVED_BESIDE = {torch.ops._c10d_functional.all_to_all_single.default}


def parallelize_hf_causal_lm(model: HFCausalLM, parallel_dims: ParallelDims, job_config: FlameJobConfig) -> HFCausalLM:
    """Applies the parallelisms of the job to a model on meta, in place. Preflight has refused those that it cannot have."""
    options = job_config.parallelism
    compile_model = job_config.compile.enable and "model" in job_config.compile.components
    if model.whole is model:  # a stage is a copy of a model in which this is done
        freeze_parameters(model, job_config.training.freeze)
    compile_each_batch_shape()  # FlexAttention and its masks are compiled whether or not the layers are
    if model.beside_text and model.stage.is_first:
        parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in model.beside_text)
        logger.info(
            f"{model.architecture} is multimodal and trained on text: {', '.join(parts)} ({len(model.beside_text)} parameters) are "
            "frozen, and exported as they are"
        )
    if parallel_dims.ep_enabled:
        apply_expert_parallel(model, parallel_dims.get_mesh("ep"), parallel_dims.get_optional_mesh("tp"))
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        # A head that reads logits is given the plain tensor that it would be given anywhere.
        needs_logits = any(head.needs_logits for head in model.whole.heads.values())
        loss_parallel = not options.disable_loss_parallel and not needs_logits
        apply_tensor_parallel(model, mesh, loss_parallel)
        maybe_enable_async_tp(job_config, mesh)
    if parallel_dims.cp_enabled:
        model.context = ContextParallel(parallel_dims.get_mesh("cp"), options.context_parallel_load_balancer)
        logger.info("Applied Context Parallel to the model")
    # torchtitan's functions look for an attribute of this name.
    lists = [nn.ModuleDict({"layers": layers}) for layers in model.layer_lists]
    for layers in lists if job_config.activation_checkpoint.mode != "none" else ():
        apply_ac(
            layers,
            job_config.activation_checkpoint,
            model_compile_enabled=compile_model,
            op_sac_save_list=op_sac_save_list | _SAVED_BESIDE,
            base_folder=job_config.job.dump_folder,
        )
    for layers in lists if compile_model else ():
        (compile_around_experts if parallel_dims.ep_enabled else apply_compile)(layers, job_config.compile)
    if parallel_dims.fsdp_enabled:
        hybrid = parallel_dims.dp_replicate_enabled
        replicas = ["dp_replicate"] if hybrid else []
        experts = parallel_dims.get_mesh([*replicas, "efsdp"]) if parallel_dims.ep_enabled else None
        apply_fsdp(model, parallel_dims.get_mesh([*replicas, "fsdp"]), job_config, experts)
        logger.info(f"Applied {'HSDP' if hybrid else 'FSDP'} to the model")
    elif parallel_dims.dp_replicate_enabled and not parallel_dims.pp_enabled:  # see Pipeline.finish_gradients
        mesh = parallel_dims.get_mesh("dp_replicate")
        apply_ddp(model, mesh, enable_compile=compile_model)
        # The loss is already divided by the global number of tokens: sum gradients, which DDP would average.
        replicated: Any = model  # composable DDP gives it another class
        replicated.register_comm_hook(mesh.get_group(), sum_gradients)
    return model


def parallelize_frozen(model: HFCausalLM, parallel_dims: ParallelDims, job_config: FlameJobConfig) -> None:
    """Shards a second model, which is never trained, as FSDP shards the job's, and compiles its layers if those are compiled, in place.

    Ranks of tensor and context parallelism run all of it on whole sequences. A mixture of experts is not compiled.
    """
    model.requires_grad_(False)
    if job_config.compile.enable and "model" in job_config.compile.components and not model.routing.of_mixture:
        apply_compile(nn.ModuleDict({"layers": model.layers}), job_config.compile)
    if parallel_dims.fsdp_enabled:
        replicas = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
        apply_fsdp(model, parallel_dims.get_mesh([*replicas, "fsdp"]), job_config, None)
        # What waits for a backward to be freed, as the root does, would stay gathered for good.
        if job_config.parallelism.fsdp_reshard_after_forward != "never":
            cast(FSDPModule, model).set_reshard_after_forward(True)


def forget_forwards(model: nn.Module) -> None:
    """Clears FSDP's record of the forwards of a model that is never trained, which a backward clears in others."""
    if isinstance(model, FSDPModule):
        order = model._get_fsdp_state()._comm_ctx.post_forward_order
        for group in order:
            group._post_forward_indices.clear()
        order.clear()


def apply_fsdp(
    model: HFCausalLM, mesh: DeviceMesh, job_config: FlameJobConfig, experts_mesh: DeviceMesh | None
) -> None:
    """Applies FSDP2 to the embedding, each decoder layer and head, the output embedding, and the root with tied embeddings.

    An embedding that a head calls once more for each chunk of its states belongs to the root: it is gathered once, and its gradient
    reduced once.

    Under expert parallelism, experts are sharded over ``experts_mesh``, the ranks that have the same ones. Their gradients are
    summed as all others are: those of the tokens of other ranks have come back by the exchange of tokens.
    """
    parallelism, training = job_config.parallelism, job_config.training
    policy = parallelism.fsdp_reshard_after_forward
    # As torchtitan does: a pipeline would gather the parameters again for each of its parts of a batch.
    reshard = policy == "always" or (policy == "default" and parallelism.pipeline_parallel_degree == 1)
    mp_policy = MixedPrecisionPolicy(
        TORCH_DTYPE_MAP[training.mixed_precision_param], TORCH_DTYPE_MAP[training.mixed_precision_reduce]
    )
    offload_policy: OffloadPolicy = OffloadPolicy()
    if training.enable_cpu_offload:
        offload_policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    shard = partial(fully_shard, mesh=mesh, mp_policy=mp_policy, offload_policy=offload_policy)
    placement: Any = None if experts_mesh is None else placement_of_experts(model, experts_mesh)
    heads = model.heads.values()
    looked_up = [] if any(head.uses_embedding for head in heads) else [model.get_input_embeddings()]
    output = [] if any(head.uses_unembedding for head in heads) else [model.get_output_embeddings()]
    layers = [layer for layers in model.layer_lists for layer in layers.children()]
    # The backward needs first what the forward runs last: keep it gathered unless told otherwise, as torchtitan does.
    last = [*output, *(model.get_submodule(name) for name in model.heads)]
    for modules, reshard_after_forward in (([*looked_up, *layers], reshard), (last, policy == "always")):
        for module in modules:
            # A later stage of a pipeline has no embedding.
            if module is not None and module not in model.tied_modules and any(True for _ in module.parameters()):
                shard(module, reshard_after_forward=reshard_after_forward, shard_placement_fn=placement)
    shard(model)
    disable_fsdp_gradient_division(model)
    # Any gradient scaling factor, even 1, makes FSDP use PREMUL_SUM, which gloo lacks.
    for module in model.modules() if mesh.device_type == "cpu" else ():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def compile_around_experts(model: Any, config: Compile) -> None:
    """Compiles each of the ``model.layers`` as torchtitan does, or, where it has experts, its modules but routers and experts, in place.

    The exchange of tokens waits for sizes on the host.
    """
    options: Any = {"backend": config.backend, "fullgraph": True}
    for name, layer in model.layers.named_children():
        if _has_experts(layer):
            for module in _compiled_parts(layer):
                module.compile(**options)
        else:
            compiled: Any = torch.compile(layer, **options)
            model.layers.register_module(name, compiled)
    logger.info("Compiling each decoder layer, around its experts, with torch.compile")


def _has_experts(module: nn.Module) -> bool:
    return any(isinstance(inner, DispatchedExperts) for inner in module.modules())


def _compiled_parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _has_experts(child):
            yield from () if isinstance(child, DispatchedExperts) else _compiled_parts(child)
        elif any(True for _ in child.children()) and not hasattr(child, "router_number"):  # attentions, MLPs; no norms
            yield child


def sum_gradients(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sums a bucket of gradients over ranks, without DDP's division by their number; a DDP communication hook."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
