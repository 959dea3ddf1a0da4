"""What has to hold on an accelerator: losses as on the CPU, saves, every architecture's logits, attention by masks."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.common import DEBUG_TOML, fresh, rank_environment
from tests.benchmarks.machine import Machine, Results, check

# -- runs of the command ----------------------------------------------------------------------------------------------

TRAIN = "import sys\nfrom flame_ext.train import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    print('{}')"


def train(folder: Path, *options: str, on_cpu: bool = False) -> list[dict[str, Any]]:
    """The command in one rank; its metrics by step. Raises a RuntimeError if it fails."""
    env = {**rank_environment(), "OMP_NUM_THREADS": "4", **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    arguments = [f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={folder}", "--metrics.no-enable-tensorboard"]
    fresh(TRAIN, *arguments, *options, env=env)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def debug(machine: Machine) -> Results:
    """Losses of the debug job beside the CPU's."""
    steps = 3 if machine.quick else 20
    common = [f"--training.steps={steps}", "--lr_scheduler.total_steps=60", "--action_layer.enable"]
    half = ["--training.mixed_precision_param=bfloat16", "--compile.enable"]
    validated = [
        *("--validation.enable", "--validation.dataset=python_stdlib", "--validation.local_batch_size=4"),
        *("--validation.seq_len=128", "--validation.steps=2", f"--validation.freq={steps // 2}"),
    ]
    peers: dict[str, list[str]] = {
        "defaults": [],
        "documents": ["--data.document_attention"],
        "mean": ["--future_encoder.summary_method=mean"],
    }
    cases = {
        **{name: (name, options, 1e-4) for name, options in peers.items()},
        "teacher by SDPA": ("defaults", ["--future_encoder.teacher_attention=sdpa"], 1e-4),
        "bfloat16, compiled": ("defaults", half, 1e-2),
        "bfloat16, compiled, documents, validated": ("documents", [*peers["documents"], *half, *validated], 1e-2),
    }
    with ThreadPoolExecutor(1 if machine.quick else 5) as pool:
        on_cpu = {
            name: pool.submit(train, machine.scratch / f"cpu-{n}", *common, *options, on_cpu=True)
            for n, (name, options) in enumerate(peers.items())
        }
        here = {
            name: pool.submit(train, machine.scratch / f"debug-{n}", *common, *options)
            for n, (name, (_, options, _)) in enumerate(cases.items())
        }
        for name, (peer, _, tolerance) in cases.items():  # as they come, in case there is no time for the last ones
            pairs = zip(here[name].result(), on_cpu[peer].result(), strict=True)
            losses = ("loss_ce", "loss_future", "loss_action")
            largest = max(abs(a[loss] / b[loss] - 1) for a, b in pairs for loss in losses)
            yield check("losses as on the CPU", name, largest < tolerance, f"{steps} steps, to {largest:.1g}")


def saving(machine: Machine) -> Results:
    """A run that goes on from its middle, saved in the background from pinned memory, ends with the bits of one that never stopped."""
    mode = "async_with_pinned_mem" if machine.cuda else "async"
    options = [
        *("--training.steps=10", "--lr_scheduler.total_steps=60", "--checkpoint.interval=5"),
        *(f"--checkpoint.async_mode={mode}", "--checkpoint.export_dtype=float32", "--data.document_attention"),
    ]
    folder = machine.scratch / "saving"

    def last() -> str:
        return hashlib.sha256((folder / "hf" / "step-10" / "model.safetensors").read_bytes()).hexdigest()

    train(folder, *options)
    unbroken = last()
    for gone in (folder / "checkpoint" / "step-10", folder / "hf" / "step-10"):
        shutil.rmtree(gone)
    train(folder, *options)
    yield check("resumed to the last bit", mode, last() == unbroken)


# -- architectures ----------------------------------------------------------------------------------------------------


