"""A run from Python: the command's numbers to the bit, errors as exceptions, and a process that goes on afterwards."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchtitan.train

from flame_ext.config.resume_record import flat
from flame_ext.config.sections import DataSource, FlameJobConfig
from flame_ext.errors import ConfigError, UserError
from flame_ext.preflight.parse import check, new_config, parse
from flame_ext.run.process import LAUNCHED
from flame_ext.run.signals import EXIT_PREEMPTED, STOP_SIGNALS
from flame_ext.train import run
from tests.faults.test_resume import assert_equal, saved
from tests.ranks import DEBUG_TOML, TrainRun, run_ranks, train


def debug_job(dump_folder: Path) -> FlameJobConfig:
    """The first ten steps of the debug job, built in code without its TOML."""
    config = new_config()
    config.job.dump_folder, config.job.description = str(dump_folder), "tiny OLMo with a future predictor"
    config.model.name, config.model.flavor, config.model.converters = "hf_causal_lm", "auto", ["future_prediction"]
    config.model.hf_assets_path = config.checkpoint.initial_load_path = "tests/assets/tiny_olmo"
    config.checkpoint.enable, config.checkpoint.interval, config.checkpoint.keep_latest_k = True, 5, 2
    config.checkpoint.last_save_model_only, config.checkpoint.last_save_in_hf = False, True
    encoder = config.future_encoder
    encoder.enable, encoder.summary_method, encoder.future_k = True, "anticausal", 32
    encoder.temperature, encoder.loss_weight = 0.1, 0.1
    config.future_predictor.enable, config.future_predictor.head_type = True, "mlp"
    training = config.training
    training.dataset, training.local_batch_size, training.seq_len, training.steps = "python_stdlib", 8, 256, 10
    training.mixed_precision_param = "float32"
    config.optimizer.lr, config.optimizer.implementation = 1e-3, "foreach"
    schedule = config.lr_scheduler
    schedule.warmup_steps, schedule.decay_ratio, schedule.decay_type, schedule.min_lr_factor = 5, 0.5, "cosine", 0.1
    schedule.total_steps = 60
    config.activation_checkpoint.mode = "none"
    config.metrics.log_freq, config.metrics.disable_color_printing = 1, True
    config.debug.seed = 0
    return config


def surroundings() -> dict[str, Any]:
    """What a process has that a run could change."""
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in STOP_SIGNALS],
        "collecting": gc.isenabled(),
        "logging": (logging.getLogger().level, [*logging.getLogger().handlers]),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "group": dist.is_initialized(),
        "threads": {thread.name for thread in threading.enumerate() if thread.name == "lock"},
    }


def as_a_notebook(folder: Path) -> dict[str, Any]:
    """Several runs in a process that torchrun has not started."""
    # torchtitan waits two seconds for other ranks at the end of each run.
    torchtitan.train.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _seconds: None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    before, found = surroundings(), {}
    config = debug_job(folder / "run")
    given = dict(flat(config))
    torch.manual_seed(17)  # as if something had been computed before
    found["first"], found["config_kept"] = run(config), dict(flat(config)) == given
    found["after_first"] = surroundings() == before
    found["locked"] = (folder / "run" / ".lock").exists()
    wrong = debug_job(folder / "wrong")
    wrong.checkpoint.initial_load_path = "tests/assets"  # known only when the model is built
    try:
        run(wrong)
    except UserError as e:
        found["error"] = str(e)
    found["after_error"] = surroundings() == before
    found["locked_after_error"] = (folder / "wrong" / ".lock").exists()

    again = debug_job(folder / "again")
    again.training.steps, again.training.seq_len, again.debug.deterministic = 3, 32, True
    again.checkpoint.last_save_in_hf = False
    logging.getLogger().addHandler(Interrupting())  # whose owner sees every line
    before = surroundings()
    found["interrupted"] = run(again)
    found["after_interrupt"] = surroundings() == before
    found["resumed"] = run(again)
    return found


class Interrupting(logging.Handler):
    """Presses a notebook's button after the first step of the first run."""

    pressed = False

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().setLevel(logging.INFO)
        if not self.pressed and record.getMessage().startswith("step:  1"):
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What :func:`as_a_notebook` found, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("notebook")
    (process,) = run_ranks(as_a_notebook, 1, folder, folder=folder / "logs")
    assert process.exit_code == 0, process.output[-3000:]
    return process.value, folder, process.output


def weights_and_moments(run: Path) -> dict[str, Any]:
    """Of the last step; and the bytes of the export."""
    state = saved(run / "checkpoint" / "step-10")
    assert any(name.startswith("optimizer.") for name in state)
    names = ("model.safetensors", "future_heads/model.safetensors")
    return state | {name: (run / "hf" / "step-10" / name).read_bytes() for name in names}


