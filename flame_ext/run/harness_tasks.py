"""Finds the tasks of lm-evaluation-harness that a user names, among its own and the user's files. It is imported where it is used."""

import difflib
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from flame_ext.errors import ConfigError
from flame_ext.files import expanded

_NOT_READ = {"__pycache__", ".ipynb_checkpoints"}  # folders that lm-eval passes over
_OF_TASK = re.compile(rb"^[\"']?(task|group)[\"']?\s*:", re.MULTILINE)


def is_path(task: str) -> bool:
    """Returns whether a task is a file or folder of the user's, not a name: it has a slash or ends as YAML files do."""
    return "/" in task or task.endswith(".yaml")


def missing_paths(tasks: Sequence[str], include_path: Sequence[str]) -> list[str]:
    """Returns one sentence for each file or folder of tasks that is not there, which begins with the option's name."""
    files = [task for task in tasks if is_path(task) and not Path(expanded(task, "tasks")).exists()]
    folders = [path for path in include_path if not Path(expanded(path, "include_path")).is_dir()]
    return [
        *(f"tasks has {path!r}, which is not there; name a YAML file or a folder of them" for path in files),
        *(f"include_path has {path!r}, which is no folder; name one with YAML files" for path in folders),
    ]


def _require_readable(folder: str, option: str) -> None:
    """Raises ConfigError for a file of a task, by its key, that lm-eval cannot read: it would leave it out without a word, and may
    have a task of that name itself. What else lies there, such as templates, is passed over.
    """
    for file in sorted(Path(folder).rglob("*.yaml")):
        hidden = file.name.startswith(".") or not _NOT_READ.isdisjoint(file.parts)
        if file.is_file() and not hidden and _OF_TASK.search(file.read_bytes()):
            _content(file, option)


def _content(file: Path, option: str) -> dict[str, Any]:
    """What the YAML file of a task says, with those that it includes; functions stay names. Raises ConfigError."""
    from lm_eval.tasks.manager import load_yaml

    try:
        content: dict[str, Any] = load_yaml(file, resolve_func=False)
    except Exception as e:  # of yaml, and whatever a file can provoke in lm-eval
        reason = " ".join(str(e).split())
        raise ConfigError(f"{option}: {file} cannot be read ({type(e).__name__}: {reason}); mend it") from e
    if not content.get("group") and not isinstance(content.get("task"), str):
        raise ConfigError(f"{option}: {file} is no file of a task; give it a key 'task' with a name, or name another")
    return content


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
    others = [expanded(path, "include_path") for path in include_path]
    for folder, option in [*((path, "include_path") for path in others), *((path, "tasks") for path in folders)]:
        _require_readable(folder, option)
    files = [_content(path, "tasks") for path in paths.values() if path.is_file()]
    included = [*others, *folders]
    manager = TaskManager(include_path=included, include_defaults=False)
    names = [task for task in tasks if task not in paths]
    in_folders = {folder: _tasks_in(folder) for folder in folders}
    needed = [*names, *chain.from_iterable(in_folders.values())]
    needs_all = not all(manager.match_tasks([name]) for name in names)
    needs_all |= any(task in manager.all_groups for task in manager.match_tasks(needed))
    needs_all |= any("group" in content for content in files)
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
        else:
            found += in_folders.get(str(paths[task]), [str(paths[task])])
    return manager, list(dict.fromkeys(found))


def _tasks_in(folder: str) -> list[str]:
    from lm_eval.tasks import TaskManager

    if not (found := TaskManager(include_path=folder, include_defaults=False).all_subtasks):
        raise ConfigError(f"tasks: the folder {folder} has no YAML file of a task; give it one, with a key 'task'")
    return list(found)
