"""Saves that are cut off, fail or are damaged later: what is left of them, and what the next run makes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flame_ext.checkpoint.steps import damaged_files, find_steps
from flame_ext.run.lock import LOCK_NAME, FolderLock
from tests.ranks import REPOSITORY, TrainRun, train

FAST = (
    "--training.seq_len=32", "--training.local_batch_size=2", "--seed.verify=none", "--lr_scheduler.warmup_steps=0",
    "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0", "--checkpoint.no-last_save_in_hf", "--training.steps=3",
)  # fmt: skip
SMALL_FILES = "--experimental.custom_import=tests.faults.plugins.files_stay_small"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """Three steps, each of them saved."""
    return train(tmp_path_factory.mktemp("unbroken") / "run", *FAST)


def broken_after(step: int, unbroken: TrainRun, dump_folder: Path) -> Path:
    """As if the run had been killed between two steps; returns the folder of the steps."""
    shutil.copytree(unbroken.dump_folder, dump_folder)
    for later in range(step + 1, 4):
        shutil.rmtree(dump_folder / "checkpoint" / f"step-{later}")
    return dump_folder / "checkpoint"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def steps_in(folder: Path) -> list[int]:
    return [step.step for step in find_steps(folder)[0]]


@pytest.mark.parametrize(
    ("point", "options"),
    [
        ("after_shards", []),
        ("before_manifest", []),
        ("before_rename", []),
        ("during_async_save", ["--checkpoint.async_mode=async"]),
    ],
)
def test_a_kill_during_a_save_leaves_what_was_there(
    unbroken: TrainRun, dump_folder: Path, point: str, options: list[str]
) -> None:
    folder = broken_after(1, unbroken, dump_folder)
    before = contents(folder)
    killed = train(dump_folder, *FAST, *options, env={"FLAME_EXT_FAULT": point}, check=False)
    assert killed.exit_codes == [-9]
    assert steps_in(folder) == [1] and contents(folder / "step-1") == {
        name.removeprefix("step-1/"): content for name, content in before.items()
    }
    again = train(dump_folder, *FAST, *options)
    assert f"Resumed from {folder / 'step-1'}" in again.ranks[0].output
    assert again.values("loss") == unbroken.values("loss") and steps_in(folder) == [1, 2, 3]
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")], "nothing half-written stays"


def test_a_kill_while_a_step_is_deleted_leaves_no_part_of_it(unbroken: TrainRun, dump_folder: Path) -> None:
    folder, options = dump_folder / "checkpoint", (*FAST, "--checkpoint.keep_latest_k=2")
    killed = train(dump_folder, *options, env={"FLAME_EXT_FAULT": "before_delete"}, check=False)
    assert killed.exit_codes == [-9] and steps_in(folder) == [2, 3] and (folder / ".deleted-step-1").is_dir()
    train(dump_folder, *options)
    assert sorted(p.name for p in folder.iterdir()) == ["step-2", "step-3"]


def test_a_rank_that_is_killed_during_a_save_takes_the_others_along(unbroken: TrainRun, dump_folder: Path) -> None:
    folder = broken_after(1, unbroken, dump_folder)
    before = contents(folder)
    two = [*FAST, "--training.local_batch_size=1", "--training.global_batch_size=2"]
    two += ["--comm.init_timeout_seconds=20", "--comm.train_timeout_seconds=20"]
    killed = train(dump_folder, *two, env={"FLAME_EXT_FAULT": "after_shards:1"}, world_size=2, check=False, timeout=90)
    assert killed.exit_codes[1] == -9 and killed.exit_codes[0] not in (0, None)
    assert steps_in(folder) == [1] and before.items() <= contents(folder).items()
    train(dump_folder, *two, world_size=2)
    assert steps_in(folder) == [1, 2, 3]


@pytest.mark.parametrize("point", ["before_rename", "between_renames"])
def test_a_step_that_is_saved_again_is_never_lost(unbroken: TrainRun, dump_folder: Path, point: str) -> None:
    folder = broken_after(2, unbroken, dump_folder)
    before = contents(folder / "step-2")
    again = [*FAST, "--checkpoint.load_step=1"]
    killed = train(dump_folder, *again, env={"FLAME_EXT_FAULT": point}, check=False)
    assert killed.exit_codes == [-9]
    where = folder / ("step-2" if point == "before_rename" else ".replaced-step-2")
    assert contents(where) == before
    train(dump_folder, *FAST, "--checkpoint.load_step=2")
    assert steps_in(folder) == [1, 2, 3] and not list(folder.glob(".replaced-*"))
    assert (contents(folder / "step-2") == before) == (point == "before_rename"), "else the new one, which was complete"


def test_a_run_killed_in_its_export_is_complete_when_started_again(unbroken: TrainRun, dump_folder: Path) -> None:
    folder = broken_after(2, unbroken, dump_folder)
    exporting = [*FAST, "--checkpoint.last_save_in_hf"]
    killed = train(dump_folder, *exporting, env={"FLAME_EXT_FAULT": "during_export"}, check=False)
    assert killed.exit_codes == [-9] and steps_in(folder) == [1, 2, 3]
    assert not (dump_folder / "hf" / "step-3").exists()
    before = contents(folder)
    again = train(dump_folder, *exporting)
    output = again.ranks[0].output
    assert "Exporting step 3 again" in output and f"Already complete: {folder / 'step-3'}" in output
    export = contents(dump_folder / "hf" / "step-3")
    assert "model.safetensors" in export and "future_heads/model.safetensors" in export
    (dump_folder / "hf" / "step-3" / "model.safetensors").write_bytes(b"cut off")
    train(dump_folder, *exporting)
    assert contents(dump_folder / "hf" / "step-3") == export and contents(folder) == before
    assert "Exporting" not in train(dump_folder, *exporting).ranks[0].output


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_file_that_can_not_be_written_ends_the_run_with_its_error(
    unbroken: TrainRun, dump_folder: Path, mode: str
) -> None:
    folder = broken_after(1, unbroken, dump_folder)
    before = contents(folder)
    two = [*FAST, "--training.local_batch_size=1", "--training.global_batch_size=2", f"--checkpoint.async_mode={mode}"]
    two.append("--checkpoint.allow_config_change=experimental.custom_import")
    run = train(dump_folder, *two, SMALL_FILES, world_size=2, check=False)
    assert run.exit_codes == [1, 1]
    for rank in run.ranks:
        error = [line for line in rank.output.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and "[Errno 27] File too large" in error[0] and str(folder) in error[0], rank.output[
            -2000:
        ]
    assert steps_in(folder) == [1] and before.items() <= contents(folder).items()


def test_a_save_that_fails_in_the_background_ends_the_run_without_waiting_for_the_next(
    unbroken: TrainRun, dump_folder: Path
) -> None:
    broken_after(1, unbroken, dump_folder)
    run = train(
        dump_folder, *FAST, SMALL_FILES, "--checkpoint.async_mode=async", "--checkpoint.interval=30",
        "--training.steps=1000", "--checkpoint.allow_config_change=experimental.custom_import,training.steps", check=False,
    )  # fmt: skip
    assert run.exit_codes == [1] and "[Errno 27] File too large" in run.ranks[0].output
    assert 30 <= run.metrics[-1]["step"] < 60, "the first save is that of step 30, the next would be that of step 60"


@pytest.mark.matrix
def test_saves_by_a_process_of_their_own(unbroken: TrainRun, tmp_path: Path) -> None:
    """As ``async_with_pinned_mem`` does, in memory that is not pinned. Not by ``train``: its processes may not start others."""
    dump_folder, process = tmp_path / "run", "--experimental.custom_import=tests.faults.plugins.saving_process"
    command = [
        "./train.sh",
        f"--job.dump_folder={dump_folder}",
        *FAST,
        "--checkpoint.async_mode=async_with_pinned_mem",
        process,
    ]
    environment = {**os.environ, "NGPU": "1", "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "Completed checkpoint save request" in run.stdout + run.stderr, "another process has saved"
    steps, _ = find_steps(dump_folder / "checkpoint")
    assert [step.step for step in steps] == [1, 2, 3] and not any(damaged_files(s, s.manifest["files"]) for s in steps)
    resumed = tmp_path / "resumed"
    shutil.copytree(dump_folder / "checkpoint" / "step-2", resumed / "checkpoint" / "step-2")
    again = train(resumed, *FAST, "--checkpoint.allow_config_change=experimental.custom_import")
    assert again.values("loss") == unbroken.values("loss")[2:]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def test_a_full_disk(small_disk: Path) -> None:
    run = train(small_disk, *FAST, check=False)
    assert run.exit_codes == [1] and "[Errno 28] No space left on device" in run.ranks[0].output
    assert steps_in(small_disk / "checkpoint") == []


def test_a_folder_that_can_not_be_written(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run = train(small_disk, *FAST, check=False)
    assert run.exit_codes == [1]
    assert any(
        line.startswith("error: ") and "Read-only file system" in line for line in run.ranks[0].output.splitlines()
    )


def flip_a_bit(step: Path) -> None:
    shard = next(step.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def truncate_the_manifest(step: Path) -> None:
    os.truncate(step / "manifest.json", 100)


def delete_the_metadata(step: Path) -> None:
    (step / ".metadata").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit, ".distcp: SHA-256 is "),
        (truncate_the_manifest, "unreadable manifest.json"),
        (delete_the_metadata, ".metadata is absent"),
    ],
)
def test_a_damaged_step_is_passed_over_loudly(unbroken: TrainRun, dump_folder: Path, damage, reason: str) -> None:
    folder = broken_after(2, unbroken, dump_folder)
    damage(folder / "step-2")
    run = train(dump_folder, *FAST)
    (line,) = [line for line in run.ranks[0].output.splitlines() if "Passed over" in line and "step-2" in line]
    assert "WARNING" in line and reason in line
    assert f"Resumed from {folder / 'step-1'}" in run.ranks[0].output
    assert run.values("loss") == unbroken.values("loss") and steps_in(folder) == [1, 2, 3]


def test_no_other_step_is_taken_than_the_one_that_was_asked_for(unbroken: TrainRun, dump_folder: Path) -> None:
    folder = broken_after(2, unbroken, dump_folder)
    flip_a_bit(folder / "step-2")
    asked = train(dump_folder, *FAST, "--checkpoint.load_step=2", check=False)
    assert asked.exit_codes == [1] and "SHA-256 is " in asked.ranks[0].output.splitlines()[-1]
    flip_a_bit(folder / "step-1")
    before = contents(folder)
    damaged = train(dump_folder, *FAST, check=False)
    assert damaged.exit_codes == [1] and "restore the files from a copy" in damaged.ranks[0].output.splitlines()[-1]
    assert contents(folder) == before, "not seeded anew over it"


def test_only_complete_steps_of_this_run_are_deleted(unbroken: TrainRun, dump_folder: Path) -> None:
    folder = broken_after(2, unbroken, dump_folder)
    manifest = folder / "step-1" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "run": "another"}))
    for name in ("best-step-5", "step-7", "step-x", ".incomplete-step-9"):
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)
    (folder / "step-8").write_text("not even a folder")
    a_day = 24 * 3600
    os.utime(folder / "step-2", (0, (folder / "step-2").stat().st_mtime - a_day))  # no time of day is looked at
    foreign = {n: c for n, c in contents(folder).items() if not n.startswith("step-2/")}
    run = train(dump_folder, *FAST, "--checkpoint.keep_latest_k=2", "--training.steps=5",
                "--checkpoint.allow_config_change=training.steps")  # fmt: skip
    assert f"Resumed from {folder / 'step-2'}" in run.ranks[0].output
    assert steps_in(folder) == [1, 4, 5]
    assert {n: c for n, c in contents(folder).items() if not n.startswith(("step-4/", "step-5/"))} == foreign


def test_a_second_run_in_the_folder_is_refused(unbroken: TrainRun, dump_folder: Path) -> None:
    broken_after(2, unbroken, dump_folder)
    lock = FolderLock(dump_folder)
    lock.acquire()
    before = contents(dump_folder)
    second = train(dump_folder, *FAST, check=False)
    assert second.exit_codes == [1] and contents(dump_folder) == before
    error = second.ranks[0].output.splitlines()[-1]
    assert error.startswith("error: ") and f"in use by process {os.getpid()} on " in error
    lock.release()
    failed = train(dump_folder, *FAST, "--training.dataset=nowhere", check=False)
    assert failed.exit_codes == [1] and not (dump_folder / LOCK_NAME).exists(), "released by a run that fails early"
    train(dump_folder, *FAST)
    assert not (dump_folder / LOCK_NAME).exists()


def test_a_changed_configuration_is_named_field_by_field(unbroken: TrainRun, dump_folder: Path) -> None:
    folder = broken_after(2, unbroken, dump_folder)
    before = contents(folder)
    changed = [*FAST, "--optimizer.lr=5e-4", "--metrics.log_freq=1", "--job.description=other"]
    refused = train(dump_folder, *changed, check=False)
    assert refused.exit_codes == [1] and contents(folder) == before
    assert "  - optimizer.lr: then 0.001, now 0.0005" in refused.ranks[0].output.splitlines()
    run = train(dump_folder, *changed, "--checkpoint.allow_config_change=optimizer.lr")
    assert "allow_config_change permits: optimizer.lr: then 0.001, now 0.0005" in run.ranks[0].output
    assert run.values("lr")[2] == pytest.approx(unbroken.values("lr")[2] / 2), "and it is the one that is used"


def test_a_position_in_other_lanes_is_refused(unbroken: TrainRun, dump_folder: Path) -> None:
    folder = broken_after(2, unbroken, dump_folder)
    before = contents(folder)
    larger = [*FAST, "--training.global_batch_size=4"]
    run = train(dump_folder, *larger, "--checkpoint.allow_config_change=training.global_batch_size", check=False)
    assert run.exit_codes == [1] and contents(folder) == before
    assert (
        "the step has a data position of 2 lanes, this run has 4: set training.global_batch_size = 2"
        in run.ranks[0].output.splitlines()[-1]
    )
