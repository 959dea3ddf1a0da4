"""From the job's configuration to the exports of its saved steps; tests/checkpoint/test_export.py has the exports themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame_ext.config.sections import FlameJobConfig
from flame_ext.run.background_export import background_exports


def job(**export: int) -> FlameJobConfig:
    config = FlameJobConfig()
    config.job.dump_folder, config.model.hf_assets_path = "runs/one", "assets/olmo"
    config.training.steps, config.export.interval = 12, export.get("interval", 4)
    config.checkpoint.last_save_in_hf = bool(export.get("last", True))
    return config


def test_options_are_those_of_the_job() -> None:
    config = job()
    config.checkpoint.export_dtype, config.export.max_shard_size = "float16", "2GB"
    exports = background_exports(config, lambda: False)
    options = ["--assets", "assets/olmo", "--dtype", "float16", "--max-shard-size", "2GB"]
    assert exports.folder == Path("runs/one/hf") and exports.options == options
    config.experimental.custom_import, config.seed.trust_remote_code = "my.plugin", True
    assert background_exports(config, lambda: False).options == [
        *options, "--import", "my.plugin", "--trust-remote-code",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "last", "finishing", "expected"),
    [
        (4, 1, False, [4, 8]),  # the ranks themselves export step 12
        (4, 0, False, [4, 8, 12]),
        (4, 1, True, []),
        (4, 0, True, [4, 8, 12]),
        (0, 1, False, []),
    ],
)
def test_steps_of_the_interval_are_due_but_the_last(
    interval: int, last: int, finishing: bool, expected: list[int]
) -> None:
    exports = background_exports(job(interval=interval, last=last), lambda: finishing)
    assert [step for step in range(1, 13) if exports.due(step)] == expected
