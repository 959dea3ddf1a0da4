"""What takes how long on an accelerator, at OLMo-1B's shape: losses alone, steps, seeding."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.common import rank_environment
from tests.benchmarks.jobs import Job, build, save_backbone, write_text
from tests.benchmarks.machine import Machine, Results, check


def losses(machine: Machine) -> Results:
    """InfoNCE and cross-entropy alone at 32k positions, and what they need beside their operands."""
    positions, size, vocabulary = (512, 64, 1000) if machine.quick else (32768, 2048, 50304)
    dtype = torch.float32 if machine.device.type == "cpu" else torch.bfloat16
    yield from _contrastive(machine, positions, size, dtype)
    yield from _cross_entropy(machine, positions, vocabulary, dtype)


def _contrastive(machine: Machine, n: int, size: int, dtype: torch.dtype) -> Results:
    from flame_ext.objective.contrastive import info_nce

    queries, keys = (F.normalize(torch.randn(n, size, device=machine.device), dim=-1) for _ in range(2))
    every, targets = torch.ones(n, dtype=torch.bool, device=machine.device), torch.arange(n, device=machine.device)
    queries, keys = queries.requires_grad_(), keys.to(dtype)
    for backend in (machine.backend, None):
        action = partial(_backward, lambda b=backend: info_nce(queries, keys, every, every, targets, 0.07, b).loss_sum)
        ms, gib = machine.milliseconds(action), machine.memory_gib(action)
        yield {"loss": "InfoNCE", "compiled": backend is not None, "ms": ms, "gib": gib, "positions": n, "size": size}
    few = torch.arange(n, device=machine.device) < 256
    exact = F.cross_entropy(queries.detach()[few].double() @ keys.double().T / 0.07, targets[few], reduction="sum")
    found = info_nce(queries, keys, few, every, targets, 0.07, machine.backend).loss_sum
    off = abs(found.item() / exact.item() - 1)
    yield check("InfoNCE as in float64", f"256 of {n} positions", off < 1e-4, f"{off:.1g}")


def _cross_entropy(machine: Machine, n: int, vocabulary: int, dtype: torch.dtype) -> Results:
    from torchtitan.components.loss import cross_entropy_loss as titan_loss

    from flame_ext.objective.cross_entropy import cross_entropy_loss

    logits = torch.randn(1, n, vocabulary, device=machine.device, dtype=dtype).requires_grad_()
    labels = torch.randint(vocabulary, (1, n), device=machine.device)
    titan_compiled = torch.compile(titan_loss, backend=machine.backend)
    for name, compiled, loss in (
        ("cross-entropy", True, lambda: cross_entropy_loss(logits, labels, machine.backend)),
        ("cross-entropy", False, lambda: cross_entropy_loss(logits, labels)),
        ("torchtitan's cross-entropy", True, lambda: titan_compiled(logits, labels)),
    ):
        action = partial(_backward, loss, logits)
        ms, gib = machine.milliseconds(action), machine.memory_gib(action)
        yield {"loss": name, "compiled": compiled, "ms": ms, "gib": gib, "positions": n, "vocabulary": vocabulary}


def _backward(loss: Callable[[], Tensor], leaf: Tensor | None = None) -> None:
    if leaf is not None:
        leaf.grad = None
    loss().backward()


def backbone(machine: Machine) -> Results:
    """Random weights of the shape, made on the device, and the text, for the parts that follow."""
    with machine.device:
        save_backbone(machine.scratch / "backbone", machine.shape)
    write_text(machine.scratch / "text")
    yield {"backbone": str(machine.shape)}


def steps(machine: Machine, row: str) -> Results:
    """A row of the steps: each alone, many without waiting, and their peak of memory; how much is compiled; kernels."""
    from torchtitan.tools.logging import logger
    from torchtitan.tools.utils import get_peak_flops

    from tests.benchmarks import steps as page

    logger.setLevel("ERROR")
    heads = ("mtp", "token_order", "future_bag", "next_latent")
    jobs = {
        **{"native": page.NATIVE, "cross-entropy": page.CE, "documents": page.DOCUMENTS, "future": page.FUTURE},
        "future and documents": "+ future predictor, document boundaries",
        "action": "+ future predictor and action layer",
    }
    alone = Job("ours", (*page.NO_FUTURE, *(f"--{head}.enable" for head in heads)))
    job = page.JOBS[jobs[row]] if row in jobs else alone
    device_options = [o for o in page.DEVICE_OPTIONS if machine.device.type != "cpu" or "fused" not in o]
    options = (*job.options, *device_options, "--metrics.log_freq=100000", "--training.steps=1000")
    folder, files = machine.scratch / f"steps-{row}", (machine.scratch / "backbone", machine.scratch / "text")
    trainer = build(Job(job.kind, options), machine.shape, *map(str, files), str(folder))
    # torchtitan's monitor forgets the peak at every logged step.
    trainer.metrics_processor.device_memory_monitor.reset_peak_stats = lambda: None
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.train_step(batches)

    count = 3 if machine.quick else 10
    single = machine.milliseconds(step, count)
    if machine.cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    machine.wait()
    seconds = (time.perf_counter() - begin) / count
    flops = trainer.metrics_processor.num_flops_per_token
    found = {"row": row, "shape": str(machine.shape), "ms": seconds * 1e3, "ms alone": single}
    found |= {"tokens_per_second": machine.shape.tokens / seconds, "peak_gib": 0.0}
    if machine.cuda:
        achieved = machine.shape.tokens / seconds / get_peak_flops(torch.cuda.get_device_name())
        found |= {"mfu": achieved * flops, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        if row.startswith("future"):
            found["mfu_with_teacher"] = achieved * page.with_teacher(machine.shape, flops)
    found["compilations"] = len(torch._dynamo.utils.get_compilation_metrics())
    yield found
    if machine.cuda:
        yield {"profile": row, "kernels": profiled(step)}
    trainer.close()


def profiled(step: Callable[[], None]) -> list[list[Any]]:
    """Milliseconds, calls and names of a step's largest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if str(e.device_type).endswith("CUDA")]
    events.sort(key=lambda e: -e.self_device_time_total)
    all_of_them = [sum(e.self_device_time_total for e in events) / 1e3, sum(e.count for e in events), "all"]
    return [all_of_them, *([e.self_device_time_total / 1e3, e.count, e.key[:90]] for e in events[:25])]


