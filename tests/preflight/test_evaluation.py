"""What ``[evaluation]`` is refused for before anything starts."""

from __future__ import annotations

import pytest

from flame_ext.train import parse
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML

TASKS = "--evaluation.tasks=hellaswag"
EXPORTS = "--export.interval=20"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluation.num_fewshot=5"], "evaluation.num_fewshot = 5 has no effect without evaluation.tasks"),
        (["--evaluation.device=cuda:1"], "evaluation.device = 'cuda:1' has no effect without evaluation.tasks"),
        ([TASKS, EXPORTS, "--evaluation.interval=30"], "must be 0 or a multiple of export.interval = 20, got 30"),
        ([TASKS, "--evaluation.interval=20"], "must be 0 or a multiple of export.interval = 0, got 20"),
        ([TASKS, "--checkpoint.no-last_save_in_hf"], "evaluation.tasks has nothing to evaluate"),
        (
            [TASKS, "--checkpoint.no-last_save_in_hf", "--export.interval=40", "--training.steps=60"],
            "evaluation.tasks has nothing to evaluate",
        ),
        (
            [TASKS, "--checkpoint.no-last_save_in_hf", EXPORTS, "--training.steps=60", "--training.epochs=1"],
            "evaluation.tasks has nothing to evaluate",
        ),
        ([TASKS, "--data.reverse"], "data.reverse trains a model that reads from right to left"),
        (["--evaluation.tasks=./absent"], "evaluation.tasks has './absent', which is not there"),
        ([TASKS, "--evaluation.include_path=absent"], "evaluation.include_path has 'absent', which is no folder"),
        ([TASKS, "--evaluation.device=cuda:77"], "evaluation.device = 'cuda:77' is not there; this machine has cpu"),
        ([TASKS, "--evaluation.limit=0"], "evaluation.limit must be > 0"),
    ],
)
def test_what_cannot_be_right_is_refused(monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert message in refusal(*options)


def test_lm_eval_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flame_ext.preflight.evaluation.find_spec", lambda _name: None)
    assert "pip install 'flame_ext[eval]'" in refusal(TASKS)


def test_what_is_right_is_taken() -> None:
    pytest.importorskip("lm_eval")
    config = parse(
        [f"--job.config_file={DEBUG_TOML}", TASKS, EXPORTS, "--evaluation.interval=40", "--evaluation.limit=0.5"]
    )
    assert config.evaluation.tasks == ["hellaswag"] and config.evaluation.limit == 0.5
    options = ["--checkpoint.no-last_save_in_hf", "--training.steps=60"]
    parse([f"--job.config_file={DEBUG_TOML}", TASKS, EXPORTS, *options])  # the last step is exported in any case
