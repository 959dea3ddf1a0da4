"""Patches for a rehearsal: what stands in for the compiler, other ranks, files of weights, and the kernels of a GPU."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtitan.components.quantization import float8
from transformers.integrations import moe

from flame_ext.model import attention, parallelize
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.objective import chunks, contrastive, masks
from flame_ext.planning.memory_log import MemoryLog
from flame_ext.step import reverse_model

_GPU = torch.device("cuda")


@contextmanager
def weights_without_memory(fake_mode: FakeTensorMode, models: list[HFCausalLM]) -> Iterator[None]:
    """Has models be given fake parameters instead of empty ones, and notes these models."""
    to_empty = HFCausalLM.to_empty

    def fake(model: HFCausalLM, **options: Any) -> Any:
        models.append(model)
        with fake_mode:
            return to_empty(model, **options)

    with (
        mock.patch.object(HFCausalLM, "to_empty", fake),
        mock.patch.object(reverse_model, "read_weights"),
        mock.patch.object(reverse_model, "compare_replicas"),
        mock.patch.object(reverse_model, "weights_digest", return_value=""),
    ):
        yield


@contextmanager
def no_other_ranks(log: MemoryLog) -> Iterator[None]:
    """Answers what torch's fake process group cannot: objects of other ranks are this rank's, and DDP has its buckets alone."""

    def gathered(values: list[Any], value: Any, group: Any = None) -> None:
        values[:] = [value] * len(values)

    def ddp(model: Any, _mesh: Any, enable_compile: bool) -> None:
        model.register_comm_hook = model.set_requires_gradient_sync = lambda *_: None
        log.hold(sum(p.numel() * p.element_size() for p in model.parameters()), "gradients")

    with (
        mock.patch.object(dist, "all_gather_object", gathered),
        mock.patch.object(dist, "broadcast_object_list"),
        mock.patch.object(parallelize, "apply_ddp", ddp),
    ):
        yield


@contextmanager
def no_compiler(log: MemoryLog) -> Iterator[None]:
    """Has a function that is to be compiled be one kernel, and a layer run as it is, which takes somewhat more memory."""

    def compiled(function: Any = None, **_options: Any) -> Any:
        return function if isinstance(function, nn.Module) else log.as_kernel(function)

    with mock.patch.object(torch, "compile", compiled), mock.patch.object(nn.Module, "compile"):
        yield


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Has everything that asks for the device, of which fake tensors say that it is the CPU, do as on a GPU.

    FlexAttention, which holds no scores, becomes causal attention by torch's own kernel, which holds none either.
    """

    def options(config: Any, _device_type: str = "") -> dict[str, Any]:
        found = attention_options(config, _GPU.type)
        return {} if "flex_attention" in found.values() else found

    chunk_elements, tile, mask_form = chunks.chunk_elements, contrastive._tile, attention.mask_form
    attention_options = attention.attention_options
    replaced: dict[Callable[..., Any], Callable[..., Any]] = {
        chunk_elements: lambda _device: chunk_elements(_GPU),
        tile: lambda _device: tile(_GPU),
        mask_form: lambda wanted, model, _device: mask_form(wanted, model, _GPU),
        attention_options: options,
        masks.causal_block_mask: lambda *_: None,
        masks.anticausal_block_mask: lambda *_: None,
    }
    # On a CPU, selective checkpointing computes attention again: torchtitan's list has the kernels of GPUs alone.
    saved = parallelize._SAVED_BESIDE | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(parallelize, "_SAVED_BESIDE", saved))
        stack.enter_context(_with_float8())
        # torch's kernel, which knows other dtypes, has no shapes for them; transformers' own has.
        in_bfloat16 = lambda _input, weight, _offs: weight.dtype is torch.bfloat16  # noqa: E731
        stack.enter_context(mock.patch.object(moe, "_can_use_grouped_mm", in_bfloat16))
        for module in [module for name, module in sys.modules.items() if name.startswith("flame_ext.")]:
            for name, value in list(vars(module).items()):
                if isinstance(value, type(as_on_gpu)) and value in replaced:
                    stack.enter_context(mock.patch.object(module, name, replaced[value]))
        yield


@contextmanager
def accelerator_is_there() -> Iterator[None]:
    """Has preflight check a job of GPUs, which know float8, on a machine that may have none."""
    with (
        mock.patch.object(torch.accelerator, "is_available", return_value=True),
        _with_float8(),
    ):
        yield


def _with_float8() -> AbstractContextManager[Any]:
    return mock.patch.object(float8, "has_cuda_capability", return_value=True)
