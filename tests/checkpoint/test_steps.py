"""Complete or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flame_ext.checkpoint.card import card_of_step
from flame_ext.checkpoint.steps import (
    complete_step,
    damaged_files,
    describe_files,
    find_steps,
    read_manifest,
    recover,
    start,
    temporary_path,
    written_files,
)
from flame_ext.errors import CheckpointError
from tests.conftest import TEN_STEPS
from tests.ranks import TrainRun, train


def write_step(folder: Path, step: int, content: bytes = b"weights") -> Path:
    final = folder / f"step-{step}"
    write_files(final, content)
    complete(final, step)
    return final


def write_files(final: Path, content: bytes) -> None:
    (start(final) / "__0_0.distcp").write_bytes(content)
    (temporary_path(final) / ".metadata").write_bytes(b"")


def complete(final: Path, step: int, **facts: Any) -> None:
    complete_step(final, step, facts, describe_files(temporary_path(final), written_files(final)))


def test_only_complete_steps_are_found_in_order_of_their_number(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write_step(tmp_path, step)
    (tmp_path / "best-step-5").mkdir()
    (tmp_path / "step-7").mkdir()
    (write_step(tmp_path, 8) / "__0_0.distcp").write_bytes(b"short")
    (write_step(tmp_path, 11) / "__0_0.distcp").unlink()
    (write_step(tmp_path, 12) / "manifest.json").write_text("{")
    start(tmp_path / "step-200")
    steps, passed_over = find_steps(tmp_path)
    assert [s.step for s in steps] == [9, 10, 100]
    assert len(passed_over) == 4
    text = "\n".join(passed_over)
    assert "step-7: no manifest.json" in text and "step-8: __0_0.distcp is 5 bytes" in text
    assert "step-11: __0_0.distcp is absent" in text and "step-12: unreadable manifest.json" in text


def test_a_step_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    final = write_step(tmp_path, 3, b"old")
    write_files(final, b"half of the new")
    assert (final / "__0_0.distcp").read_bytes() == b"old" and len(find_steps(tmp_path)[0]) == 1
    complete(final, 3, fact=1)
    assert (final / "__0_0.distcp").read_bytes() == b"half of the new"
    assert json.loads((final / "manifest.json").read_text())["fact"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3"] and not temporary_path(final).exists()


def test_a_step_moved_aside_by_a_killed_run_gets_its_name_back(tmp_path: Path) -> None:
    final = write_step(tmp_path, 3, b"old")
    final.rename(tmp_path / ".replaced-step-3")
    assert find_steps(tmp_path)[0] == []
    recover(tmp_path)
    assert [s.step for s in find_steps(tmp_path)[0]] == [3]
    assert (final / "__0_0.distcp").read_bytes() == b"old"


@pytest.mark.parametrize("complete_too", [True, False])
def test_between_two_renames_the_new_step_is_taken_if_it_is_complete(tmp_path: Path, complete_too: bool) -> None:
    write_step(tmp_path, 3, b"new").rename(temporary_path(tmp_path / "step-3"))
    if not complete_too:
        (temporary_path(tmp_path / "step-3") / "manifest.json").unlink()
    temporary_path(tmp_path / "step-3").rename(tmp_path / "aside")  # write_step clears what has this name
    write_step(tmp_path, 3, b"old").rename(tmp_path / ".replaced-step-3")
    (tmp_path / "aside").rename(temporary_path(tmp_path / "step-3"))
    recover(tmp_path)
    expected = b"new" if complete_too else b"old"
    assert (tmp_path / "step-3" / "__0_0.distcp").read_bytes() == expected
    assert not (tmp_path / ".replaced-step-3").exists()


def test_a_step_under_another_name_and_a_manifest_without_the_metadata_are_no_steps(tmp_path: Path) -> None:
    write_step(tmp_path, 3).rename(tmp_path / "step-30")
    manifest = write_step(tmp_path, 4) / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["files"][".metadata"]
    manifest.write_text(json.dumps(values))
    steps, (thirty, four) = find_steps(tmp_path)
    assert not steps and "step-30: its manifest.json is that of step 3" in thirty
    assert "step-4: its manifest.json does not list .metadata" in four


def test_background_saves_are_complete_and_resumable(ten_steps: TrainRun, dump_folder: Path) -> None:
    options = [*TEN_STEPS, "--checkpoint.async_mode=async", "--checkpoint.keep_latest_k=3"]
    run = train(dump_folder, *options, "--training.steps=7")
    longer = "--checkpoint.allow_config_change=training.steps"
    assert run.values("loss") == ten_steps.values("loss")[:7]
    steps, passed_over = find_steps(dump_folder / "checkpoint")
    assert [s.step for s in steps] == [5, 7] and not passed_over
    resumed = train(dump_folder, *TEN_STEPS, longer, "--checkpoint.load_step=5")
    assert resumed.values("loss") == ten_steps.values("loss")


def test_a_step_that_is_not_there_is_refused(ten_steps: TrainRun, dump_folder: Path) -> None:
    run = train(dump_folder, *TEN_STEPS, "--checkpoint.load_step=4", check=False)
    assert run.exit_codes == [1]
    assert "error: checkpoint.load_step = 4: no complete step of that number" in run.ranks[0].output


def test_a_model_only_step_is_not_resumed(dump_folder: Path) -> None:
    options = [*TEN_STEPS, "--training.steps=1", "--checkpoint.last_save_model_only", "--checkpoint.no-last_save_in_hf"]
    train(dump_folder, *options)
    run = train(dump_folder, *TEN_STEPS, "--checkpoint.allow_config_change=training.steps", check=False)
    assert run.exit_codes == [1]
    assert "step-1 holds the model alone" in run.ranks[0].output


def test_manifest_errors_name_the_reason(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the save did not finish"):
        read_manifest(tmp_path)
    manifest = write_step(tmp_path, 3) / "manifest.json"
    whole = json.loads(manifest.read_text())
    for files, reason in (
        ({"__0_0.distcp": 7}, "unreadable"),
        ({"../step-3/__0_0.distcp": whole["files"]["__0_0.distcp"]}, "is no name of a file in the folder"),
        ([], "unreadable"),
    ):
        manifest.write_text(json.dumps({**whole, "files": files}))
        with pytest.raises(CheckpointError, match=reason):
            read_manifest(manifest.parent)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("config", []), ("seed", "x"), ("heads", [1]), ("data", 3), ("parallelism", [1]), ("versions", "2")),
        *(("run", 5), ("step", "3"), ("world_size", "2"), ("finished", "yes"), ("model_only", 1), ("files", [])),
    ],
)
def test_a_manifest_names_the_field_of_another_type(tmp_path: Path, field: str, value: object) -> None:
    """What resumes, exports and cards take from it would else end in a traceback."""
    path = write_step(tmp_path, 3)
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=f"unreadable manifest.json \\({field} is "):
        read_manifest(path)
    steps, (line,) = find_steps(tmp_path)
    assert steps == [] and line.startswith("step-3: unreadable manifest.json")
    with pytest.raises(CheckpointError, match=field):
        card_of_step(path)


def test_a_manifest_is_a_file_of_its_step(tmp_path: Path) -> None:
    path = write_step(tmp_path, 3)
    (path / "manifest.json").rename(tmp_path / "elsewhere.json")
    (path / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="manifest.json: is a link to .*elsewhere.json, outside the source"):
        read_manifest(path)


def test_a_nested_or_long_manifest_is_refused(tmp_path: Path) -> None:
    manifest = write_step(tmp_path, 3) / "manifest.json"
    for raw in (b'{"files":' + b"[" * 10**6, b" " * 2**26, b'{"files": {}, "files": {}}', b"\xff"):
        manifest.write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"unreadable manifest.json \(.*manifest.json: "):
            read_manifest(manifest.parent)


def test_a_changed_byte_is_found_by_its_file(tmp_path: Path) -> None:
    path = write_step(tmp_path, 3)
    (step,), _ = find_steps(tmp_path)
    assert damaged_files(step, ["__0_0.distcp"]) == []
    (path / "__0_0.distcp").write_bytes(b"weighty")
    (step,), passed_over = find_steps(tmp_path)
    (line,) = damaged_files(step, ["__0_0.distcp"])
    assert not passed_over and line.startswith("__0_0.distcp: SHA-256 is ")