def seeding(machine: Machine) -> Results:
    """Seeding onto the device beside a plain load of the same files."""
    from safetensors.torch import load_file
    from torchtitan.tools.logging import logger

    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer
    from tests.benchmarks.seeding import arguments

    os.environ.update(rank_environment())
    logger.setLevel("ERROR")
    folder, kept = machine.scratch / "backbone", {}
    files = sorted(folder.glob("*.safetensors"))

    def plain() -> None:
        kept.clear()
        for file in files:
            kept.update(load_file(file, device=str(machine.device)))

    plain_ms = machine.milliseconds(plain, 5)
    kept.clear()
    options = [*arguments(folder, str(machine.scratch / "seeded")), f"--training.seq_len={machine.shape.seq_len}"]
    trainer = FutureTrainer(parse(options))
    trainer.checkpointer.load()
    report = machine.scratch / "seeded" / "seed_report.json"
    times = [json.loads(report.read_text())["seconds"] * 1e3]
    for _ in range(3):
        trainer.checkpointer.hooks.seed(str(folder))
        times.append(json.loads(report.read_text())["seconds"] * 1e3)
    ours, size = statistics.median(times), sum(file.stat().st_size for file in files) / 2**30
    rate = plain_ms / ours
    yield check(
        "seeding at 0.8x the rate of load_file",
        f"{size:.2f} GiB",
        rate >= 0.8,
        f"{rate:.2f}x: {ours:.0f} ms, load_file {plain_ms:.0f} ms",
    )
    trainer.close()
