"""Start-up: from the start of the process to the end of step 1, against bare torchtitan's; what imports and tools take.

``python -m tests.benchmarks.startup [--rounds 5]`` prints a Markdown table. Every row is a fresh process on one rank, and
they take turns.

The peer is ``torchtitan.train`` with its own ``llama3``, in a flavor of the tiny OLMo's shape (4 layers of 128, 264 tokens),
the same tokenizer, batch, optimizer and TensorBoard, on the same text, which it reads as its own test data are read: a folder
of JSON lines, by ``load_dataset``, already in that library's cache. It starts from random weights, saves nothing, and reads
no checkpoint: what our job does beside (seeding, the proof against ``from_pretrained``, the heads) has no peer. On a CPU
torchtitan cannot start as it is; it gets the device that :func:`flame_ext.host.device.prepare_host` gives it, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flame_ext.host.device import prepare_host
from tests.benchmarks.common import (
    DEBUG_TOML,
    TINY_OLMO,
    Table,
    cpu_seconds,
    fresh,
    quartiles,
    rank_environment,
    ratios,
    spread,
    verdict,
)
from tests.benchmarks.jobs import PLAIN, Shape, give_host_the_shape, host_options, write_text

GOAL = 1.2

TINY = Shape(layers=4, hidden=128, intermediate=512, heads=4, vocabulary=264, batch=8, seq_len=256)
UNPROVED = ["--seed.verify=finite"]
TRAINING: dict[str, tuple[str, list[str]]] = {
    "torchtitan's `llama3` of the same shape, random weights": ("host", []),
    "the same, checkpoints enabled": ("host", ["--checkpoint.enable"]),
    "`configs/debug.toml`": ("ours", []),
    '`configs/debug.toml`, `verify = "finite"`': ("ours", UNPROVED),
    "cross-entropy alone": ("ours", PLAIN),
    'cross-entropy alone, `verify = "finite"`': ("ours", [*PLAIN, *UNPROVED]),
}
PEER, OURS = "torchtitan's `llama3` of the same shape, random weights", "`configs/debug.toml`"
# What is imported, or run, and nothing else.
IMPORTS: dict[str, str] = {
    "`import torch`": "import torch",
    "`import torch, transformers` and its `AutoModelForCausalLM`": "import torch; from transformers import AutoModelForCausalLM",
    "`import torchtitan.train`, with `llama3`": "import flame_ext, torchtitan.train, torchtitan.models.llama3",
    "`import flame_ext`": "import flame_ext",
    "`import flame_ext.train`": "import flame_ext.train",
    "`flame-ext --help`": "from flame_ext.tools.main import main; main(['--help'])",
    "`flame-ext inspect` of the tiny OLMo": f"from flame_ext.tools.main import main; main(['inspect', {str(TINY_OLMO)!r}])",
}
_IMPORTING = """
import contextlib, io
try:
    with contextlib.redirect_stdout(io.StringIO()):
        exec({code!r})
except SystemExit:
    pass
