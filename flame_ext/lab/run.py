"""Runs a plan: what is done is not done again, what was stopped goes on, on all devices at once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from flame_ext.distributed import cores
from flame_ext.errors import ConfigError, UserError
from flame_ext.files import write_json
from flame_ext.lab.data import is_written, record_of, vocabulary_size, write_task
from flame_ext.lab.job import JOB, LOG, PLAN, RESULT, SPECIFICATION
from flame_ext.lab.origin import WEIGHTS, digest_of_rows, origin_of, other_origin
from flame_ext.lab.plan import Plan, ReverseRun, Run, Tables, as_toml
from flame_ext.lab.tokenizer import tokenizer_of
from flame_ext.operations import operations_per_token, tokens_of_a_step
from flame_ext.preflight.parse import parse
from flame_ext.run.lock import FolderLock
from flame_ext.run.signals import EXIT_PREEMPTED

Job = Run | ReverseRun
Needs = dict[Run, ReverseRun]  # runs that predict the states of a reverse model, which is trained before


@dataclass
class _Slot:
    """A place for one run at a time: a device, or a share of the processor's cores."""

    environment: dict[str, str]
    run: Job | None = None
    process: subprocess.Popen[bytes] | None = None


def run_plan(plan: Plan, folder: Path, jobs: int | None) -> int:
    """Runs what is left of a plan, ``jobs`` at a time; returns 0, or 75 if a signal has stopped it.

    Raises a UserError if the plan is not the one that the folder was begun with, or if a run fails; the others are run before.
    """
    disable_progress_bar()
    disable_progress_bars()  # of datasets, that tasks are written as
    lock = FolderLock(folder)
    lock.acquire()
    try:
        runs = list(plan.runs())
        needs = prepare(plan, runs, folder)
        left = [run for run in runs if not (folder / run.folder / RESULT).is_file()]
        waiting = _with_reverse_models(left, needs, folder)
        first = f"; {len(waiting) - len(left)} reverse models to train for them" if len(waiting) > len(left) else ""
        print(f"{folder}: {len(runs)} runs, {len(runs) - len(left)} done{first}", flush=True)
        with _stopped_by_signals() as stop:
            failed = _run_all(waiting, needs, folder, _slots(jobs), stop)
    finally:
        lock.release()
    if failed:
        raise UserError(
            f"{len(failed)} of {len(waiting) + len(runs) - len(left)} runs failed, the first with: "
            f"{_last_line(folder / failed[0].folder)}"
        )
    return 0 if all((folder / run.folder / RESULT).is_file() for run in runs) else EXIT_PREEMPTED


def _with_reverse_models(left: list[Run], needs: Needs, folder: Path) -> list[Job]:
    """The runs with, before the first that needs it, each reverse model that is not there; results alone do not need it again."""
    found: dict[Job, None] = {}
    for run in left:
        if (needed := needs.get(run)) is not None and not _is_trained(needed, folder):
            found[needed] = None
        found[run] = None
    return list(found)


def _is_trained(run: ReverseRun, folder: Path) -> bool:
    return (folder / run.folder / RESULT).is_file() and (folder / run.export / "config.json").is_file()


def prepare(plan: Plan, runs: list[Run], folder: Path) -> Needs:
    """Writes tasks, initial weights, and the configuration of each run, as far as they are not there; checks all configurations.

    Returns the reverse models that runs need. Checks what is there before it writes anything, but for the steps of equal compute; the
    plan's list of runs comes last.
    """
    evaluation = {"generations": plan.section.generations, "temperature": plan.section.temperature}
    for name, task in plan.tasks.items():
        is_written(task, folder / "tasks" / name)
    for run in runs:
        _check_begun(_record(run, folder), _sizes(plan, run), "model.", folder)
        if run.budget == "tokens":
            _check_job(folder / run.folder, tables := plan.job(run, folder))
            _check_result(folder / run.folder, {"digest": _digest(plan, run)})
            if (reverse := plan.reverse(run, tables["training"]["steps"])) is not None:
                _check_job(folder / reverse.folder, plan.reverse_job(reverse, folder))
                _check_result(folder / reverse.folder, {"digest": _digest(plan, reverse)})
        for file in (SPECIFICATION, RESULT):
            _check_begun(folder / run.folder / file, evaluation, "plan.", folder / run.folder, others=True)
    for name, task in plan.tasks.items():
        write_task(task, folder / "tasks" / name)
    for run in runs:
        _write_model(plan, run, folder)
    facts: dict[tuple[str, str, str], tuple[Any, Any]] = {}
    needs: Needs = {}
    rows = {task: digest_of_rows(folder / "tasks" / task) for task in plan.tasks}
    origins = {run.model: origin_of(rows[run.task], folder / run.model) for run in runs}
    for run in runs:  # those of "tokens" come first
        steps = None
        if run.budget == "compute":
            steps = _steps_of_equal_compute(run, {o: facts[run.task, o, "tokens"] for o in plan.objectives})
        tables = plan.job(run, folder, steps)
        _write_job(folder / run.folder, tables)
        if (reverse := plan.reverse(run, tables["training"]["steps"])) is not None:
            needs[run] = reverse
        if (kind := (run.task, run.objective, run.budget)) not in facts:
            facts[kind] = _facts(folder / run.folder, folder / run.model if reverse else None)
        about = {"learn": plan.learn(run), "digest": _digest(plan, run, steps), "origin": origins[run.model]}
        _write_specification(run, folder, facts[kind], evaluation | about)
    for reverse in dict.fromkeys(needs.values()):
        _write_job(folder / reverse.folder, plan.reverse_job(reverse, folder))
        about = {"learn": plan.learn(reverse), "digest": _digest(plan, reverse), "origin": origins[reverse.model]}
        _write_specification(reverse, folder, _facts(folder / reverse.folder), about)
    said = {"name": plan.section.name, "runs": [run.folder.as_posix() for run in runs]}
    write_json(folder / PLAN, said | {"reverse": sorted({run.folder.as_posix() for run in needs.values()})})
    return needs


