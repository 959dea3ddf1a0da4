"""The files beside TensorBoard: their lines, and what is dropped when a run is resumed."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flame_ext.config.sections import FlameJobConfig
from flame_ext.run import metrics
from flame_ext.run.metrics import FutureMetricsProcessor

ONE = {"cp": 1, "world_size": 1, "non_data_parallel_size": 1, "pp": 1, "pp_enabled": False}


class Logged:
    """In the place of TensorBoard."""

    def __init__(self) -> None:
        self.values: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.values.append((step, values))


def processor(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int = 0,
    **dims: Any,
) -> FutureMetricsProcessor:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
    config = FlameJobConfig()
    config.job.dump_folder = str(folder)
    config.metrics.enable_tensorboard = False
    made = FutureMetricsProcessor(config, SimpleNamespace(**{**ONE, **dims}))
    made.logger, made.num_flops_per_token = Logged(), 1
    return made


def log(made: FutureMetricsProcessor, step: int = 1, loss: float = 2.0, **extra: float | None) -> None:
    made.data_loading_times.append(0.1)
    made.log(step, loss, 3.0, 0.5, extra)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_line_has_the_parts_and_what_torchtitan_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = processor(tmp_path / "new", monkeypatch)
    log(made, step=7, lr=0.25, n_tokens_seen=100, loss_ce=1.5, loss_future=None)
    (line,) = lines(tmp_path / "new")
    assert line.pop("tokens_per_second") >= 0
    expected = {
        "step": 7,
        "loss": 2.0,
        "loss_ce": 1.5,
        "loss_future": None,
        "lr": 0.25,
        "grad_norm": 0.5,
        "tokens_seen": 100,
    }
    assert line == expected
    ((step, logged),) = made.logger.values
    assert step == 7 and logged["loss_ce"] == 1.5 and "loss_future" not in logged and logged["lr"] == 0.25


def test_the_console_shows_losses_and_a_few_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {"loss_ce": 1.5, "loss_future": None, "future_top1": 0.25, "time_teacher": 3.0}
    with caplog.at_level(logging.INFO):
        made = processor(tmp_path, monkeypatch)
        made.shown = ("future_top1",)
        log(made, **parts)
    shown = caplog.messages[-1]
    assert "loss_ce:  1.50000" in shown and "future_top1:  0.25000" in shown
    assert "loss_future" not in shown and "time_teacher" not in shown


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    made = processor(tmp_path, monkeypatch)
    log(made, loss=value, loss_ce=value)
    made.log_validation(value, 1, {"validation_metrics/loss_future": value})
    assert lines(tmp_path)[0]["loss"] is None and lines(tmp_path)[0]["loss_ce"] is None
    assert lines(tmp_path, "validation.jsonl") == [{"step": 1, "loss_ce": None, "loss_future": None}]


@pytest.mark.parametrize(
    ("dims", "factor"),
    [
        ({}, 1),
        ({"world_size": 8}, 8),
        ({"world_size": 8, "non_data_parallel_size": 4}, 2),  # four ranks share a batch
    ],
)
def test_tokens_per_second_are_those_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dims: dict[str, int], factor: int
) -> None:
    made = processor(tmp_path, monkeypatch, **dims)
    made.ntokens_since_last_log, made.time_last_log = 1000, 10.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: 14.0)
    log(made)
    assert lines(tmp_path)[0]["tokens_per_second"] == 250 * factor
    assert made.ntokens_since_last_log == 0 and made.time_last_log == 14.0


def test_ranks_that_share_a_sequence_count_its_tokens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtitan adds up the tokens of all context-parallel ranks, and divides a rank's part of the loss by all of them."""
    made = processor(tmp_path, monkeypatch, cp=2, world_size=4, non_data_parallel_size=2)
    log(made, n_tokens_seen=400)
    assert lines(tmp_path)[0]["tokens_seen"] == 200
    ((_, logged),) = made.logger.values
    assert logged["n_tokens_seen"] == 200
    assert logged["loss_metrics/global_max_loss"] == 6.0 and logged["loss_metrics/global_avg_loss"] == 2.0


@pytest.mark.parametrize(("pp", "writer"), [(1, 0), (2, 4)])
def test_one_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pp: int, writer: int) -> None:
    """The first one, or the first one that has the last stage of a pipeline."""
    for rank in range(8):
        made = processor(tmp_path / str(rank), monkeypatch, rank, world_size=8, pp=pp, pp_enabled=pp > 1)
        log(made)
        made.log_validation(1.0, 1)
    assert [folder.name for folder in tmp_path.iterdir()] == [str(writer)]
    for rank in range(8):
        made = processor(tmp_path / str(writer), monkeypatch, rank, world_size=8, pp=pp, pp_enabled=pp > 1)
        made.rewind(0)
        assert len(lines(tmp_path / str(writer))) == (rank < writer)


def test_lines_of_steps_that_were_lost_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = processor(tmp_path, monkeypatch)
    made.rewind(3)  # no file yet
    assert list(tmp_path.iterdir()) == []
    for step in range(1, 6):
        log(made, step=step)
        made.log_validation(1.0, step)
    before = (tmp_path / "metrics.jsonl").read_text()
    made.rewind(5)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    made.rewind(3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before.splitlines(keepends=True)[:3])
    assert [line["step"] for line in lines(tmp_path, "validation.jsonl")] == [1, 2, 3]
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "validation.jsonl"]
        and "unreadable" not in caplog.text
    )
    log(made, step=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "cut",
    [b'{"step": 3, "lo', b'{"loss": 1.0}', b"[1]", b'{"step": "3"}', b'{"step": null}', b"\xff\xfe", b"[" * 100_000],
    ids=["cut", "no-step", "list", "text", "null", "bytes", "deep"],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "validation.jsonl"])
def test_a_line_that_cannot_be_read_is_dropped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cut: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(b'{"step": 1}\n' + cut + b'\n{"step": 2}\n{"step": 4}\n' + cut)
    processor(tmp_path, monkeypatch).rewind(3)
    assert (tmp_path / name).read_text() == '{"step": 1}\n{"step": 2}\n'
    (said,) = (message for message in caplog.messages if "unreadable" in message)
    assert (
        f"{tmp_path / name}: dropped an unreadable line, cut off when its run ended" in said and "(line 2, 5)" in said
    )


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer raises it on all ranks at the end of the step."""
    (tmp_path / "metrics.jsonl").mkdir()
    made = processor(tmp_path, monkeypatch)
    log(made)
    assert re.search("metrics.jsonl cannot be written: .*Is a directory", made.write_error or "")


def test_a_validation_line_has_the_names_without_their_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = processor(tmp_path, monkeypatch)
    made.log_validation(1.25, 9, {"validation_metrics/news/loss_ce": 1.0, "validation_metrics/loss_future": 2.0})
    assert lines(tmp_path, "validation.jsonl") == [
        {"step": 9, "loss_ce": 1.25, "news/loss_ce": 1.0, "loss_future": 2.0}
    ]
    assert made.logger.values[0][1]["validation_metrics/news/loss_ce"] == 1.0
