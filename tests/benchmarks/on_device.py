"""The parts of :mod:`tests.benchmarks.accelerator`: ``python -m tests.benchmarks.on_device SCRATCH QUICK PART [ARGUMENT ...]``.

Each writes its results into SCRATCH as lines of JSON: a "row" of the steps, the time of a "loss", or a "check" that "holds" or not.
QUICK = 1 takes tiny sizes, for a CPU.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_ext.host.device import prepare_host
from tests.benchmarks.common import DEBUG_TOML, fresh, rank_environment
from tests.benchmarks.jobs import Job, Shape, build, save_backbone, write_text

Results = Iterator[dict[str, Any]]


class Machine:
    """Where a part runs, and how large it is."""

    def __init__(self, scratch: Path, quick: bool) -> None:
        self.scratch, self.quick = scratch, quick
        there = torch.accelerator.is_available()
        self.device = torch.accelerator.current_accelerator() if there else torch.device("cpu")
        assert self.device is not None
        self.cuda = self.device.type == "cuda"
        self.backend = "inductor" if there else "aot_eager"
        self.shape = Shape(2, 64, 176, 4, 512, 2, 128) if quick else Shape(16, 2048, 8192, 16, 50304, 16, 2048)

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def milliseconds(self, action: Callable[[], object], runs: int = 7) -> float:
        """Median of a few runs, after two that do not count."""
        times = []
        for _ in range(2 + (2 if self.quick else runs)):
            self.wait()
            begin = time.perf_counter()
            action()
            self.wait()
            times.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(times[2:])

    def memory_gib(self, action: Callable[[], object]) -> float:
        """What an action needs beside what is there."""
        if not self.cuda:
            return 0.0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def check(name: str, case: str, holds: bool, measured: object = "") -> dict[str, Any]:
    return {"check": name, "case": case, "holds": bool(holds), "measured": str(measured)}


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
    for name, (peer, _, tolerance) in cases.items():
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


def parity(machine: Machine, dtype: str, kind: str) -> Results:
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
        ]
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
            yield check("logits of from_pretrained", f"{name}, {dtype}", finite and difference == 0, measured)
            trainer.close()
            del trainer, batches
            gc.collect()
        except Exception as e:
            yield check("logits of from_pretrained", f"{name}, {dtype}", False, f"{type(e).__name__}: {str(e)[:300]}")


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


# -- OLMo-1B's shape --------------------------------------------------------------------------------------------------


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
    """A row of the steps: each alone, many without waiting, and their peak of memory; what is compiled; how often the host waits."""
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
    alone = ("--future_encoder.no-enable", "--future_predictor.no-enable", *(f"--{head}.enable" for head in heads))
    job = page.JOBS[jobs[row]] if row in jobs else Job("ours", alone)
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


PARTS = {f.__name__: f for f in (debug, parity, masks, saving, losses, backbone, steps, seeding)}


def main() -> None:
    scratch, quick, part, *arguments = sys.argv[1:]
    prepare_host()
    machine = Machine(Path(scratch), quick == "1")
    with (machine.scratch / f"{' '.join([part, *arguments])}.jsonl").open("a") as results:
        for found in PARTS[part](machine, *arguments):
            print(json.dumps(found), file=results, flush=True)


if __name__ == "__main__":
    main()
