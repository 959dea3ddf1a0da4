"""What the objective costs: ``python tests/benchmarks/objective.py [--rounds 3] [--steps 20]`` prints Markdown tables.

Each figure stands beside its peer from the same run: the tiled InfoNCE beside the naive formula, our cross-entropy beside
the host's, a step with the objective beside one of plain cross-entropy. Runs alternate, so that a slow minute of the
machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import flame_ext  # noqa: F401  (before torchtitan)

REPOSITORY = Path(__file__).resolve().parent.parent.parent

PLAIN = ["--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable"]
ACTION = ["--action_layer.enable", "--action_layer.top_k=8"]
STEPS: dict[str, list[str]] = {
    "cross-entropy alone": PLAIN,
    "anticausal, no document boundaries": ["--future_encoder.no-respect_doc_boundaries"],
    "anticausal": [],
    "anticausal, all the future": ["--future_encoder.future_k=0"],
    "mean of 32": ["--future_encoder.summary_method=mean"],
    "anticausal, teacher_fraction = 0.5": ["--future_encoder.teacher_fraction=0.5"],
    "anticausal, teacher_interval = 4": ["--future_encoder.teacher_interval=4"],
    "anticausal and action layer": ACTION,
}


def info_nce_case(name: str, count: int, size: int) -> tuple[float, float]:
    """Seconds and extra GiB of one forward and backward."""
    import torch
    import torch.nn.functional as F

    from flame_ext.objective.contrastive import info_nce

    torch.manual_seed(0)
    queries = F.normalize(torch.randn(count, size), dim=-1).requires_grad_()
    keys = F.normalize(torch.randn(count, size), dim=-1)
    every, targets = torch.ones(count, dtype=torch.bool), torch.arange(count)

    def naive() -> torch.Tensor:
        return F.cross_entropy(queries @ keys.T / 0.1, targets, reduction="sum")

    def tiled() -> torch.Tensor:
        return info_nce(queries, keys, every, every, targets, 0.1).loss_sum

    return _measured(lambda: {"naive": naive, "tiled": tiled}[name]().backward())


def cross_entropy_case(name: str, rows: int, vocabulary: int) -> tuple[float, float]:
    """Seconds and extra GiB of one forward and backward on bfloat16 logits."""
    import torch
    from torchtitan.components.loss import cross_entropy_loss as host_loss

    from flame_ext.objective.cross_entropy import cross_entropy_loss

    torch.manual_seed(0)
    logits = torch.randn(1, rows, vocabulary, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(vocabulary, (1, rows))
    loss = {"host": host_loss, "chunked": cross_entropy_loss}[name]
    return _measured(lambda: loss(logits, labels).backward())


def _measured(action: Callable[[], None]) -> tuple[float, float]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    action()
    seconds = time.perf_counter() - begin
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def _in_fresh_process(function: Callable[..., tuple[float, float]], *args: object) -> tuple[float, float]:
    # The kernel keeps one peak for the life of a process.
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def compare(function: Callable[..., tuple[float, float]], names: list[str], rounds: int, *shape: int) -> None:
    """Print a row for each name, relative to the first."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            results[name].append(_in_fresh_process(function, name, *shape))
    base = [statistics.median(values) for values in zip(*results[names[0]], strict=True)]
    print(
        f"| {function.__name__.removesuffix('_case')} {' x '.join(map(str, shape))} | seconds | extra GiB | time | memory |"
    )
    print("|---|---|---|---|---|")
    for name, values in results.items():
        seconds, memory = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"| {name} | {seconds:.2f} | {memory:.2f} | {seconds / base[0]:.2f}x | {memory / base[1]:.3f}x |")
    print(flush=True)


def step_seconds(options: list[str], steps: int) -> list[float]:
    """Seconds of each step of the debug job after the first five."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
        command += ["-m", "flame_ext.train", "--job.config_file=configs/debug.toml", f"--job.dump_folder={folder}/run"]
        command += [f"--training.steps={steps}", "--checkpoint.interval=1000", "--seed.verify=none", *options]
        command += ["--checkpoint.no-last_save_in_hf", "--metrics.no-enable-tensorboard"]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    tokens = lines[0]["tokens_seen"]
    return [tokens / line["tokens_per_second"] for line in lines[5:]]


def compare_steps(rounds: int, steps: int) -> None:
    """Print a row for each variant, relative to cross-entropy alone. Means, since some steps run no teacher."""
    results: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(rounds):
        for name, options in STEPS.items():
            results[name].append(statistics.mean(step_seconds(options, steps)))
    base = results["cross-entropy alone"]
    print("| debug job, 8 x 256 tokens | s a step | each round | to cross-entropy alone |")
    print("|---|---|---|---|")
    for name, values in results.items():
        ratio = statistics.median(value / plain for value, plain in zip(values, base, strict=True))
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"| {name} | {statistics.median(values):.3f} | {each} | {ratio:.2f}x |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="of each run of the debug job; 5 are not counted")
    arguments = parser.parse_args()
    import torch

    print(
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, medians of {arguments.rounds} rounds\n"
    )
    compare(info_nce_case, ["naive", "tiled"], arguments.rounds, 16384, 1024)
    compare(cross_entropy_case, ["host", "chunked"], arguments.rounds, 8192, 50304)
    compare_steps(arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
