"""What the objective costs: ``python -m tests.benchmarks.objective [--rounds 3] [--steps 40]`` prints Markdown tables.

Each figure stands beside its peer from the same run: the tiled InfoNCE beside the naive formula, our cross-entropy beside
torchtitan's, a step with the objective beside one of plain cross-entropy. They alternate, steps of training one by one, so
that a slow minute of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable

import flame_ext  # noqa: F401  (before torchtitan)
from tests.benchmarks.common import Table, in_fresh_process, quartiles, ratios, spread, verdict
from tests.benchmarks.jobs import PLAIN, WARM_UP, Job, column, in_turns
from tests.benchmarks.steps import ratio_to

Cost = tuple[float, float]
"""Seconds, and GiB beyond what there was."""

PEER = "cross-entropy alone"
ACTION = ["--action_layer.enable", "--action_layer.top_k=8"]
STEPS: dict[str, list[str]] = {
    PEER: PLAIN,
    "anticausal, no document boundaries": ["--future_encoder.no-respect_doc_boundaries"],
    "anticausal": [],
    "anticausal, linear head": ["--future_predictor.head_type=linear"],
    "anticausal, all the future": ["--future_encoder.future_k=0"],
    "mean of 32": ["--future_encoder.summary_method=mean"],
    "anticausal, teacher_fraction = 0.5": ["--future_encoder.teacher_fraction=0.5"],
    "anticausal, teacher_interval = 4": ["--future_encoder.teacher_interval=4"],
    "anticausal and action layer": ACTION,
}


def info_nce_case(name: str, count: int, size: int) -> Cost:
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


def cross_entropy_case(name: str, rows: int, vocabulary: int) -> Cost:
    """Seconds and extra GiB of one forward and backward on bfloat16 logits."""
    import torch
    from torchtitan.components.loss import cross_entropy_loss as host_loss

    from flame_ext.objective.cross_entropy import cross_entropy_loss

    torch.manual_seed(0)
    logits = torch.randn(1, rows, vocabulary, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(vocabulary, (1, rows))
    loss = {"host": host_loss, "chunked": cross_entropy_loss}[name]
    return _measured(lambda: loss(logits, labels).backward())


def _measured(action: Callable[[], None]) -> Cost:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    action()
    seconds = time.perf_counter() - begin
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def losses(rounds: int, keys: tuple[int, int] = (16384, 1024), logits: tuple[int, int] = (8192, 50304)) -> list[Table]:
    """The tables ``info-nce`` and ``cross-entropy``: seconds and growth of the peak of memory, to the naive formula's."""
    of_keys = f"InfoNCE, N = M = {keys[0]}, D = {keys[1]}, float32"
    of_logits = f"cross-entropy, {logits[0]} x {logits[1]} bfloat16 logits"
    return [
        compare("info-nce", of_keys, info_nce_case, ["naive", "tiled"], rounds, keys),
        compare("cross-entropy", of_logits, cross_entropy_case, ["host", "chunked"], rounds, logits),
    ]


def compare(
    table: str, title: str, function: Callable[..., Cost], names: list[str], rounds: int, shape: tuple[int, int]
) -> Table:
    """A row for each name, relative to the first, in turns."""
    results: dict[str, list[Cost]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            results[name].append(in_fresh_process(function, name, *shape))
    base = list(zip(*results[names[0]], strict=True))
    cells = []
    for name, values in results.items():
        seconds, memory = zip(*values, strict=True)
        of_time, of_memory = (quartiles(ratios(v, b))[1] for v, b in zip((seconds, memory), base, strict=True))
        cells.append([name, spread(seconds), spread(memory), f"{of_time:.2f}x", f"{of_memory:.3f}x"])
    note = "Forward and backward, each in a fresh process. *Extra* is the growth of its peak memory."
    return Table(table, [title, "s", "extra GiB", "time", "memory"], cells, [note], results)


def debug_steps(steps: int, warm_up: int = WARM_UP) -> Table:
    """The table ``objective``: the debug job's variants in turns, a step each."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = {
            name: (Job("ours", tuple(options)), None, None, None, f"{folder}/{number}")
            for number, (name, options) in enumerate(STEPS.items())
        }
        found = in_turns(jobs, steps, warm_up)
    cells = []
    for name, taken in found.items():
        walls = column(taken, "wall")
        low, _, high = quartiles(ratios(walls, column(found[PEER], "wall")))
        ratio, cpu = (ratio_to(found, name, PEER, unit) for unit in ("wall", "cpu"))
        # Of an interval of four one step is dear: its quartiles say nothing, its mean does.
        inside = "" if "interval" in name else f" ({low:.2f}-{high:.2f})"
        cells.append([name, spread(walls, 3), f"{ratio:.2f}x{inside}", f"{cpu:.2f}x"])
    notes = [
        f"The debug job: 8 x 256 tokens, `future_k = 32`, MLP head unless the row says otherwise; {steps} steps in turns; ratios of "
        "each round, their median and quartiles (of `teacher_interval`: of the means).",
        verdict("Anticausal with the default head", ratio_to(found, "anticausal, linear head", PEER, "wall"), 1.45),
        verdict("Anticausal with the MLP head", ratio_to(found, "anticausal", PEER, "wall"), 1.45),
    ]
    columns = ["", "s a step", "to cross-entropy alone", "CPU time"]
    return Table("objective", columns, cells, [notes[0], " ".join(notes[1:])], found)


def measure(quick: bool = False) -> list[Table]:
    """The tables ``info-nce``, ``cross-entropy`` and ``objective``."""
    if quick:
        return [*losses(1, (4096, 64), (512, 4096)), debug_steps(2, warm_up=1)]
    return [*losses(3), debug_steps(40)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of the losses alone; 0 = leave them out")
    parser.add_argument("--steps", type=int, default=40, help="of the debug job in each variant")
    options = parser.parse_args()
    for table in [*(losses(options.rounds) if options.rounds else []), debug_steps(options.steps)]:
        print(table.markdown(), end="\n\n")


if __name__ == "__main__":
    main()
