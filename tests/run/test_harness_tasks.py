"""Which tasks of lm-evaluation-harness are found, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from flame_ext.errors import ConfigError
from flame_ext.run.harness_tasks import find_tasks
from tests.harness_tasks import CHOICE, TEXT, write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


def test_a_file_a_folder_and_a_name_are_found(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tasks / f"{CHOICE}.yaml"
    _, found = find_tasks([str(file), TEXT], [str(tasks)])
    assert found == [str(file), TEXT]
    monkeypatch.chdir(tasks.parent)
    _, found = find_tasks(["own_*", "./own"], ["own"])
    assert found == [CHOICE, TEXT], "each once"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent/task.yaml", "tasks has 'absent/task.yaml', which is not there"),
        ("./empty", "has no YAML file of a task"),
        ("./broken/deep", "/broken/deep/er/a.yaml cannot be read (ScannerError: "),
        ("./broken/list.yml.yaml", "/broken/list.yml.yaml cannot be read (ValueError: Expected YAML dict"),
        ("./broken/absent.yaml", "/broken/absent.yaml cannot be read (FileNotFoundError: "),
        ("./broken/part.yaml", "/broken/part.yaml is no file of a task; give it a key 'task'"),
        ("./broken/list.yaml", "/broken/list.yaml is no file of a task; give it a key 'task'"),
    ],
)
def test_a_path_without_tasks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    write_broken(tmp_path / "broken")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)) as e:
        find_tasks([given])
    assert str(e.value).startswith("tasks") and "\n" not in str(e.value)


def write_broken(folder: Path) -> None:
    """Files that are no tasks."""
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a.yaml").write_text("task: one\n  doc_to_text: : x")
    (folder / "list.yml.yaml").write_text("- task")
    (folder / "absent.yaml").write_text("task: one\ninclude: absent_part.yaml")
    (folder / "part.yaml").write_text("output_type: multiple_choice")
    (folder / "list.yaml").write_text("task: [one, two]")


def test_what_lies_beside_tasks_is_passed_over(tasks: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks, tmp_path / "own")
    (folder / "_default.yaml").touch()
    (folder / "other.yaml").write_text("a: 1\n---\nb: 2\n")
    (folder / "folder.yaml").mkdir()
    (folder / ".#own.yaml").symlink_to("nobody@nowhere.1")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a.yaml").write_text("task: {")
    assert find_tasks([str(folder)])[1] == [CHOICE, TEXT]


def test_a_broken_file_of_ones_own_does_not_give_way_to_a_task_of_lm_eval(tasks: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks, tmp_path / "own")
    (folder / "hellaswag.yaml").write_text("task: hellaswag\n  dataset_path: : json")
    with pytest.raises(ConfigError, match=r"^include_path: .*/own/hellaswag.yaml cannot be read"):
        find_tasks([CHOICE, "hellaswag"], [str(folder)])


@pytest.mark.matrix  # reads all files of tasks of lm-eval, which takes ten seconds
def test_an_unknown_name_is_refused_and_a_group_may_have_tasks_of_lm_eval(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lm-eval has no task 'hellaswagg'; did you mean 'hellaswag'"):
        find_tasks(["hellaswagg"])
    with pytest.raises(ConfigError, match=r"no task 'zzzzzzzzzz'; `lm_eval ls tasks`"):
        find_tasks(["zzzzzzzzzz"])
    folder = shutil.copytree(tasks, tmp_path / "group")
    (folder / "group.yaml").write_text(f"group: own_group\ntask:\n  - {CHOICE}\n  - arc_easy\n")
    for given, include in ((["own_group"], [str(folder)]), ([str(folder / "group.yaml")], [])):
        manager, found = find_tasks(given, include)
        assert "arc_easy" in manager.all_tasks and found == given
    _, found = find_tasks(["hellaswag", CHOICE], [str(tasks)])
    assert found == ["hellaswag", CHOICE]
