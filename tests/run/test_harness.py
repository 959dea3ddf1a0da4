"""lm-evaluation-harness on local tasks, beside the same figures by transformers alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from flame_ext.errors import ConfigError, UserError
from flame_ext.run.harness import Request, evaluate, figures, find_tasks
from tests.harness_tasks import CHOICE, QUESTIONS, TEXT, naive_figures, write_tasks
from tests.ranks import TINY_OLMO

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


def test_figures_are_those_of_transformers(tasks: Path) -> None:
    found = evaluate(TINY_OLMO, Request(tasks=(str(tasks),), dtype="float32"), batch_size=4)
    expected = naive_figures(TINY_OLMO)
    assert 0 < expected[f"{CHOICE}/acc"] < 1, "neither all nor none is right, or a wrong figure would not show"
    # Sums in batches with padding are in another order; perplexity raises e to the power of what differs.
    assert {name: found[name] for name in found if "/" in name} == pytest.approx(expected, rel=1e-4)
    assert found["examples"] == {CHOICE: len(QUESTIONS), TEXT: 2} and found["num_fewshot"] == {CHOICE: 0, TEXT: 0}
    assert found["versions"] == {CHOICE: 1.5, TEXT: 2.0}
    assert found["dtype"] == "float32" and found["tasks"] == [str(tasks)] and found["seconds"] > 0


def test_options_reach_lm_eval(tasks: Path) -> None:
    request = Request(tasks=(CHOICE,), include_path=(str(tasks),), num_fewshot=1, limit=3)
    task = (tasks / f"{CHOICE}.yaml").read_text()
    (tasks / f"{CHOICE}.yaml").write_text(task + "fewshot_split: test\n")
    found = evaluate(TINY_OLMO, request)
    (tasks / f"{CHOICE}.yaml").write_text(task)
    assert found["num_fewshot"] == {CHOICE: 1} and found["examples"] == {CHOICE: 3} and found["limit"] == 3
    assert found["dtype"] == "bfloat16", "as the weights are stored"


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
    checkpoints = folder.parent / "empty" / ".ipynb_checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "a.yaml").write_text("{")  # passed over


def test_a_broken_file_of_ones_own_does_not_give_way_to_a_task_of_lm_eval(tasks: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks, tmp_path / "own")
    (folder / "hellaswag.yaml").write_text("task: hellaswag\n  dataset_path: : json")
    with pytest.raises(ConfigError, match=r"tasks: .*/own/hellaswag.yaml cannot be read"):
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


def test_a_failure_is_one_line_with_the_reason(tasks: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks, tmp_path / "broken")
    text = (folder / f"{TEXT}.yaml").read_text()
    (folder / f"{TEXT}.yaml").write_text(re.sub(r"test: .*jsonl", f"test: {folder}/absent.jsonl", text))
    with pytest.raises(UserError, match=r"lm-eval cannot evaluate .*: FileNotFoundError: .*absent.jsonl") as e:
        evaluate(TINY_OLMO, Request(tasks=(str(folder / f"{TEXT}.yaml"),)))
    assert "\n" not in str(e.value)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"tasks: .*bytes.yaml cannot be read \("):
        evaluate(TINY_OLMO, Request(tasks=(str(folder / "bytes.yaml"),)))
    with pytest.raises(UserError, match="device 'cuda:77' is not there"):
        evaluate(TINY_OLMO, Request(tasks=(str(tasks),)), device="cuda:77")


def test_names_of_figures() -> None:
    results = {
        "gsm8k": {"alias": "gsm8k", "sample_len": 9, "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"},
        "text": {"alias": " - text", "acc,none": 1, "acc_stderr,none": float("nan")},
    }
    assert figures(results) == {"gsm8k/exact_match/strict": 0.5, "text/acc": 1.0, "text/acc_stderr": None}