def parity(machine: Machine, dtype: str, kind: str, *compiled: str) -> Results:
    """Seeding of every tiny architecture with all proofs, and two steps of training with the teacher and the action layer."""
    from torchtitan.tools.logging import logger

    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer
    from tests.tiny_models import CONFIGS, MIXTURES, save_tiny

    os.environ.update(rank_environment())
    logger.setLevel("ERROR")
    every = {"dense": CONFIGS, "mixtures": MIXTURES}.get(kind) or {kind: (CONFIGS | MIXTURES)[kind]}
    for config in every.values():
        enlarge_heads(config)
    for name in list(every)[: 2 if machine.quick else None]:
        folder, begin = machine.scratch / f"parity-{dtype}-{name}", time.monotonic()
        save_tiny(name, folder / "model")
        options = [
            *(f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={folder / 'run'}", "--data.document_attention"),
            *(f"--model.hf_assets_path={folder / 'model'}", f"--checkpoint.initial_load_path={folder / 'model'}"),
            *(f"--training.mixed_precision_param={dtype}", "--training.local_batch_size=2", "--action_layer.enable"),
            *(("--compile.enable",) if compiled else ()),
        ]
        case = ", ".join([name, dtype, *compiled])
        torch._dynamo.reset()
        try:
            trainer = FutureTrainer(parse(options))
            trainer.checkpointer.load()
            difference = json.loads((folder / "run" / "seed_report.json").read_text())["verification"]["max_abs_diff"]
            batches = trainer.batch_generator(trainer.dataloader)
            for trainer.step in (1, 2):
                trainer.train_step(batches)
            parts = trainer.reported.reduced(trainer.reported.parts)
            finite = all(math.isfinite(value) for value in (*parts.values(), trainer.gradients.norm))
            measured = f"{difference:g}, {trainer.teacher._mask_form}, {time.monotonic() - begin:.0f} s"
            yield check("logits of from_pretrained", case, finite and difference == 0, measured)
            trainer.close()
            del trainer, batches
            gc.collect()
        except Exception as e:
            yield check("logits of from_pretrained", case, False, f"{type(e).__name__}: {str(e)[:300]}")


def enlarge_heads(config: Any) -> None:
    """FlexAttention's kernels want heads of at least 16 elements."""
    sizes = {"hidden_size": 128, "vocab_size": 264, "n_inner": 192, "intermediate_size": 192, "head_dim": 32}
    if hasattr(config, "kv_lora_rank"):
        sizes |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32, "head_dim": 16, "v_head_dim": 32}
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, size in sizes.items():
            if isinstance(getattr(part, name, None), int):
                with contextlib.suppress(AttributeError):  # it is computed from others
                    setattr(part, name, size)


def masks(machine: Machine) -> Results:
    """SDPA and FlexAttention under the anti-causal mask of documents, against the formula in float64."""
    import transformers.integrations.flex_attention  # noqa: F401

    torch.manual_seed(0)
    for length, dtype in ((512, torch.float32), (704, torch.bfloat16), (2048, torch.bfloat16)):
        yield from _attention(machine, length, dtype)


def _attention(machine: Machine, length: int, dtype: torch.dtype) -> Results:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from flame_ext.objective.masks import anticausal_block_mask, anticausal_mask

    q, k, v = (torch.randn(2, 4, length, 64, device=machine.device, dtype=dtype) for _ in range(3))
    docs = (torch.arange(length, device=machine.device) // 100).expand(2, -1).contiguous()
    dense = anticausal_mask(length, 0, docs, machine.device)
    exact = attention_with_gradients(_formula, q.double(), k.double(), v.double(), dense)
    tolerance, empty = 1e-5 if dtype == torch.float32 else 2e-2, ~dense.any(-1)[..., None]

    def compare(name: str, attend: Callable[..., Tensor], mask: Any) -> dict[str, Any]:
        case = f"{name}, {length} positions, {dtype}".replace("torch.", "")
        try:
            found = attention_with_gradients(attend, q, k, v, mask)
        except RuntimeError as e:
            return check("attention as in float64", case, False, f"{type(e).__name__}: {str(e)[:120]}")
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        zero = bool((found[0].masked_select(empty.expand_as(found[0])) == 0).all())
        measured = f"rows without keys are {'' if zero else 'not '}zero; out, dq, dk, dv to "
        measured += ", ".join(f"{error:.1g}" for error in errors)
        return check("attention as in float64", case, zero and max(errors) < tolerance, measured)

    backends = {"math": SDPBackend.MATH}
    if machine.cuda:
        backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():
        with sdpa_kernel(backend):
            yield compare(f"SDPA {name}{', which is never asked' * (name == 'cuDNN')}", _sdpa, dense)
    if machine.cuda:
        flex, module = ALL_ATTENTION_FUNCTIONS["flex_attention"], torch.nn.Module()
        block = anticausal_block_mask(length, 0, docs, machine.device)
        yield compare("FlexAttention", lambda *a: flex(module, *a, scaling=0.125)[0].transpose(1, 2), block)


def attention_with_gradients(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves, mask)
    (out.double() * torch.linspace(0.5, 1.5, 64, device=q.device)).square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT / 8).masked_fill(~mask, float("-inf"))
    return torch.where(mask.any(-1, keepdim=True), scores, 0.0).softmax(-1).masked_fill(~mask, 0.0) @ v
