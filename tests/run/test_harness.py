"""lm-evaluation-harness on local tasks, beside the same figures by transformers alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from flame_ext.errors import UserError
from flame_ext.run.harness import Request, evaluate, figures
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