def _facts(folder: Path, untrained: Path | None = None) -> tuple[Any, Any]:
    """A run's configuration, checked, and its operations; ``untrained`` has the shapes of a reverse model that is not there yet."""
    arguments = [f"--job.config_file={folder / JOB}"]
    if untrained is not None:
        arguments += [f"--future_encoder.reverse_model={untrained}", "--future_encoder.assume_reverse"]
    config = parse(arguments)
    return config, operations_per_token(config, trains_reverse=untrained is not None)


def _write_specification(run: Job, folder: Path, facts: tuple[Any, Any], about: Tables) -> None:
    """What the run's process needs and its result repeats. A ConfigError if there is a result of something else."""
    config, operations = facts
    said = {
        "run": asdict(run),
        "task_folder": os.path.relpath(folder / "tasks" / run.task, folder / run.folder),
        **about,
        **{"steps": config.training.steps, "tokens_of_a_step": tokens_of_a_step(config)},
        "operations_per_token": asdict(operations) | {"total": operations.total},
    }
    _check_result(folder / run.folder, said)
    write_json(folder / run.folder / SPECIFICATION, said)


def _digest(plan: Plan, run: Job, steps: int | None = None) -> str:
    """Of all that determines a run's result: its configuration, with paths below the plan's folder, the model's sizes and the task."""
    job = plan.reverse_job(run, Path()) if isinstance(run, ReverseRun) else plan.job(run, Path(), steps)
    everything = [as_toml(job), _sizes(plan, run), record_of(plan.tasks[run.task])]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def _check_result(folder: Path, now: Tables) -> None:
    """Raises a ConfigError if the result that is there is not that of this run, as far as ``now`` says.

    Results of earlier versions have no digest, and are compared by their steps and operations; of some no origin is known.
    """
    file = folder / RESULT
    was = json.loads(file.read_text()) if file.is_file() else now
    compared = ("digest",) if "digest" in was else ("steps", "tokens_of_a_step", "operations_per_token")
    if key := next((key for key in compared if key in now and was.get(key) != now[key]), None):
        raise ConfigError(
            f"{file} is the result of another plan: {key} is {was.get(key)!r}, and that of this plan {now[key]!r} (digest: of job.toml, "
            f"model and task); take another --output, or remove {folder}"
        )
    if "origin" in now and (other := other_origin(was.get("origin", {}), now["origin"])) is not None:
        raise ConfigError(f"{file} is a result of {other}: take another --output, or remove {folder}")


def _steps_of_equal_compute(run: Run, facts: dict[str, tuple[Any, Any]]) -> int:
    """The steps for which this objective makes as many operations as the cheapest one in all of its steps."""
    of_all = {name: c.training.steps * tokens_of_a_step(c) * o.total for name, (c, o) in facts.items()}
    return max(1, round(facts[run.objective][0].training.steps * min(of_all.values()) / of_all[run.objective]))


def _check_begun(file: Path, now: Tables, prefix: str, folder: Path, others: bool = False) -> None:
    """Raises a ConfigError that names what ``file``, if it is there, has otherwise than ``now``; it may have ``others``."""
    was = json.loads(file.read_text()) if file.is_file() else now
    if key := next((key for key in (now if others else {**now, **was}) if was.get(key) != now.get(key)), None):
        begun = f"was begun with {prefix}{key} = {was.get(key)!r}, and the plan now says {now.get(key)!r}"
        raise ConfigError(f"{file} {begun}: take another --output, or remove {folder}")