import sys, time
from tests.benchmarks.startup import report
report(time.monotonic(), len(sys.modules), [name for name in {watched!r} if name in sys.modules])
"""
WATCHED = ("torch", "torchtitan", "transformers", "datasets", "pandas", "pyarrow", "tensorboard", "flame_ext.trainer")


def report(now: float, modules: int, loaded: list[str]) -> None:
    """Print what :func:`tests.benchmarks.common.fresh` reads."""
    print(json.dumps({"end": now, "cpu": cpu_seconds(), "modules": modules, "loaded": loaded}), flush=True)


def train_once(kind: str, folder: str, data: str, options: list[str]) -> None:
    """In a process of its own: start a job as its command does, report at the end of step 1, and end there."""
    if kind == "host":
        # torchtitan binds the command line when it is imported.
        sys.argv = ["torchtitan.train", *host_options(TINY, folder), "--metrics.enable_tensorboard", *options]
        prepare_host()
        from torchtitan.train import Trainer, main

        give_host_the_shape(TINY, data)

        def start() -> None:
            main(Trainer)
    else:
        from flame_ext.train import main as ours
        from flame_ext.trainer import FutureTrainer as Trainer

        def start() -> None:
            ours([f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={folder}", *options])

    step = Trainer.train_step

    def one_step(self: Any, batches: Any) -> None:
        step(self, batches)
        report(time.monotonic(), len(sys.modules), [name for name in WATCHED if name in sys.modules])
        os._exit(0)

    Trainer.train_step = one_step
    start()


def measure_training(rounds: int, rows: dict[str, tuple[str, list[str]]] = TRAINING) -> dict[str, list[dict[str, Any]]]:
    """Name of each row to its rounds: ``wall`` and ``cpu`` seconds to the end of step 1, and modules loaded."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    code = "import sys; from tests.benchmarks.startup import train_once; train_once(*sys.argv[1:4], sys.argv[4:])"
    with tempfile.TemporaryDirectory() as name:
        data = write_text(Path(name) / "data")
        cache = {"HF_DATASETS_CACHE": f"{name}/cache"}
        # The first round fills caches: of the kernel's files, and of torchtitan's data.
        for number in range(rounds + 1):
            for row, (kind, options) in rows.items():
                with tempfile.TemporaryDirectory() as dump:
                    environment = {**rank_environment(), **cache, "OMP_NUM_THREADS": "1"}
                    found, begin = fresh(code, kind, f"{dump}/run", str(data), *options, env=environment)
                if number:
                    results[row].append({**found, "wall": found["end"] - begin})
    return results


def measure_imports(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The same for imports and tools."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in IMPORTS}
    for number in range(rounds + 1):
        for row, code in IMPORTS.items():
            found, begin = fresh(_IMPORTING.format(code=code, watched=WATCHED))
            if number:
                results[row].append({**found, "wall": found["end"] - begin})
    return results


def measure(quick: bool = False, rounds: int | None = None) -> list[Table]:
    """The tables ``startup`` and ``imports``."""
    rounds = rounds or (1 if quick else 7)
    training, imports = measure_training(rounds), measure_imports(rounds)
    ratio = quartiles(ratios(_column(training[OURS], "wall"), _column(training[PEER], "wall")))[1]
    of_cpu = quartiles(ratios(_column(training[OURS], "cpu"), _column(training[PEER], "cpu")))[1]
    notes = [
        f"Processes of one rank and one thread, {rounds} rounds, in turns; ratios are medians over the rounds. CPU: user and "
        "system time. torchtitan starts from random weights and reads no checkpoint.",
        verdict("Time to the first step of the debug job", ratio, GOAL) + f" By CPU time: {of_cpu:.2f}x.",
    ]
    columns = ["to the end of step 1", "s", "to torchtitan's", "CPU s", "to torchtitan's", "modules"]
    return [
        Table("startup", columns, _rows(training, PEER), notes, training),
        Table(
            "imports",
            ["", "s", "to `import torch`", "CPU s", "to `import torch`", "modules", "loaded"],
            [[*row, ", ".join(imports[row[0]][0]["loaded"])] for row in _rows(imports, "`import torch`")],
            [],
            imports,
        ),
    ]


def _column(runs: list[dict[str, Any]], name: str) -> list[float]:
    return [run[name] for run in runs]


def _rows(results: dict[str, list[dict[str, Any]]], peer: str) -> list[list[str]]:
    rows = []
    for name, runs in results.items():
        cells = [name]
        for unit in ("wall", "cpu"):
            values = _column(runs, unit)
            cells += [spread(values), f"{quartiles(ratios(values, _column(results[peer], unit)))[1]:.2f}x"]
        rows.append([*cells, str(runs[0]["modules"])])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    for table in measure(rounds=parser.parse_args().rounds):
        print(table.markdown(), end="\n\n")


if __name__ == "__main__":
    main()
