"""The line that says how much of a run is left, by a clock that the tests wind."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import pytest

from flame_ext.config.sections import FlameJobConfig
from flame_ext.run.progress import Progress, _duration
from tests.run.test_metrics import log, processor


class Clock:
    """Says the time that it was last set to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def config(steps: int = 1000, interval: int = 250) -> FlameJobConfig:
    made = FlameJobConfig()
    made.training.steps, made.checkpoint.interval = steps, interval
    return made


def course(progress: Progress, clock: Clock, steps: range, seconds: float, tokens: int = 512) -> dict[int, str]:
    """What is said after each of these steps, each of which takes ``seconds``."""
    said = {}
    for step in steps:
        clock.now += seconds
        if (line := progress.line(step, step * tokens)) is not None:
            said[step] = line
    return said


def test_steps_tokens_time_and_the_next_save() -> None:
    clock = Clock()
    progress = Progress(config(), clock)
    assert progress.line(1, 512) is None
    clock.now += 90  # 30 steps of 3 s
    assert (
        progress.line(31, 31 * 512)
        == "969 of 1,000 steps left, 496,128 tokens, 48 min 27 s; next save after step 250, in 10 min 57 s"
    )


def test_one_line_a_minute_at_most() -> None:
    clock = Clock()
    said = course(Progress(config(), clock), clock, range(1, 400), 0.7)
    times = [100 + 0.7 * step for step in said]
    assert len(said) == 4 and all(later - earlier >= 60 for earlier, later in pairwise(times))
    slow = course(Progress(config(), clock), clock, range(10, 60, 10), 300)
    assert list(slow) == [20, 30, 40, 50], "where steps take longer, a line each"


def test_the_rate_is_the_present_one() -> None:
    """Neither the first step, which compiles, nor what was slower an hour ago."""
    clock = Clock()
    progress = Progress(config(steps=100, interval=1000), clock)
    course(progress, clock, range(1, 2), 3000)
    course(progress, clock, range(2, 50), 90)
    (line,) = course(progress, clock, range(50, 90), 2).values()
    assert line == "21 of 100 steps left, 10,752 tokens, 42 s; next save after step 100, in 42 s"


def test_a_resumed_run_counts_from_where_it_goes_on() -> None:
    clock = Clock()
    (line, *_) = course(Progress(config(), clock), clock, range(501, 600), 10).values()
    assert line.startswith("493 of 1,000 steps left, 252,416 tokens, 1 h 22 min; next save after step 750,")


def test_epochs_count_the_steps_later() -> None:
    clock, made = Clock(), config(steps=10_000)
    progress = Progress(made, clock)
    made.training.steps = 100
    assert all("of 100 steps" in line for line in course(progress, clock, range(1, 20), 10).values())


def test_nothing_is_said_at_the_end_and_no_save_where_none_is_made() -> None:
    clock, made = Clock(), config(steps=20)
    made.checkpoint.load_only = True
    said = course(Progress(made, clock), clock, range(1, 21), 59)
    assert 20 not in said and said and not any("save" in line for line in said.values())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (7530, "2 h 5 min"), (273_700, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


def test_it_stands_beside_the_step_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made, clock = processor(tmp_path, monkeypatch), Clock()
    made.job_config.metrics.disable_color_printing = True
    monkeypatch.setattr(made._progress, "_clock", clock)
    for step in (1, 11, 21):
        log(made, step=step, n_tokens_seen=step * 8)
        clock.now += 61 if step == 11 else 1
    (line,) = [message for message in caplog.messages if "steps left" in message]
    assert "9,979 of 10,000 steps left, 79,832 tokens" in line
    assert caplog.messages.index(line) == len(caplog.messages) - 1