def _sizes(plan: Plan, run: Job) -> Tables:
    """What determines the initial weights of a seed: ``[model]``, and the sizes that are the task's."""
    task = plan.tasks[run.task]
    sizes = {"vocab_size": vocabulary_size(task), "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    return sizes | {"max_position_embeddings": task.length} | plan.model


def _record(run: Run, folder: Path) -> Path:
    """Where the sizes are that the run's initial weights were made with."""
    return (folder / run.model).with_suffix(".json")


def _write_model(plan: Plan, run: Run, folder: Path) -> None:
    """Random weights of the run's seed, as transformers initialises them, with the task's tokenizer; the record last."""
    target, sizes = folder / run.model, _sizes(plan, run)
    if _record(run, folder).is_file() and (target / WEIGHTS).is_file():  # the record is written last
        return
    try:
        config = AutoConfig.for_model(**sizes)
        torch.manual_seed(run.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as e:  # whatever a size that cannot be right leads to
        raise ConfigError(
            f"[model]: transformers cannot build it: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
        ) from e
    model.save_pretrained(target)
    tokenizer_of(plan.tasks[run.task]).save_pretrained(target)
    write_json(_record(run, folder), sizes)


def _check_job(folder: Path, tables: Tables) -> bool:
    """Whether the run's configuration is there; a ConfigError if it is another one."""
    text, file = as_toml(tables), folder / JOB
    if not file.is_file():
        return False
    if (was := file.read_text(encoding="utf-8")) != text:
        now, then = (next((a for a, b in zip(*pair, strict=False) if a != b), "") for pair in _both_ways(text, was))
        raise ConfigError(
            f"{file} was begun with {then!r}, and the plan now says {now!r}: take another --output, or remove {folder}"
        )
    return True


def _write_job(folder: Path, tables: Tables) -> None:
    if not _check_job(folder, tables):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = (folder / JOB).with_suffix(".tmp")
        temporary.write_text(as_toml(tables), encoding="utf-8")
        temporary.replace(folder / JOB)


def _both_ways(one: str, other: str) -> Iterator[tuple[list[str], list[str]]]:
    yield one.splitlines(), other.splitlines()
    yield other.splitlines(), one.splitlines()


def _slots(jobs: int | None) -> list[_Slot]:
    """A slot for each device, or on a machine without one for each two cores; ``jobs`` of them if that is given."""
    devices = _devices()
    count = jobs or len(devices) or max(1, cores() // 2)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // count)))}
    return [_Slot(threads | (devices[number % len(devices)] if devices else {})) for number in range(count)]


def _devices() -> list[dict[str, str]]:
    """For each accelerator the variable by which a process sees it alone."""
    count = torch.accelerator.device_count()
    variable = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
    named = (
        os.environ.get(variable, "").split(",")
        if os.environ.get(variable)
        else [str(number) for number in range(count)]
    )
    return [{variable: name} for name in named[:count]]


def _run_all(waiting: list[Job], needs: Needs, folder: Path, slots: list[_Slot], stop: list[int]) -> list[Job]:
    """Runs them, in their order; ends what runs when ``stop`` has something in it. Returns those that have failed."""
    failed: list[Job] = []
    untrained = {run for run in waiting if isinstance(run, ReverseRun)}

    def is_ready(run: Job) -> bool:
        return isinstance(run, ReverseRun) or needs.get(run) not in untrained

    while any(slot.process for slot in slots) or (waiting and not stop):
        for slot in slots:
            if slot.process is not None and (code := slot.process.poll()) is not None:
                assert slot.run is not None
                failed += [slot.run] if code not in (0, EXIT_PREEMPTED, -signal.SIGTERM) else []
                print(f"{slot.run.folder}: {_words(code, folder / slot.run.folder)}", flush=True)
                if code == 0:
                    untrained -= {slot.run}
                elif isinstance(slot.run, ReverseRun):
                    without = [run for run in waiting if isinstance(run, Run) and needs.get(run) == slot.run]
                    waiting = [run for run in waiting if run not in without]
                    print(f"{slot.run.folder}: {len(without)} runs wait for it and are not begun", flush=True)
                slot.process = None
            ready = None if slot.process or stop else next(filter(is_ready, waiting), None)
            if ready is not None:
                waiting = [run for run in waiting if run != ready]
                slot.run, slot.process = ready, _start(folder / ready.folder, slot.environment)
            elif slot.process is not None and stop:
                slot.process.terminate()  # again and again, since it may not listen yet
        time.sleep(0.2 if not stop else 1)
    return failed


def _start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C reaches it once, from here."""
    with (folder / LOG).open("ab") as log:
        command = [sys.executable, "-m", "flame_ext.lab.job", str(folder), str(os.getpid())]
        return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True)


def _words(code: int, folder: Path) -> str:
    if code == 0:
        result = json.loads((folder / RESULT).read_text())
        figures = result["figures"] or {"held-out loss": result["held_out"][-1]["loss"]}
        return "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))
    return (
        "stopped" if code in (EXIT_PREEMPTED, -signal.SIGTERM) else f"failed with exit code {code}, see {folder / LOG}"
    )


def _last_line(folder: Path) -> str:
    lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'no output'} ({folder / LOG})"


@contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM, SIGINT or SIGHUP comes."""
    found: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        found.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
