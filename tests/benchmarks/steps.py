"""A step against torchtitan's own model of the same shape, and what each addition costs: ``python -m tests.benchmarks --only steps``.

The peer is torchtitan's ``llama3`` with random weights; ours is a Hugging Face Llama of the same shape, seeded from random
weights, on the same text. All jobs live at once, on the CPU, and take turns step by step; :mod:`tests.benchmarks.accelerator` has
the rows of an accelerator.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flame_ext.hf_config import REVERSE_FIELD
from tests.benchmarks.common import Table, in_fresh_process, quartiles, ratios, spread, verdict
from tests.benchmarks.jobs import PLAIN, Job, Shape, column, in_turns, save_backbone, write_text

LINEAR = "--future_predictor.head_type=linear"  # the default; the debug job has an MLP
NATIVE, CE, FUTURE = (
    "torchtitan's `llama3`, random weights",
    "Hugging Face backbone, cross-entropy",
    "+ future predictor",
)
DOCUMENTS = "+ document boundaries"
REVERSE = "+ future predictor, `summary_method = reverse_lm`"
NO_FUTURE = ("--future_encoder.no-enable", "--future_predictor.no-enable")
COMPILED = (NATIVE, CE, DOCUMENTS, FUTURE)
JOBS: dict[str, Job] = {
    NATIVE: Job("host"),
    CE: Job("ours", tuple(PLAIN)),
    DOCUMENTS: Job("ours", (*PLAIN, "--data.document_attention")),
    FUTURE: Job("ours", (LINEAR,)),
    "+ future predictor, `teacher_fraction = 0.5`": Job("ours", (LINEAR, "--future_encoder.teacher_fraction=0.5")),
    "+ future predictor, `teacher_interval = 4`": Job("ours", (LINEAR, "--future_encoder.teacher_interval=4")),
    "+ future predictor, document boundaries": Job("ours", (LINEAR, "--data.document_attention")),
    "+ future predictor, `summary_method = query`": Job("ours", (LINEAR, "--future_encoder.summary_method=query")),
    REVERSE: Job("ours", (LINEAR, "--future_encoder.summary_method=reverse_lm")),
    "+ future predictor and action layer": Job("ours", (LINEAR, "--action_layer.enable", "--action_layer.top_k=8")),
    "+ `mtp`, parallel": Job("ours", (*NO_FUTURE, "--mtp.enable")),
    "+ `mtp`, sequential": Job("ours", (*NO_FUTURE, "--mtp.enable", "--mtp.kind=sequential")),
    **{
        f"+ `{name}`": Job("ours", (*NO_FUTURE, f"--{name}.enable"))
        for name in ("token_order", "future_bag", "next_latent")
    },
}
QUICK = Shape(layers=2, hidden=64, intermediate=176, heads=4, vocabulary=512, batch=4, seq_len=128)
ON_CPU = Shape(layers=4, hidden=256, intermediate=688, heads=8, vocabulary=4096, batch=4, seq_len=256)
DEVICE_OPTIONS = (
    *("--training.mixed_precision_param=bfloat16", "--compile.enable"),
    *("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
    "--optimizer.implementation=fused",
)


def jobs_of(
    shape: Shape, scratch: Path, options: Sequence[str] = (), rows: Sequence[str] = tuple(JOBS)
) -> dict[str, tuple[Any, ...]]:
    """The arguments of :func:`tests.benchmarks.jobs.worker` for each row."""
    backbone, text = save_backbone(scratch / "backbone", shape), write_text(scratch / "text")
    of_rows = {name: (*JOBS[name].options, *options) for name in rows}
    if REVERSE in of_rows:
        of_rows[REVERSE] += (f"--future_encoder.reverse_model={save_reverse_model(scratch / 'reverse', shape)}",)
    return {
        name: (Job(JOBS[name].kind, own), shape, str(backbone), str(text), str(scratch / f"run{number}"))
        for number, (name, own) in enumerate(of_rows.items())
    }


def save_reverse_model(folder: Path, shape: Shape) -> Path:
    """A random model of that shape that says that it reads from right to left."""
    config = save_backbone(folder, shape) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), REVERSE_FIELD: True}))
    return folder


def measure(quick: bool = False) -> list[Table]:
    """The tables ``steps`` and ``steps-compiled``."""
    shape, steps = (QUICK, 3) if quick else (ON_CPU, 40)
    warm_up = 1 if quick else 5
    with tempfile.TemporaryDirectory() as scratch:
        found = in_turns(jobs_of(shape, Path(scratch)), steps, warm_up)
    with tempfile.TemporaryDirectory() as scratch:
        compiled = in_turns(jobs_of(shape, Path(scratch), ("--compile.enable",), COMPILED), steps, warm_up)
    return [table_of(shape, found), compiled_table(shape, compiled)]


def compiled_table(shape: Shape, found: dict[str, list[dict[str, Any]]]) -> Table:
    """As :func:`table_of`, with ``compile.enable`` on both sides: layers and losses by inductor."""
    rows = []
    for name, taken in found.items():
        to = [f"{ratio_to(found, name, base, 'wall'):.2f}x" for base in (NATIVE, CE)]
        rows.append([name, spread(column(taken, "wall"), 3), *to])
    notes = [f"{shape}, float32, `compile.enable`, {len(found[CE])} steps in turns.", verdicts(found)]
    return Table("steps-compiled", ["", "s a step", "to native", "to cross-entropy"], rows, notes, found)


def table_of(shape: Shape, found: dict[str, list[dict[str, Any]]]) -> Table:
    """Wall and CPU seconds of each row, to the native model's and to plain cross-entropy's."""
    rows = []
    for name, taken in found.items():
        cells = [f"{ratio_to(found, name, base, unit):.2f}x" for unit in ("wall", "cpu") for base in (NATIVE, CE)]
        rows.append([name, spread(column(taken, "wall"), 3), cells[0], cells[1], cells[2], cells[3]])
    notes = [
        f"{shape}, float32, {len(found[CE])} steps in turns; ratios of each round, their median (of `teacher_interval`: of the "
        "means).",
        verdicts(found),
        profile_line(found),
        contrastive_line(shape, found),
    ]
    columns = ["", "s a step", "to native", "to cross-entropy", "CPU time, to native", "CPU time, to cross-entropy"]
    return Table("steps", columns, rows, [*notes[:2], " ".join(notes[2:])], found)


def verdicts(found: dict[str, list[dict[str, Any]]]) -> str:
    """What became of the goals that a CPU can be asked for; the last one was set for OLMo-1B's shape."""
    slower, documents, future = (
        ratio_to(found, name, base, "wall") for name, base in ((CE, NATIVE), (DOCUMENTS, CE), (FUTURE, CE))
    )
    return " ".join(
        (
            verdict("Speed of plain cross-entropy to the native model", 1 / slower, 0.95, at_most=False),
            verdict("Document boundaries", documents, 1.05),
            verdict("Future predictor to cross-entropy (goal set for OLMo-1B's shape)", future, 1.4),
        )
    )


