"""What follows exports: in which order, how often, and what is said; the commands are small programs that note what they are told."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from flame_ext.run import child
from flame_ext.run.followers import Follower, Followers

# Notes its arguments, then does what stands in a file of the export's name, if there is one.
PROGRAM = """
import pathlib, sys
notes, export = map(pathlib.Path, sys.argv[1:3])
assert sys.argv[3] == "--end-with"
with notes.open("a") as file:
    print(export.name, file=file)
if (code := notes.with_name(export.name)).exists():
    exec(code.read_text())
print("first line")
print("done with", export.name)
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(child, "PROGRAM", ("-c", PROGRAM))
    return tmp_path / "notes"


def followers(notes: Path, *more: Follower, target: str = "", identity: str = "first", **options: object) -> Followers:
    follower = Follower("upload", lambda _step, export: [str(notes), str(export)], target=target, **options)
    return Followers([follower, *more], notes.parent / "hf", lambda _export: identity)


def follow(of: Followers, notes: Path, *steps: int) -> list[str]:
    """Follows the exports of these steps, waits, and returns what was noted meanwhile."""
    before = len(noted(notes))
    for step in steps:
        of.start(notes.parent / "hf" / f"step-{step}")
    wait(of)
    return noted(notes)[before:]


def noted(notes: Path) -> list[str]:
    return notes.read_text().split() if notes.exists() else []


def wait(of: Followers) -> None:
    deadline = time.monotonic() + 30
    while of.waiting():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_export_is_followed_once_in_order(notes: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert follow(followers(notes), notes, 2, 4, 10, 4) == ["step-2", "step-4", "step-10"]
    assert "upload of step-4: done with step-4" in caplog.messages
    assert follow(followers(notes), notes, 2, 10, 12) == ["step-12"], "another process, a start later"
    assert follow(followers(notes, identity="second"), notes, 2) == ["step-2"], "another export of the name"
    assert follow(followers(notes, target="s3://other"), notes, 2, 4) == ["step-2", "step-4"]


def test_a_failure_is_said_and_made_up_for_by_the_next_run(notes: Path, caplog: pytest.LogCaptureFixture) -> None:
    fails = notes.with_name("step-4")
    fails.write_text("sys.exit('Traceback\\nerror: no such bucket\\nleaked 3 objects')")
    assert follow(followers(notes), notes, 2, 4) == ["step-2", "step-4"]
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith("The upload of step-4 failed: no such bucket; ") and "at its next start" in message
    fails.unlink()
    assert follow(followers(notes), notes, 2, 4) == ["step-4"]


def test_a_failure_is_tried_again_once_after_a_success(notes: Path) -> None:
    fails = notes.with_name("step-2")
    fails.write_text("sys.exit(1)")
    of = followers(notes)
    assert follow(of, notes, 2, 4) == ["step-2", "step-4", "step-2"]
    assert follow(of, notes, 6) == ["step-6"]
    fails.unlink()
    assert follow(followers(notes), notes, 2, 4, 6) == ["step-2"]


def test_cancelled_ones_end_and_are_made_up_for(notes: Path) -> None:
    sleeps = notes.with_name("step-2")
    sleeps.write_text("import time; time.sleep(60)")
    of = followers(notes)
    of.start(notes.parent / "hf" / "step-2")
    of.start(notes.parent / "hf" / "step-4")
    while not noted(notes):
        time.sleep(0.02)
    assert of.waiting() == ["upload of step-2", "upload of step-4"]
    began = time.monotonic()
    of.cancel()
    assert time.monotonic() - began < 10 and of.waiting() == []
    sleeps.unlink()
    assert noted(notes) == ["step-2"] and follow(followers(notes), notes, 2, 4) == ["step-2", "step-4"]


def test_only_due_ones_are_followed_and_none_waits_for_another(notes: Path) -> None:
    notes.with_name("step-2").write_text("import time; time.sleep(60)")
    other = notes.with_name("other")
    last = Follower(
        "push", lambda _step, export: [str(other), str(export).replace("step", "last")], due=lambda _, is_last: is_last
    )
    of = followers(notes, last)
    of.start(notes.parent / "hf" / "step-2")
    of.start(notes.parent / "hf" / "step-4", is_last=True)
    while of.waiting() != ["upload of step-2", "upload of step-4"]:
        time.sleep(0.02)
    assert noted(other) == ["last-4"]
    of.cancel()


def test_at_the_end_nothing_is_begun_behind_a_failure(notes: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes.with_name("step-2").write_text("sys.exit(1)")
    of = followers(notes)
    of.start(notes.parent / "hf" / "step-2")
    of.start(notes.parent / "hf" / "step-4")
    assert of.end() == ["upload of step-2", "upload of step-4"]
    wait(of)
    assert noted(notes) == ["step-2"] and "The upload of step-4 failed: not begun" in caplog.text
    notes.with_name("step-2").unlink()
    assert follow(followers(notes), notes, 2, 4) == ["step-2", "step-4"]
