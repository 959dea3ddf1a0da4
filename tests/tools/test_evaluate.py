"""``flame-ext evaluate``: what it prints and records, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from flame_ext.run.evaluations import read_evaluations
from flame_ext.tools.evaluate import summary
from flame_ext.tools.main import main
from tests.ranks import TINY_OLMO

FOUND: dict[str, Any] = {
    "tasks": ["a"], "a/acc": 0.123456, "a/acc_stderr": 0.0123, "a/em/strict": None, "a/ppl": 7.0, "examples": {"a": 2000}, "seconds": 3.21,
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of lm-eval, in whose place figures are there at once."""
    calls: list[Any] = []
    monkeypatch.setattr("flame_ext.run.harness.evaluate", lambda *args, **kwargs: calls.append((args, kwargs)) or FOUND)
    return calls


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = shutil.copytree(TINY_OLMO, tmp_path / "step-20")
    (folder / "export.json").write_text(json.dumps({"run": "r", "step": 20, "files_sha256": "ab", "files": {}}))
    return folder


def test_the_line_belongs_to_the_exports_step(export: Path, tmp_path: Path, asked: list[Any], capsys: Any) -> None:
    output = tmp_path / "evaluations.jsonl"
    options = ["--tasks", "a", "b", "--limit", "100", "--num-fewshot=2", "--device", "cpu", "--output", str(output)]
    assert main(["evaluate", str(export), *options]) == 0
    assert (
        capsys.readouterr().out == "a/acc 0.1235 ± 0.012, a/em/strict not finite, a/ppl 7 (2,000 examples in 3.2 s)\n"
    )
    ((folder, request), more) = asked[0]
    assert folder == export and more == {"device": "cpu", "batch_size": 8, "trust_remote_code": False}
    assert (request.tasks, request.limit, request.num_fewshot, request.dtype) == (("a", "b"), 100, 2, "auto")
    origin = {"path": str(export), "run": "r", "step": 20, "files_sha256": "ab"}
    assert read_evaluations(output) == [{"step": 20, **FOUND, "export": origin}]
    assert main(["evaluate", str(TINY_OLMO), "--tasks", "a", "--output", str(output)]) == 0
    assert [line["step"] for line in read_evaluations(output)] == [0, 20], "what is no export is step 0"


def test_it_is_no_rank_of_the_run_that_starts_it(
    export: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert main(["evaluate", str(export), "--tasks", "a"]) == 0
    assert "WORLD_SIZE" not in os.environ and "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"flame_ext_reverse": true}', "the model reads text from right to left (data.reverse)"),
        ("config.json", "{", "config.json: cannot be read: JSONDecodeError"),
        ("config.json", None, "has no config.json; name an export"),
        ("export.json", "[]", "export.json: cannot be read"),
        ("export.json", '{"step": "x"}', "step is 'x', expected a number"),
    ],
)
def test_what_is_no_export_from_left_to_right_is_refused(
    export: Path, asked: list[Any], capsys: Any, file: str, content: str | None, message: str
) -> None:
    (export / file).unlink() if content is None else (export / file).write_text(content)
    assert main(["evaluate", str(export), "--tasks", "a"]) == 2
    assert message in capsys.readouterr().err and not asked


def test_an_output_without_a_folder_and_a_missing_package_are_said(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert main(["evaluate", str(export), "--tasks", "a", "--output", str(tmp_path / "no" / "e.jsonl")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(export), "--tasks", "a"]) == 2
    assert "pip install 'flame_ext[eval]'" in capsys.readouterr().err


def test_an_architecture_of_the_users_is_registered_before(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "own_architecture.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    known: list[bool] = []
    monkeypatch.setattr(
        "flame_ext.run.harness.evaluate", lambda *_, **__: known.append("own_architecture" in sys.modules) or FOUND
    )
    assert main(["evaluate", str(export), "--tasks", "a", "--import", "own_architecture"]) == 0 and known == [True]
    assert main(["evaluate", str(export), "--tasks", "a", "--import", "is_absent"]) == 2
    assert "--import: No module named 'is_absent'; it must be importable" in capsys.readouterr().err


def test_the_summary_has_errors_beside_figures() -> None:
    line = {"a/em/strict": 0.5, "a/em_stderr/strict": 0.1, "examples": {"a": 1}, "seconds": 1.0}
    assert summary(line) == "a/em/strict 0.5 ± 0.1 (1 examples in 1.0 s)"
