"""A plan: objectives x tasks x seeds as configurations of the trainer."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flame_ext.config.manager import check_values
from flame_ext.errors import ConfigError
from flame_ext.heads.names import HEAD_NAMES
from flame_ext.heads.registry import CONVERTER_NAME, job_config_class
from flame_ext.lab.data import rows_of
from flame_ext.lab.tasks import KINDS
from flame_ext.lab.tasks.task import Task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tables = dict[str, Any]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # a folder's
_OWN = (  # options that the lab sets itself, for every run alike
    *("job.dump_folder", "model.name", "model.flavor", "model.hf_assets_path", "checkpoint.initial_load_path"),
    *("data.sources", "validation.sources", "training.dataset", "training.dataset_path", "training.epochs"),
    *("checkpoint.enable", "checkpoint.last_save_in_hf", "checkpoint.export_dtype", "validation.enable"),
    *("training.seq_len", "validation.seq_len", "seed.rng_seed", "data.rng_seed", "debug.seed"),
)
_OF_ALL = (  # options that objectives have to share, or they would be compared after other tokens or on other rows
    *("training.steps", "training.local_batch_size", "training.global_batch_size"),
    *("validation.steps", "validation.freq", "validation.local_batch_size"),
)


@dataclass
class PlanSection:
    """The table ``[plan]``."""

    name: str = ""
    """By default the file's."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Each is a set of runs: of initial weights, which all objectives share, of new heads, and of the order of the data."""

    equal_compute: bool = False
    """Run each objective again, for as many steps as make the operations of the task's cheapest objective in all of its steps."""

    generations: int = 500
    """How many rows are generated for a run's figures; of prompts to be answered at most those that are held out."""

    temperature: float = 1.0
    """Of generations of tasks that ask for creativity; answers are generated greedily."""


@dataclass(frozen=True)
class Run:
    """One run of a plan."""

    task: str
    objective: str
    seed: int
    budget: str  # "tokens", or "compute" of a run that is shortened to the cheapest objective's operations

    @property
    def folder(self) -> Path:
        """Below the plan's own."""
        return Path("runs", self.task, self.objective, f"{self.budget}-seed-{self.seed}")

    @property
    def model(self) -> Path:
        """Where its initial weights lie, below the plan's folder."""
        return Path("models", self.task, f"seed-{self.seed}")


@dataclass(frozen=True)
class ReverseRun:
    """The training of a reverse model, for the runs of a task and seed that take so many steps and predict its states."""

    task: str
    seed: int
    steps: int

    @property
    def folder(self) -> Path:
        """Below the plan's own."""
        return Path("reverse", self.task, f"{self.steps}-steps-seed-{self.seed}")

    @property
    def model(self) -> Path:
        """Where its initial weights lie: those of the runs that use it."""
        return Run(self.task, "", self.seed, "").model

    @property
    def export(self) -> Path:
        """What it leaves, below the plan's folder."""
        return self.folder / "hf" / f"step-{self.steps}"


