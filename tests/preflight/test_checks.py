"""Valid configurations pass; findings reach the user in one line before a process group exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame_ext.train import parse
from tests.ranks import REPOSITORY, TINY_OLMO, train


@pytest.mark.parametrize("name", sorted(p.name for p in (REPOSITORY / "configs").glob("*.toml")))
def test_committed_configurations_are_valid(name: str) -> None:
    options = [] if name == "debug.toml" else [f"--model.hf_assets_path={TINY_OLMO}", "--training.seq_len=512"]
    config = parse([f"--job.config_file={REPOSITORY / 'configs' / name}", *options])
    assert config.future_encoder.enable and config.model.converters == ["future_prediction"]


def test_errors_reach_the_user_in_one_line_before_anything_is_made(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--future_encoder.future_k=-3", world_size=2, check=False)
    assert run.exit_codes == [2, 2] and not run.dump_folder.exists()
    for rank in run.ranks:
        assert "error: future_encoder.future_k must be >= 0 (0 = all the future), got -3" in rank.output
        assert "Traceback" not in rank.output