def figures(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second" and not k.startswith("time_")} for line in lines]


def test_a_configuration_in_code_is_the_toml_number_for_number(
    notebook: tuple[dict[str, Any], Path, str], ten_steps: TrainRun
) -> None:
    found, folder, output = notebook
    assert found["first"] == 0 and found["config_kept"]
    assert figures(folder / "run") == figures(ten_steps.dump_folder) and len(figures(folder / "run")) == 10
    # Generators are left out: that of Python's random module, which nothing draws from, is each process's own.
    assert_equal(weights_and_moments(folder / "run"), weights_and_moments(ten_steps.dump_folder), ("rng",))
    assert "[titan]" in output and "step: 10" in output, "a process without handlers of logs sees the steps"


def test_the_process_is_left_as_it_was(notebook: tuple[dict[str, Any], Path, str]) -> None:
    found, *_ = notebook
    assert found["after_first"] and found["after_error"] and found["after_interrupt"]
    assert not found["locked"] and not found["locked_after_error"]


def test_an_error_is_raised_and_the_next_run_works(notebook: tuple[dict[str, Any], Path, str]) -> None:
    found, *_ = notebook
    assert found["error"].startswith("tests/assets") and "\n" not in found["error"]


def test_an_interrupt_saves_and_the_same_call_goes_on(notebook: tuple[dict[str, Any], Path, str]) -> None:
    found, folder, _ = notebook
    assert (found["interrupted"], found["resumed"]) == (EXIT_PREEMPTED, 0)
    assert [line["step"] for line in figures(folder / "again")] == [1, 2, 3]


def on_two_ranks(folder: Path) -> int:
    config = debug_job(folder / "run")
    config.training.steps, config.training.local_batch_size, config.checkpoint.last_save_in_hf = 2, 4, False
    return run(config)


@pytest.mark.matrix
def test_under_torchrun_it_is_the_command(tmp_path: Path) -> None:
    ranks = run_ranks(on_two_ranks, 2, tmp_path, folder=tmp_path / "logs")
    assert [rank.value for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    options = ("--training.steps=2", "--training.local_batch_size=4", "--checkpoint.no-last_save_in_hf")
    of_command = train(tmp_path / "command", *options, "--lr_scheduler.total_steps=60", world_size=2)
    assert figures(tmp_path / "run") == figures(of_command.dump_folder)


def fails_on_one_rank(folder: Path) -> str:
    config = debug_job(folder / f"rank-{os.environ['RANK']}")
    config.experimental.custom_import = "tests.faults.plugins.rank_raises"
    try:
        run(config)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "ended"


@pytest.mark.matrix
def test_a_lost_rank_is_said_by_the_others(tmp_path: Path) -> None:
    first, second = (rank.value for rank in run_ranks(fails_on_one_rank, 2, tmp_path, folder=tmp_path / "logs"))
    assert {first.partition(":")[0], second.partition(":")[0]} == {"LostRankError", "RuntimeError"}, (first, second)


def test_what_toml_refuses_is_refused() -> None:
    config: Any = debug_job(Path("unused"))
    config.training.step, config.training.steps = 5, "5"
    config.metrics = {"log_freq": 1}
    config.data.sources = [DataSource(path="docs", weight="much")]
    with pytest.raises(ConfigError) as refused:
        check(config)
    for said in (
        "unknown key 'training.step' (did you mean 'training.steps'?)",
        "'training.steps' must be an integer, got '5' (str)",
        "'metrics' is a section (Metrics), got {'log_freq': 1}",
        "'data.sources[0].weight' must be a number, got 'much' (str)",
    ):
        assert said in str(refused.value)


def test_checks_across_sections_and_of_sections_are_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = debug_job(tmp_path)
    config.checkpoint.keep_latest_k = 1
    with pytest.raises(ConfigError, match="keep_latest_k must be 0"):
        check(config)
    config = debug_job(tmp_path)
    config.validation.steps = 0  # torchtitan looks at it when the section is made, not when it is assigned
    with pytest.raises(ConfigError, match="validation steps must be positive"):
        check(config)
    monkeypatch.setenv("RUNS", str(tmp_path))
    config = debug_job(Path("$RUNS/one"))
    assert check(config).job.dump_folder == f"{tmp_path}/one"


def test_a_toml_changed_in_code_is_checked_as_a_whole(tmp_path: Path) -> None:
    config = parse([f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={tmp_path}"])
    before = dict(flat(config))
    assert dict(flat(check(config))) == before
    config.future_predictor.enable = False
    config.action_layer.enable = True
    config.future_encoder.enable = False
    with pytest.raises(ConfigError, match="action_layer"):
        check(config)


def test_where_it_cannot_run_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    config = debug_job(tmp_path / "refused")
    config.training.seq_len = "256"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="'training.seq_len' must be an integer"):
        run(config)
    assert not any(name in os.environ for name in LAUNCHED)
    raised: list[UserError] = []

    def in_thread() -> None:
        try:
            run(debug_job(tmp_path))
        except UserError as e:
            raised.append(e)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK and LOCAL_RANK not set"):
        run(debug_job(tmp_path))
    assert list(tmp_path.iterdir()) == []