@dataclass(frozen=True)
class Plan:
    """What a TOML says."""

    section: PlanSection
    model: Tables
    trainer: dict[str, Tables]  # options of all runs of each task
    tasks: dict[str, Task]
    answer_alone: frozenset[str]  # tasks whose runs learn the answers of rows, and only read the prompts
    objectives: dict[str, Tables]

    def runs(self) -> Iterator[Run]:
        """All of them, those of a seed after those of the one before."""
        for seed in self.section.seeds:
            for task in self.tasks:
                for budget in ("tokens", "compute")[: 1 + self.section.equal_compute]:
                    yield from (Run(task, objective, seed, budget) for objective in self.objectives)

    def learn(self, run: Run | ReverseRun) -> str:
        """Of which tokens a run's losses are: "answer", or "row", prompt and answer."""
        return "answer" if isinstance(run, Run) and run.task in self.answer_alone else "row"

    def reverse(self, run: Run, steps: int) -> ReverseRun | None:
        """The reverse model that a run of so many steps needs and nobody has named; None if it needs none."""
        options = merged(self.trainer[run.task], self.objectives[run.objective]).get("future_encoder", {})
        needs = options.get("enable") and options.get("summary_method") == "reverse_lm"
        return ReverseRun(run.task, run.seed, steps) if needs and not options.get("reverse_model") else None

    def reverse_job(self, run: ReverseRun, folder: Path) -> Tables:
        """The trainer's configuration of a reverse model: without heads, and of whole rows, since the answer comes before its prompt."""
        chosen = {name: table for name, table in self.trainer[run.task].items() if name not in HEAD_NAMES}
        chosen = merged(chosen, {"training": {"steps": run.steps}, "data": {"reverse": True}})
        return self._job(run, folder, chosen, "reverse model", answer_alone=False)

    def job(self, run: Run, folder: Path, steps: int | None = None) -> Tables:
        """The trainer's configuration of a run below ``folder``, with ``steps`` instead of those that the plan says."""
        chosen = merged(self.trainer[run.task], self.objectives[run.objective])
        if steps is not None:
            chosen = merged(chosen, {"training": {"steps": steps}})
        if (reverse := self.reverse(run, chosen.get("training", {}).get("steps", 1000))) is not None:
            chosen = merged(chosen, {"future_encoder": {"reverse_model": str(folder / reverse.export)}})
        return self._job(run, folder, chosen, run.objective, self.learn(run) == "answer")

    def _job(self, run: Run | ReverseRun, folder: Path, chosen: Tables, what: str, answer_alone: bool) -> Tables:
        task, data, model = self.tasks[run.task], folder / "tasks" / run.task, str(folder / run.model)
        total = chosen.get("training", {}).get("steps", 1000)
        batch = chosen.get("training", {}).get("local_batch_size", 16)
        heads = any(chosen.get(name, {}).get("enable") for name in HEAD_NAMES)
        defaults: Tables = {
            "training": {"steps": total, "local_batch_size": batch, "mixed_precision_param": "float32"},
            "optimizer": {"implementation": "foreach"},
            "lr_scheduler": {"warmup_steps": max(1, total // 20)},
            "checkpoint": {"interval": max(1, total // 4), "keep_latest_k": 2, "last_save_model_only": False},
            "validation": {"freq": _validation_freq(total), "steps": -1, "local_batch_size": batch},
            "metrics": {"log_freq": max(1, total // 20), "disable_color_printing": True},
            "activation_checkpoint": {"mode": "none"},
            "model": {"converters": [CONVERTER_NAME] if heads else []},
        }
        train, test = (str(rows_of(data, split, answer_alone)) for split in ("train", "test"))
        own: Tables = {
            "job": {
                "dump_folder": str(folder / run.folder),
                "description": f"{run.task}, {what}, seed {run.seed}",
            },
            "model": {"name": "hf_causal_lm", "flavor": "auto", "hf_assets_path": model},
            "checkpoint": {
                **{"enable": True, "initial_load_path": model},
                **{"last_save_in_hf": True, "export_dtype": "float32"},
            },
            # A row and the label of its last token make a sequence: none has tokens of another row.
            "training": {"seq_len": task.length - 1},
            "validation": {
                **{"enable": True, "seq_len": task.length - 1},
                **{"sources": [{"path": test, "label": "test"}]},
            },
            "data": {"rng_seed": run.seed, "sources": [{"path": train, "label": "train"}]},
            "seed": {"rng_seed": run.seed},
            "debug": {"seed": run.seed},
        }
        tables = merged(merged(defaults, chosen), own)
        if total % tables["validation"]["freq"]:  # of steps of equal compute, which no plan says
            tables["validation"]["freq"] = _validation_freq(total)
        return tables


def _validation_freq(steps: int) -> int:
    """The steps from one validation to the next: of some ten in a run, the last one at its end."""
    if steps <= 10:
        return 1
    return next((steps // count for count in range(10, 41) if steps % count == 0), steps)


def read_plan(file: Path) -> Plan:
    """Reads a plan; raises a ConfigError, in one line, for what cannot be right in it."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{file}: {e.strerror}; give the path of a plan, such as configs/lab/tiny.toml") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{file}: not valid TOML: {e}") from e
    try:
        return _plan(file.stem, values)
    except ConfigError as e:
        raise ConfigError(f"{file}: {e}") from e


def _plan(stem: str, values: Tables) -> Plan:
    _require_keys(values, {"plan", "model", "trainer", "tasks", "objectives"}, "")
    for name in ("model", "tasks", "objectives"):
        if not isinstance(values.get(name), dict) or not values[name]:
            raise ConfigError(f"[{name}] has nothing in it")
    _require_values(PlanSection, values.get("plan", {}), "plan.")
    section = PlanSection(**{"name": stem, **values.get("plan", {})})
    if not section.seeds or len(set(section.seeds)) < len(section.seeds):
        raise ConfigError(f"plan.seeds: expected different integers, got {section.seeds}")
    if section.generations < 1 or not section.temperature > 0:
        raise ConfigError("plan.generations must be >= 1 and plan.temperature > 0")
    common = values.get("trainer", {})
    if isinstance(common, dict) and (module := common.get("experimental", {}).get("custom_import")):
        try:
            importlib.import_module(module)  # it may register heads, whose sections are then known
        except ImportError as e:
            raise ConfigError(f"trainer.experimental.custom_import: {e}") from e
    common = _trainer_tables(common, "trainer.")
    tasks, trainer, answer_alone = {}, {}, set()
    for name, table in values["tasks"].items():
        tasks[name], trainer[name], alone = _task(name, table, common)
        answer_alone |= {name} if alone else set()
    objectives = {n: _trainer_tables(table, f"objectives.{n}.") for n, table in values["objectives"].items()}
    if wrong := [name for name in (section.name, *tasks, *objectives) if not _NAME.fullmatch(name)]:
        raise ConfigError(f"{wrong[0]!r} cannot name a folder: use letters, digits, '-', '_' and '.'")
    _check_model(values["model"])
    return Plan(section, values["model"], trainer, tasks, frozenset(answer_alone), objectives)


def _task(name: str, table: Any, common: Tables) -> tuple[Task, Tables, bool]:
    """The task, the trainer's options of its runs, and whether they learn the answer alone."""
    kind = table.get("kind") if isinstance(table, dict) else None
    if kind not in KINDS:
        raise ConfigError(f"tasks.{name}.kind must be one of {', '.join(KINDS)}, got {kind!r}")
    parameters = {key: value for key, value in table.items() if key not in ("kind", "trainer", "learn")}
    _require_values(KINDS[kind], parameters, f"tasks.{name}.")
    own = _trainer_tables(table.get("trainer", {}), f"tasks.{name}.trainer.")
    task, learn = KINDS[kind](**parameters), table.get("learn", "row")
    if learn not in ("row", "answer"):
        raise ConfigError(f"tasks.{name}.learn must be 'row' or 'answer', got {learn!r}")
    if learn == "answer" and not task.prompt:
        raise ConfigError(
            f"tasks.{name}.learn = 'answer': a row of {kind} has no prompt, all of it is learned; leave it out"
        )
    options = merged(common, own)
    steps, freq = options.get("training", {}).get("steps", 1000), options.get("validation", {}).get("freq", 1)
    if freq < 1 or steps % freq:
        raise ConfigError(
            f"tasks.{name}: validation.freq = {freq} does not divide training.steps = {steps}: nothing would be validated at the last "
            "step, of which the figures are; take a divisor, or leave it out"
        )
    return task, options, learn == "answer"


def _trainer_tables(values: Any, prefix: str) -> Tables:
    """Tables of the trainer's options, checked by its own types; raises a ConfigError for those that are not this table's."""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix[:-1]} is a table of the trainer's options, got {values!r}")
    if problems := check_values(job_config_class(), values):
        raise ConfigError("; ".join(prefix[:-1] + ": " + problem for problem in problems))
    _refuse(values, _OWN, prefix, "the lab sets it itself; leave it out")
    if prefix.startswith("objectives."):
        _refuse(
            values, _OF_ALL, prefix, "all objectives of a task share it; put it under [trainer] or a task's trainer"
        )
    return values


def _refuse(values: Tables, options: tuple[str, ...], prefix: str, why: str) -> None:
    for option in options:
        section, _, key = option.partition(".")
        if key in values.get(section, {}):
            raise ConfigError(f"{prefix}{option}: {why}")


def _check_model(model: Tables) -> None:
    """Raises a ConfigError for fields that the configuration of the model's type does not have: transformers would keep them silently."""
    from transformers import CONFIG_MAPPING

    kind = str(model.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"model.model_type must be a type of transformers, such as 'llama', got {kind!r}")
    known = {f.name for f in fields(CONFIG_MAPPING[kind])} | {"model_type"}
    _require_keys(model, known - {"vocab_size", "eos_token_id", "bos_token_id", "pad_token_id"}, "model.")


def _require_values(of: type, values: Any, prefix: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix[:-1]} is a table, got {values!r}")
    if problems := check_values(of, values, prefix):
        raise ConfigError("; ".join(problems))


def _require_keys(values: Tables, known: set[str], prefix: str) -> None:
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"unknown key {prefix + unknown[0]!r} (valid: {', '.join(sorted(known))})")


def merged(below: Tables, above: Tables) -> Tables:
    """Both tables in one; where both have a value, that of ``above``."""
    both = {
        key: merged(below[key], above[key])
        for key in below
        if isinstance(below[key], dict) and isinstance(above.get(key), dict)
    }
    return {**below, **above, **both}


def as_toml(tables: Tables) -> str:
    """Writes tables of tables, lists of tables, and values that JSON has, as TOML."""

    def lines(table: Tables, prefix: str) -> Iterator[str]:
        def is_table(value: Any) -> bool:
            return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))

        for key, value in table.items():
            if not is_table(value):
                yield f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in table.items():
            if is_table(value):
                brackets = "[{}]" if isinstance(value, dict) else "[[{}]]"
                for item in [value] if isinstance(value, dict) else value:
                    yield from ("", brackets.format(prefix + key), *lines(item, f"{prefix}{key}."))

    return "\n".join([*lines(tables, "")][1:]) + "\n"
