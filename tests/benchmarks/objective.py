"""What the objective costs: ``python tests/benchmarks/objective.py [--rounds 3] [--steps 40]`` prints Markdown tables.

Each figure stands beside its peer from the same run: the tiled InfoNCE beside the naive formula, our cross-entropy beside
the host's, a step with the objective beside one of plain cross-entropy. They alternate, steps of training one by one, so
that a slow minute of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import platform
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import flame_ext  # noqa: F401  (before torchtitan)

REPOSITORY = Path(__file__).resolve().parent.parent.parent

PLAIN = ["--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable"]
ACTION = ["--action_layer.enable", "--action_layer.top_k=8"]
WARM_UP = 5  # steps that are not counted
STEPS: dict[str, list[str]] = {
    "cross-entropy alone": PLAIN,
    "anticausal, no document boundaries": ["--future_encoder.no-respect_doc_boundaries"],
    "anticausal": [],
    "anticausal, linear head": ["--future_predictor.head_type=linear"],
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


def step_worker(pipe: Connection, options: list[str], folder: str) -> None:
    """The debug job, a step for each message; answers with its seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(REPOSITORY)
    from torchtitan.tools.logging import logger

    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer

    arguments = ["--job.config_file=configs/debug.toml", f"--job.dump_folder={folder}", "--seed.verify=none"]
    logger.setLevel("ERROR")
    trainer = FutureTrainer(parse([*arguments, "--metrics.no-enable-tensorboard", *options]))
    trainer.checkpointer.load()
    batches = trainer.batch_generator(trainer.dataloader)
    while pipe.recv():
        trainer.step += 1
        begin = time.perf_counter()
        trainer.train_step(batches)
        pipe.send(time.perf_counter() - begin)
    trainer.close()


def compare_steps(steps: int) -> None:
    """Print a row for each variant, relative to cross-entropy alone, of which every round of steps has one.

    Means over the steps, since some have no teacher; the ratio of a round is that to its own plain step.
    """
    context = mp.get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    with tempfile.TemporaryDirectory() as folder:
        pipes = {}
        for number, (name, options) in enumerate(STEPS.items()):
            pipes[name], end = context.Pipe()
            context.Process(target=step_worker, args=(end, options, f"{folder}/{number}"), daemon=True).start()
        for step in range(WARM_UP + steps):
            for name, pipe in pipes.items():
                pipe.send(True)
                taken = pipe.recv()
                if step >= WARM_UP:
                    seconds[name].append(taken)
        for pipe in pipes.values():
            pipe.send(False)
    plain = seconds["cross-entropy alone"]
    print(f"| debug job, 8 x 256 tokens, {steps} steps | s a step (quartiles) | to cross-entropy alone | (quartiles) |")
    print("|---|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, plain, strict=True)]
        # Of an interval of four one step is dear: its quartiles say nothing, its mean does.
        ratio = statistics.mean(values) / statistics.mean(plain) if "interval" in name else statistics.median(ratios)
        print(f"| {name} | {_quartiles(values)} | {ratio:.2f}x | {_quartiles(ratios)} |")
    print(flush=True)


def _quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of the losses alone; 0 = leave them out")
    parser.add_argument("--steps", type=int, default=40, help="of the debug job in each variant")
    arguments = parser.parse_args()
    import torch

    print(
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, medians of {arguments.rounds} rounds\n"
    )
    if arguments.rounds:
        compare(info_nce_case, ["naive", "tiled"], arguments.rounds, 16384, 1024)
        compare(cross_entropy_case, ["host", "chunked"], arguments.rounds, 8192, 50304)
    compare_steps(arguments.steps)


if __name__ == "__main__":
    main()