def profile_line(found: dict[str, list[dict[str, Any]]]) -> str:
    """Where the time of the objective goes."""
    total = quartiles(column(found[FUTURE], "wall"))[1]
    names = sorted({name for step in found[FUTURE] for name in step["parts"]})
    shares = {name: quartiles([step["parts"].get(name, 0.0) for step in found[FUTURE]])[1] / total for name in names}
    return "Parts of the step with the future predictor: " + ", ".join(f"{n} {s:.0%}" for n, s in shares.items()) + "."


def contrastive_seconds(positions: int, size: int, runs: int = 5) -> list[float]:
    """Seconds of InfoNCE alone, forward and backward, every position a query and a key; in a process of its own.

    In bfloat16 on an accelerator, as autocast has it, else in float32.
    """
    import time

    import torch
    import torch.nn.functional as F

    from flame_ext.objective.contrastive import info_nce
    from tests.benchmarks.jobs import synchronise

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    queries, keys = (F.normalize(torch.randn(positions, size, device=device), dim=-1).to(dtype) for _ in range(2))
    every, targets = torch.ones(positions, dtype=torch.bool, device=device), torch.arange(positions, device=device)
    seconds = []
    for _ in range(runs + 1):
        leaf = queries.clone().requires_grad_()
        synchronise()
        begin = time.perf_counter()
        info_nce(leaf, keys, every, every, targets, 0.1).loss_sum.backward()
        synchronise()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def contrastive_line(shape: Shape, found: dict[str, list[dict[str, Any]]]) -> str:
    """The loss's share of the step with it."""
    alone = quartiles(in_fresh_process(contrastive_seconds, shape.tokens, shape.hidden))[1]
    share = alone / quartiles(column(found[FUTURE], "wall"))[1]
    met = "met" if share <= 0.04 else "**missed**"
    what = f"InfoNCE alone, {shape.tokens:,} positions of {shape.hidden}: {share:.1%} of the step"
    return f"{what}; goal (32k positions) at most 4 %: {met}."


def ratio_to(found: dict[str, list[dict[str, Any]]], name: str, base: str, unit: str) -> float:
    """Median over rounds; the ratio of means for a row whose steps are not alike."""
    values, peers = column(found[name], unit), column(found[base], unit)
    return sum(values) / sum(peers) if "interval" in name else quartiles(ratios(values, peers))[1]


def with_teacher(shape: Shape, flops_per_token: float) -> float:
    """Operations a token with the teacher's forward: a third of the step's, without the output embedding."""
    return flops_per_token + flops_per_token / 3 - 2 * shape.vocabulary * shape.hidden
