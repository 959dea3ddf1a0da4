"""Kills runs at random moments and starts them again until they finish: each has to end as the run that nobody killed.

``python -m tests.faults.soak KILLS [SEED]`` (``make soak KILLS=300``) goes round one rank and two, saves in the foreground and in the
background, and kills of all ranks, of one, and of none but the exporter. It ends with exit code 1 and a line for each finding.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing as mp
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch

from tests.faults.test_resume import saved
from tests.ranks import train

OPTIONS = (
    "--training.seq_len=32", "--training.local_batch_size=2", "--training.global_batch_size=4", "--seed.verify=none",
    "--lr_scheduler.warmup_steps=0", "--training.steps=9", "--checkpoint.interval=2", "--checkpoint.keep_latest_k=2",
    "--export.interval=4", "--comm.init_timeout_seconds=20",  # there is no torchrun to end a rank that waits for one that was killed
)  # fmt: skip
STARTS_AT_MOST = 60  # of one run: far more than it takes to get on by a step
_UNTIL_EXPORTS = 5  # seconds in which a run has made most of its steps; the rest is its exporters'
ENDS_WITHIN = 30  # seconds after a kill, for what is left of the run


def result(folder: Path) -> dict[str, Any]:
    """What a run has to leave: the names of its files, and what must not depend on when and how often it was started."""
    found: dict[str, Any] = {str(file.relative_to(folder)): None for file in folder.rglob("*") if file.is_file()}
    for name in found:
        if name.startswith("hf/") and not name.endswith(("README.md", "export.json")):
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for step in folder.glob("checkpoint/step-*"):
        # Python's own generator is not seeded by torchtitan, and begins anywhere.
        state = {key: value for key, value in saved(step).items() if not re.fullmatch(r"rng\.rank_\d+\.python", key)}
        for key, value in state.items():
            value = value.contiguous().flatten().view(torch.uint8).numpy() if isinstance(value, torch.Tensor) else value
            found[f"{step.name}: {key}"] = hashlib.sha256(pickle.dumps(value)).hexdigest()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
    return found


def processes_in(folder: Path) -> Iterator[int]:
    """The processes that were started for a run of this folder, or have a file of it open."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            opened = [str(descriptor.readlink()) for descriptor in (process / "fd").iterdir()]
            if any(word.startswith(f"{folder}/") or word.endswith(f"={folder}") for word in (*words, *opened)):
                yield int(process.name)


def kill_at_random(folder: Path, rng: random.Random, seconds: float, kills: list[str]) -> Any:
    """Returns a function for ``watch`` that waits up to ``seconds``, or often less, and kills what is still running."""

    def watch(processes: list[mp.Process]) -> None:
        end = time.monotonic() + rng.uniform(0, rng.choice([seconds, _UNTIL_EXPORTS]))
        while time.monotonic() < end and any(process.is_alive() for process in processes):
            time.sleep(0.01)
        whom = rng.choice(["all ranks", "one rank", "others"])
        pids = [process.pid for process in processes if process.is_alive() and process.pid is not None]
        if whom == "one rank":
            pids = pids[-1:]
        elif whom == "others":
            ranks = {*pids, os.getpid()}
            pids = [pid for pid in processes_in(folder) if pid not in ranks] or pids
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if pids:
            kills.append(whom)

    return watch


def soak(root: Path, number: int, seed: int) -> list[str]:
    """Kills at least ``number`` times; returns the findings."""
    rng, kills, findings = random.Random(seed), [], []
    layouts = []
    for layout, (ranks, mode) in enumerate(product((1, 2), ("disabled", "async"))):
        options, folder = (*OPTIONS, f"--checkpoint.async_mode={mode}"), root / f"unbroken-{layout}"
        begin = time.monotonic()
        train(folder, *options, world_size=ranks)
        layouts.append((ranks, options, 1.2 * (time.monotonic() - begin), result(folder)))
    for run, (ranks, options, seconds, expected) in enumerate(cycle(layouts)):
        if len(kills) >= number:
            return findings
        folder = root / f"run-{run}"
        what = f"run {run} ({ranks} ranks, {options[-1]})"
        for start in range(1, STARTS_AT_MOST + 1):
            before, watch = len(kills), kill_at_random(folder, rng, seconds, kills)
            ended = train(folder, *options, world_size=ranks, check=False, watch=watch, timeout=120)
            found = [f"start {start}: process {pid} is left" for pid in _left_after_a_while(folder)]
            finished = ended.exit_codes == [0] * ranks
            if not finished and (len(kills) == before or start == STARTS_AT_MOST):
                found.append(f"start {start}: {ended.exit_codes} {ended.ranks[0].output[-1000:]}")
            if finished:
                left = result(folder)
                found += [
                    f"{name} differs" for name in {*left, *expected} if left.get(name, 0) != expected.get(name, 0)
                ]
            for finding in sorted(found):
                findings.append(f"{what}: {finding}")
                print(findings[-1], flush=True)
            if finished:
                break
        print(f"{what}: {start} starts, {len(kills)} kills in all, {len(findings)} findings", flush=True)
        shutil.rmtree(folder)
    raise AssertionError("cycle() does not end")


def _left_after_a_while(folder: Path) -> list[int]:
    deadline = time.monotonic() + ENDS_WITHIN
    while (left := [pid for pid in processes_in(folder) if pid != os.getpid()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def main(arguments: list[str]) -> int:
    number, seed = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 0
    with tempfile.TemporaryDirectory() as root:
        findings = soak(Path(root), number, seed)
    print(f"{number} kills, seed {seed}: {len(findings)} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
