"""EleutherAI's lm-evaluation-harness: finds tasks, and evaluates a Hugging Face folder on them. It is imported where it is used,
which takes seconds.
"""

import difflib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from flame_ext.errors import ConfigError, UserError
from flame_ext.files import expanded

_NOT_READ = {"__pycache__", ".ipynb_checkpoints"}  # folders that lm-eval passes over


@dataclass(frozen=True)
class Request:
    """What is asked of a model; the options of ``[evaluation]`` that its figures depend on."""

    tasks: tuple[str, ...]
    include_path: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    dtype: str = "auto"


def is_path(task: str) -> bool:
    """Returns whether a task is a file or folder of the user's, not a name: it has a slash or ends as YAML files do."""
    return "/" in task or task.endswith(".yaml")


def missing_paths(tasks: Sequence[str], include_path: Sequence[str]) -> list[str]:
    """Returns one sentence for each file or folder of tasks that is not there, which begins with the option's name."""
    named = [("tasks", task) for task in tasks if is_path(task)] + [("include_path", path) for path in include_path]
    return [
        f"{option} has {path!r}, which is not there; name a YAML file or a folder of them"
        for option, path in named
        if not Path(expanded(path, option)).exists()
    ]


def _content(file: Path) -> dict[str, Any]:
    """What a YAML file says, with those that it includes; functions stay names. Raises ConfigError if it cannot be read."""
    from lm_eval.tasks.manager import load_yaml

    try:
        return load_yaml(file, resolve_func=False)
    except Exception as e:  # of yaml, and whatever a file can provoke in lm-eval
        reason = " ".join(str(e).split())
        raise ConfigError(f"tasks: {file} cannot be read ({type(e).__name__}: {reason}); mend it") from e


def find_tasks(tasks: Sequence[str], include_path: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """Returns lm-eval's ``TaskManager`` and the names or YAML files of the tasks.

    Reads its 15,000 files of tasks, which takes seconds, only for names that the user's own folders do not have.

    Raises:
        ConfigError: there is no such task, or a file of the user's cannot be read; begins with the option's name.
    """
    from lm_eval.tasks import TaskManager

    if problems := missing_paths(tasks, include_path):
        raise ConfigError("; ".join(problems))
    paths = {task: Path(expanded(task, "tasks")).absolute() for task in tasks if is_path(task)}
    folders = [str(path) for path in paths.values() if path.is_dir()]
    included = [*(expanded(path, "include_path") for path in include_path), *folders]
    for file in chain.from_iterable(Path(folder).rglob("*.yaml") for folder in included):
        if _NOT_READ.isdisjoint(file.parts):
            _content(file)  # lm-eval leaves out what it cannot read, and may have a task of that name
    files = {path: _content(path) for path in paths.values() if path.is_file()}
    for path, content in files.items():
        if not (content.get("task") or content.get("group")):
            raise ConfigError(f"tasks: {path} is no file of a task; give it a key 'task', or name another")
    manager = TaskManager(include_path=included, include_defaults=False)
    names = [task for task in tasks if task not in paths]
    needed = [*names, *(task for folder in folders for task in _tasks_in(folder))]
    needs_all = not all(manager.match_tasks([name]) for name in names)
    needs_all |= any(task in manager.all_groups for task in manager.match_tasks(needed))
    needs_all |= any("group" in content for content in files.values())
    if needs_all:  # a group may have tasks of lm-eval
        manager = TaskManager(include_path=included)
    found: list[str] = []
    for task in tasks:
        if task not in paths:
            matches = manager.match_tasks([task])
            if not matches:
                close = difflib.get_close_matches(task, manager.all_tasks, n=3)
                hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`lm_eval ls tasks` lists all"
                raise ConfigError(f"tasks: lm-eval has no task {task!r}; {hint}")
            found += matches
        elif paths[task].is_dir():
            found += _tasks_in(str(paths[task]))
        else:
            found.append(str(paths[task]))
    return manager, list(dict.fromkeys(found))


def _tasks_in(folder: str) -> list[str]:
    from lm_eval.tasks import TaskManager

    if not (found := TaskManager(include_path=folder, include_defaults=False).all_subtasks):
        raise ConfigError(f"tasks: the folder {folder} has no YAML file of a task; give it one, with a key 'task'")
    return list(found)


def evaluate(
    folder: Path, request: Request, *, device: str = "cpu", batch_size: int = 1, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Returns what a line of ``evaluations.jsonl`` holds of an evaluation, without its step.

    ``TASK/METRIC`` and ``TASK/METRIC_stderr`` have the figures (``TASK/METRIC/FILTER`` where a task filters answers); the number of
    examples, few-shot examples and version are by task.

    Raises:
        UserError: lm-eval cannot evaluate it, with its reason.
    """
    import lm_eval
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    began = time.perf_counter()
    try:
        manager, tasks = find_tasks(request.tasks, request.include_path)
        model = HFLM(
            pretrained=str(folder),
            backend="causal",
            device=device,
            dtype=request.dtype,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )
        if model.device != torch.device(device):  # it takes another where there is none of this name
            raise UserError(f"device {device!r} is not there; lm-eval would take {str(model.device)!r}")
        results: Any = lm_eval.simple_evaluate(
            model,
            tasks=tasks,
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            apply_chat_template=request.apply_chat_template,
            task_manager=manager,
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as e:  # of lm-eval, datasets, transformers or code of a task: of any type
        message = " ".join(str(e).split()) or "no message"
        raise UserError(f"lm-eval cannot evaluate {folder}: {type(e).__name__}: {message}") from e
    return {
        "tasks": [*request.tasks],
        **figures(results["results"]),
        "examples": {task: count["effective"] for task, count in results["n-samples"].items()},
        "num_fewshot": results["n-shot"],
        "versions": results["versions"],
        "limit": request.limit,
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "device": device,
        "lm_eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - began, 3),
    }


def figures(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Returns the figures of lm-eval's ``results`` by name; None is one that is not finite, as JSON has none of these."""
    found: dict[str, float | None] = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, comma, answers = key.partition(",")
            if comma and isinstance(value, int | float):  # beside names, and "N/A" for an error that is not known
                full = f"{task}/{name}" if answers == "none" else f"{task}/{name}/{answers}"
                found[full] = float(value) if math.isfinite(value) else None
    return found
