"""Real processes for distributed tests: ``run_ranks`` calls a function in N gloo processes, ``train`` runs the command in them.

A fork server is prepared once (tests/fork_server.py); each rank is a fork of it, with torchrun's environment.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_OLMO = REPOSITORY / "tests" / "assets" / "tiny_olmo"
DEBUG_TOML = REPOSITORY / "configs" / "debug.toml"

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["tests.fork_server"])


@dataclass
class RankResult:
    """What one rank left."""

    exit_code: int
    output: str
    """Its stdout and stderr."""
    value: Any = None
    """What its function returned."""


def free_port() -> int:
    """A port at which nobody listens, below those that the kernel gives to connections, since it might give one away meanwhile."""
    while True:
        port = SystemRandom().randrange(20000, 29000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    folder: Path,
    env: dict[str, str] | None = None,
    watch: Callable[[list[mp.Process]], None] | None = None,
) -> list[RankResult]:
    """Call ``function(*args)`` in every rank and wait; a rank that outlives ``timeout`` seconds fails the test.

    Args:
        function: importable from its module.
        folder: for outputs and results, one file a rank.
        env: beside torchrun's variables.
        watch: called with the processes once they run, to do something to them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(world_size):
        variables = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(env or {}),
        }
        files = (folder / f"rank{rank}.log", folder / f"rank{rank}.pickle")
        for file in files:
            file.unlink(missing_ok=True)
        process = _context.Process(target=_rank_main, args=(function, args, variables, *files), daemon=True)
        process.start()
        processes.append(process)
    if watch is not None:
        watch(processes)
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    results = []
    for rank, process in enumerate(processes):
        log, value = folder / f"rank{rank}.log", folder / f"rank{rank}.pickle"
        output = log.read_text(errors="replace") if log.exists() else ""
        results.append(
            RankResult(process.exitcode, output, pickle.loads(value.read_bytes()) if value.exists() else None)
        )
    if late:
        tails = "\n".join(f"--- rank {rank}\n{results[rank].output[-3000:]}" for rank in late)
        raise TimeoutError(f"ranks {late} still ran after {timeout} s\n{tails}")
    return results


def _rank_main(function: Callable[..., Any], args: tuple, variables: dict[str, str], log: Path, value: Path) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(REPOSITORY)
    os.environ.clear()  # that of the server which forks was the first test's
    # Whatever seeding or resuming did not write is NaN, and shows.
    os.environ.update({"FLAME_EXT_POISON_PARAMETERS": "1", **variables})
    sys.path[:0] = filter(None, [os.environ.get("FLAME_EXT_TEST_PATH")])
    import torch

    torch.set_num_threads(1)
    result = function(*args)
    value.write_bytes(pickle.dumps(result))
    sys.stdout.flush()


@dataclass
class TrainRun:
    """One run of the command."""

    ranks: list[RankResult]
    dump_folder: Path

    @property
    def exit_codes(self) -> list[int]:
        return [rank.exit_code for rank in self.ranks]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.dump_folder / "metrics.jsonl").read_text().splitlines()]

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.metrics]


def train(
    dump_folder: Path,
    *options: str,
    world_size: int = 1,
    timeout: float = 120,
    config: Path = DEBUG_TOML,
    check: bool = True,
    env: dict[str, str] | None = None,
    watch: Callable[[list[mp.Process]], None] | None = None,
) -> TrainRun:
    """Run ``flame_ext.train`` on the debug configuration (or ``config``) in ``world_size`` processes.

    The proof by a second copy of the model is off unless asked for, and nothing is compiled: time.
    """
    arguments = [f"--job.config_file={config}", f"--job.dump_folder={dump_folder}", "--seed.verify=finite"]
    arguments += ["--metrics.no-enable-tensorboard", *options]
    logs = dump_folder.parent / f"{dump_folder.name}.ranks"
    ranks = run_ranks(_train_main, world_size, arguments, timeout=timeout, folder=logs, env=env, watch=watch)
    run = TrainRun(ranks, dump_folder)
    if check and any(run.exit_codes):
        raise AssertionError(f"exit codes {run.exit_codes}\n" + "\n".join(rank.output[-3000:] for rank in ranks))
    return run


def _train_main(arguments: list[str]) -> None:
    import torchtitan.train

    from flame_ext.train import main

    # torchtitan waits two seconds for other ranks at the end of each run.
    torchtitan.train.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _seconds: None)
    main(arguments)
