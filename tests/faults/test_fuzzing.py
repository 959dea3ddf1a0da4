"""A few of the fuzzer's mutations; ``make fuzz N=100000`` makes more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults import fuzzing
from tests.ranks import run_ranks

MUTATIONS = 60


def fuzzed(folder: str, mutations: int) -> fuzzing.Findings:
    """In a rank of its own, since a process cannot take back that it watches which files are opened."""
    return fuzzing.fuzz(Path(folder), mutations, seed=0)


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (rank,) = run_ranks(fuzzed, 1, str(folder), MUTATIONS, folder=tmp_path / "ranks", timeout=200)
    assert rank.exit_code == 0, rank.output[-3000:]
    assert rank.value.problems == [] and rank.value.outcomes.total() == MUTATIONS
    refused = sum(count for outcome, count in rank.value.outcomes.items() if outcome.endswith("refused"))
    assert refused > MUTATIONS / 3


@pytest.mark.parametrize("fault", ["raises", "opens", "hangs"])
def test_the_fuzzer_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    file = tmp_path / "files" / "x.json"
    file.parent.mkdir()
    file.write_text('{"a": 1}')

    def read() -> None:
        if fault == "raises":
            raise TypeError("not a UserError")
        if fault == "opens":
            os.close(os.open(tmp_path, os.O_RDONLY))
        if fault == "hangs":
            sum(range(10**6))

    monkeypatch.setattr(fuzzing, "MAX_SECONDS", 0 if fault == "hangs" else 10)
    monkeypatch.setattr(fuzzing, "inputs", lambda root: {"x": fuzzing.Input(file, read)})
    found = fuzzing.fuzz(file.parent, 1, seed=0).problems
    assert (
        len(found) == 1 and {"raises": "TypeError", "opens": f"opens {tmp_path}", "hangs": "takes"}[fault] in found[0]
    )
