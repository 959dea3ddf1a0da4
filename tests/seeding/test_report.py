"""A run remembers what it was seeded from, through every step and every restart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.ranks import TINY_OLMO, train


def test_a_resume_against_another_source_says_so(tmp_path: Path, dump_folder: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(TINY_OLMO, source)
    options = ["--checkpoint.interval=1", "--training.local_batch_size=2"]
    options += ["--checkpoint.allow_config_change=training.steps", f"--checkpoint.initial_load_path={source}"]
    train(dump_folder, *options, "--training.steps=1")
    report = json.loads((dump_folder / "seed_report.json").read_text())
    identity = {key: report[key] for key in ("source", "revision", "source_digest", "weights_digest")}
    assert len(identity["weights_digest"]) == 64

    def manifest(step: int) -> dict:
        return json.loads((dump_folder / "checkpoint" / f"step-{step}" / "manifest.json").read_text())

    assert manifest(1)["seed"] == identity
    (dump_folder / "seed_report.json").unlink()
    same = train(dump_folder, *options, "--training.steps=2")
    assert "Resuming from" in same.ranks[0].output and "This run was seeded from" not in same.ranks[0].output
    assert manifest(2)["seed"] == identity, "carried on by the steps themselves"

    (source / "model.safetensors").unlink()
    assert "was seeded from" not in train(dump_folder, *options, "--training.steps=3").ranks[0].output, (
        "gone: no matter"
    )
    other = tmp_path / "other"
    shutil.copytree(dump_folder / "hf" / "step-2", other)
    changed = train(dump_folder, *options[:-1], f"--checkpoint.initial_load_path={other}", "--training.steps=4")
    warning = next(line for line in changed.ranks[0].output.splitlines() if "This run was seeded from" in line)
    assert str(source) in warning and identity["source_digest"][:12] in warning and str(other) in warning
    assert "another job.dump_folder" in warning and "WARNING" in warning
    assert manifest(4)["seed"] == identity


def test_a_difference_that_was_allowed_is_recorded(tmp_path: Path, dump_folder: Path) -> None:
    source = shutil.copytree(TINY_OLMO, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 2e4}
    (source / "config.json").write_text(json.dumps(config))
    options = ["--seed.dry_run", "--seed.verify=parity", f"--checkpoint.initial_load_path={source}"]
    refused = train(dump_folder, *options, check=False)
    assert (
        refused.exit_codes == [1]
        and 'allow_config_difference = ["rope_parameters.rope_theta"]' in refused.ranks[0].output
    )
    train(dump_folder, *options, "--seed.allow_config_difference=rope_parameters.rope_theta")
    report = json.loads((dump_folder / "seed_report.json").read_text())
    assert report["config_differences"] == ["rope_parameters.rope_theta: 20000.0 in the source, 10000.0 in the model"]
    assert report["verification"]["max_abs_diff"] == 0.0, "against the model's configuration"
