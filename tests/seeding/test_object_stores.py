"""Trainers that are seeded from an object store: the weights of the folder, bit for bit, and each byte of them read once by all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.object_store import ObjectStore
from tests.ranks import TINY_OLMO, run_ranks, train
from tests.seeding.test_every_source import seed_all
from tests.sources import random_heads, save_dcp
from tests.tiny_models import save_tiny


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_the_model_is_that_of_the_folder(world_size: int, tmp_path: Path, object_store: ObjectStore) -> None:
    sharded = save_tiny("olmo2", tmp_path / "sharded", torch.bfloat16, max_shard_size="30KB")
    held = {key: t for file in sharded.glob("*.safetensors") for key, t in load_file(file).items()} | random_heads()
    (sharded / "future_heads").mkdir()
    save_file(random_heads(), sharded / "future_heads" / "model.safetensors")
    dcp = save_dcp({"model": held}, tmp_path / "dcp")
    paths = {"sharded": object_store.put(sharded), "dcp": object_store.put(dcp), "local": str(sharded)}
    folder = tmp_path / "run"
    ranks = run_ranks(
        seed_all, world_size, str(sharded), paths, str(folder), [], folder=tmp_path / "ranks", timeout=240
    )
    assert all(rank.exit_code == 0 for rank in ranks), ranks[0].output[-3000:]
    for rank in ranks:
        for name in paths:
            assert rank.value[name].keys() == held.keys()
            assert all(torch.equal(tensor, held[key].float()) for key, tensor in rank.value[name].items()), name
    reports = {name: json.loads((folder / name / "seed_report.json").read_text()) for name in paths}
    assert reports["sharded"]["source"] == paths["sharded"] and reports["dcp"]["layout"] == "dcp-nested"
    assert reports["sharded"]["source_digest"] == reports["local"]["source_digest"]
    assert len({report["weights_digest"] for report in reports.values()}) == 1
    for report in reports.values():  # in mode "parity"
        assert report["verification"]["passed"] and report["verification"]["max_abs_diff"] == 0.0


@pytest.mark.matrix
def test_ranks_read_each_byte_of_the_weights_once_and_the_run_resumes(
    tmp_path: Path, dump_folder: Path, object_store: ObjectStore
) -> None:
    shutil.copytree(TINY_OLMO, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    options = [
        f"--checkpoint.initial_load_path={object_store.put(tmp_path / 'model')}",
        "--training.local_batch_size=2",
    ]
    options += ["--checkpoint.interval=1", "--checkpoint.allow_config_change=training.steps"]
    object_store.asked.clear()
    run = train(dump_folder, *options, "--training.steps=1", world_size=2)
    assert "is read by ranges; its small files are in" in run.ranks[0].output
    assert object_store.read("model.safetensors") == file.stat().st_size, "by both ranks together, headers included"
    ranges = [a.range for a in object_store.asked if a.path.endswith("model.safetensors") and a.method == "GET"]
    largest = max(
        (int(end) - int(begin) + 1 for begin, end in (r.removeprefix("bytes=").split("-") for r in ranges if r))
    )
    tensors = load_file(file).values()
    assert largest <= max(tensor.nbytes for tensor in tensors) // 2, "a rank asks for its half"
    before = len(object_store.asked)
    resumed = train(dump_folder, *options, "--training.steps=2", world_size=2)
    assert "Resuming from" in resumed.ranks[0].output and "This run was seeded from" not in resumed.ranks[0].output
    assert not [a for a in object_store.asked[before:] if a.path.endswith("model.safetensors") and a.method == "GET"]


def test_ranks_fail_together_in_one_line(tmp_path: Path, dump_folder: Path, object_store: ObjectStore) -> None:
    url = f"{object_store.url}/absent"
    run = train(dump_folder, f"--checkpoint.initial_load_path={url}", world_size=2, check=False)
    assert all(run.exit_codes)
    for rank in run.ranks:
        assert f"{url}: nothing is there" in rank.output and "Traceback" not in rank.output
