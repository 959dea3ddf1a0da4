"""Which steps follow from each other, after runs have gone back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flame_ext.checkpoint.lineage import (
    LINEAGE_NAME,
    ROOT,
    Branch,
    Lineage,
    as_json,
    parse_lineage,
    read_steps,
    record_lineage,
)
from flame_ext.checkpoint.manager import SeedingCheckpointManager
from flame_ext.errors import CheckpointError
from tests.checkpoint.test_steps import complete, write_files


def save(folder: Path, steps: range, lineage: Lineage | None = ROOT, run: str = "a") -> Lineage | None:
    """Saves steps as a run on this lineage does; None: as older versions did."""
    for step in steps:
        final = folder / f"step-{step}"
        write_files(final, repr((run, lineage, step)).encode())
        facts: dict[str, Any] = {} if lineage is None else {"lineage": as_json(lineage)}
        complete(final, step, run=run, **facts)
    return lineage


def begin(folder: Path, load_step: int = -1, recorded: bool = True) -> Lineage:
    """Begins a run; returns the lineage on which it saves."""
    found = read_steps(folder)
    step = found.candidates(load_step)[-1]
    lineage = found.lineage_from(step, load_step)
    if recorded:
        record_lineage(folder, step.manifest["run"], lineage)
    return lineage


def current(folder: Path) -> list[int]:
    return [step.step for step in read_steps(folder).current]


@pytest.mark.parametrize("first", [ROOT, None])
def test_after_going_back_the_steps_of_the_branch_that_was_given_up_do_not_count(
    tmp_path: Path, first: Lineage | None
) -> None:
    save(tmp_path, range(1, 7), first)
    lineage = begin(tmp_path, load_step=2)
    assert current(tmp_path) == [1, 2], "from the moment on, before anything is saved"
    save(tmp_path, range(3, 5), lineage)
    assert current(tmp_path) == [1, 2, 3, 4] and [s.step for s in read_steps(tmp_path).steps] == [1, 2, 3, 4, 5, 6]
    assert read_steps(tmp_path).given_up("a", lineage) == ["step-5", "step-6"]
    (tmp_path / LINEAGE_NAME).unlink()
    assert current(tmp_path) == [1, 2, 3, 4], "manifests say it too"
    assert begin(tmp_path) == lineage, "going on begins no branch"


def test_a_load_step_that_is_repeated_yields_to_the_steps_of_its_branch(tmp_path: Path) -> None:
    save(tmp_path, range(1, 7))
    lineage = begin(tmp_path, load_step=2)
    assert begin(tmp_path, load_step=2) == lineage, "killed before it saved"
    save(tmp_path, range(3, 5), lineage)
    assert read_steps(tmp_path).candidates(2)[-1].step == 4 and begin(tmp_path, load_step=2) == lineage
    shutil.rmtree(tmp_path / "step-2")  # as keep_latest_k does
    assert read_steps(tmp_path).candidates(2)[-1].step == 4
    assert begin(tmp_path, load_step=3)[-1] == (2, 3, 3), "another number is another decision"
    with pytest.raises(CheckpointError, match=r"load_step = 2: no complete step .*complete: 1, 3, 4, 5, 6"):
        read_steps(tmp_path).candidates(2)


def test_a_load_step_that_names_the_newest_step_yields_too_when_it_is_repeated(tmp_path: Path) -> None:
    save(tmp_path, range(1, 3))
    save(tmp_path, range(3, 5), begin(tmp_path, load_step=2))
    assert read_steps(tmp_path).candidates(2)[-1].step == 4


def test_two_times_back_and_back_to_a_branch_that_was_given_up(tmp_path: Path) -> None:
    save(tmp_path, range(1, 7))
    save(tmp_path, range(3, 6), begin(tmp_path, load_step=2))
    save(tmp_path, range(5, 6), begin(tmp_path, load_step=4))
    found = read_steps(tmp_path)
    assert [branch.number for branch in found.lineage] == [0, 1, 2] and current(tmp_path) == [1, 2, 3, 4, 5]
    save(tmp_path, range(7, 8), begin(tmp_path, load_step=6))
    assert current(tmp_path) == [1, 2, 6, 7], "3, 4 and 5 are of branches beside it"


def test_a_branch_that_begins_after_its_step_is_no_lineage(tmp_path: Path) -> None:
    save(tmp_path, range(1, 3))
    save(tmp_path, range(3, 4), (Branch(0, 3, -1),))
    assert current(tmp_path) == [1, 2] and "begins after the step" in read_steps(tmp_path).passed_over[0]


def test_a_damaged_newest_step_is_given_up_and_the_load_step_stays_in_force(tmp_path: Path) -> None:
    save(tmp_path, range(1, 4))
    save(tmp_path, range(3, 6), begin(tmp_path, load_step=2))
    found = read_steps(tmp_path)
    lineage = found.lineage_from(found.current[-2], -1)
    assert lineage[-1] == (2, 4, 2)
    record_lineage(tmp_path, "a", lineage)
    assert current(tmp_path) == [1, 2, 3, 4] and read_steps(tmp_path).candidates(2)[-1].step == 4


def test_other_runs_and_steps_that_were_moved_away(tmp_path: Path) -> None:
    save(tmp_path, range(1, 5))
    save(tmp_path, range(9, 10), run="b")
    assert current(tmp_path) == [9], "as long as nothing says otherwise, the highest number"
    lineage = begin(tmp_path, load_step=2)
    assert current(tmp_path) == [1, 2]
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-{step}")
    assert current(tmp_path) == [3, 4], "never as if there were no step: the job would be seeded over them"
    save(tmp_path, range(3, 4), lineage)
    assert current(tmp_path) == [3]


def test_only_the_lineage_is_thinned_out_and_never_its_newest_step(tmp_path: Path) -> None:
    save(tmp_path, range(1, 9))
    lineage = save(tmp_path, range(4, 5), begin(tmp_path, load_step=3))
    deleted: list[str] = []
    manager = SimpleNamespace(
        keep_latest_k=2, folder=str(tmp_path), purge_queue=SimpleNamespace(put=deleted.append), lineage=lineage,
        hooks=SimpleNamespace(facts=lambda: {"run": "a"}, exports=SimpleNamespace(in_use=set)),
    )  # fmt: skip
    SeedingCheckpointManager._purge_stale_checkpoints(manager)
    assert deleted == [str(tmp_path / f".deleted-step-{number}") for number in (1, 2)]


@pytest.mark.parametrize(
    "value",
    [5, [], [5], [{}], [{"number": 0}], [{"number": "0", "after": -1, "load_step": -1}], [True], {"a": 1},
     [ROOT[0]._asdict(), ROOT[0]._asdict()]],
)  # fmt: skip
def test_a_malformed_lineage_is_one_line(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="lineage: "):
        parse_lineage(value)
    save(tmp_path, range(1, 3))
    manifest = tmp_path / "step-2" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "lineage": value}))
    assert current(tmp_path) == [1] and "step-2: unreadable manifest.json" in read_steps(tmp_path).passed_over[0]
    (tmp_path / LINEAGE_NAME).write_text(json.dumps({"run": "a", "lineage": value}))
    with pytest.raises(CheckpointError, match=r"lineage\.json: cannot be read"):
        read_steps(tmp_path)
