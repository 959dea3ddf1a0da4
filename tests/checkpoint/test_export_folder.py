"""One writer for a folder, no half of one under its name, and exports that know of which step they are."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flame_ext.checkpoint import export_folder
from flame_ext.checkpoint.export_folder import ExportFolder, exports_of, origin_of, why_not_exported
from flame_ext.errors import CheckpointError
from flame_ext.tools.convert import end_with
from tests.checkpoint.test_steps import write_step

FORK = multiprocessing.get_context("fork")


def write(final: Path, content: str, origin: dict | None = None, wait: threading.Event | None = None) -> None:
    place = ExportFolder(final, replace=True)
    try:
        temporary = place.open()
        (temporary / "part").mkdir()
        (temporary / "part" / "weights.safetensors").write_text(content)
        if wait is not None:
            wait.wait()
        (temporary / "config").write_text(content)
        place.publish(origin)
    finally:
        place.close()


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_of_two_writers_one_waits_for_the_other_and_both_write_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(export_folder, "_SAID_AFTER", 0.05)
    final, go = tmp_path / "hf" / "step-8", threading.Event()
    first = threading.Thread(target=write, args=(final, "first"), kwargs={"wait": go})
    first.start()
    while not list(tmp_path.glob("hf/.incomplete-step-8-*/part/weights.safetensors")):
        time.sleep(0.01)
    second = threading.Thread(target=write, args=(final, "second"))
    second.start()
    while "Waiting for another process" not in caplog.text:
        time.sleep(0.01)
    assert len(list(tmp_path.glob("hf/.incomplete-step-8-*"))) == 1 and not final.exists()
    go.set()
    first.join()
    second.join()
    assert contents(final) == {"part/weights.safetensors": "second", "config": "second"}
    assert [p.name for p in final.parent.iterdir()] == ["step-8"], "neither a lock nor a half is left"


def test_what_is_there_is_not_overwritten_unless_it_is_to_be(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    place = ExportFolder(tmp_path / "out", replace=False)
    with pytest.raises(CheckpointError, match="is there already"):
        place.open()
    place.close()
    write(tmp_path / "out", "new")
    assert contents(tmp_path / "out")["config"] == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_killed_writers_have_left_is_removed(tmp_path: Path) -> None:
    for name in (".incomplete-out", ".incomplete-out-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    (tmp_path / ".incomplete-out.lock").touch()
    others = [".incomplete-out-large-0123abcd", ".incomplete-outer"]  # other folders are written, too
    for name in others:
        (tmp_path / name).mkdir()
    write(tmp_path / "out", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [*others, "out"]


def test_a_file_that_is_lost_on_the_way_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(final: Path, temporary: Path) -> None:
        shutil.rmtree(temporary / "part")
        temporary.rename(final)

    monkeypatch.setattr(export_folder, "put_in_place", losing)
    with pytest.raises(
        CheckpointError, match=r"holds \['config'\] after it was written, expected .*part/weights.safetensors"
    ):
        write(tmp_path / "out", "new")


def test_an_export_is_that_of_its_step_alone_and_complete(tmp_path: Path) -> None:
    step, other = write_step(tmp_path / "a", 8), write_step(tmp_path / "b", 8, b"other weights")
    export = tmp_path / "hf" / "step-8"
    assert "is not there" in why_not_exported(step, export)
    write(export, "new", origin_of(step))
    assert why_not_exported(step, export) is None
    assert "of another step" in why_not_exported(other, export)
    (export / "config").write_text("edited")
    (export / ".cache").mkdir()
    (export / ".cache" / "of-an-upload").touch()
    assert why_not_exported(step, export) is None
    (export / "config").unlink()
    assert "does not hold config as" in why_not_exported(step, export)
    write(export, "new", origin_of(step))
    (export / "part" / "weights.safetensors").write_text("n")
    assert "does not hold part/weights.safetensors as" in why_not_exported(step, export)
    (export / "export.json").write_text("{")
    assert "cannot be read" in why_not_exported(step, export)


def test_an_export_of_an_older_version_counts_for_a_step_of_an_older_version(tmp_path: Path) -> None:
    step, export = write_step(tmp_path, 8), tmp_path / "hf"
    write(export, "new")
    assert why_not_exported(step, export) is None
    manifest = step / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "lineage": []}))
    assert "has no export.json" in why_not_exported(step, export)


def test_the_exports_of_a_run_are_those_of_its_steps_also_where_these_are_deleted(tmp_path: Path) -> None:
    steps, hf = tmp_path / "checkpoint", tmp_path / "hf"
    for number in (2, 4, 10, 12):
        write(
            hf / f"step-{number}",
            "weights",
            {"run": "one", "step": number, "files_sha256": "of a step that was deleted"},
        )
    write(hf / "step-6", "weights", {"run": "another", "step": 6, "files_sha256": "its"})
    (hf / "step-8").mkdir()
    assert exports_of(hf, steps, "one", 10) == [hf / "step-2", hf / "step-4", hf / "step-10"]
    write_step(steps, 4)
    assert exports_of(hf, steps, "one", 10) == [hf / "step-2", hf / "step-10"], "step 4 is another one now"
    assert exports_of(tmp_path / "absent", steps, "one", 10) == []


def _starts_a_child(pipe: int) -> None:
    code = "import os, sys, time; from flame_ext.tools.convert import end_with; end_with(int(sys.argv[1])); "
    code += "os.write(int(sys.argv[2]), b'.'); time.sleep(600)"
    subprocess.run([sys.executable, "-c", code, str(os.getpid()), str(pipe)], pass_fds=[pipe])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child")
def test_a_converter_ends_with_the_run_that_is_killed() -> None:
    reading, writing = os.pipe()
    run = FORK.Process(target=_starts_a_child, args=(writing,))
    run.start()
    os.close(writing)
    assert os.read(reading, 1) == b"."
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    ready, _, _ = select.select([reading], [], [], 30)
    assert ready and os.read(reading, 1) == b"", "the child has ended, too"
    os.close(reading)


def test_a_converter_whose_run_has_ended_before_it_began_does_not_begin() -> None:
    child = FORK.Process(target=end_with, args=(os.getppid(),))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
