"""Steps that were made to run code or to read elsewhere, with manifests that fit them: nothing of it happens."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from flame_ext.checkpoint.steps import describe_files
from tests.ranks import TrainRun, train

FAST = (
    "--training.seq_len=32", "--training.local_batch_size=2", "--seed.verify=none", "--checkpoint.interval=1",
    "--checkpoint.no-last_save_in_hf", "--training.steps=2", "--lr_scheduler.total_steps=9",
)  # fmt: skip


class Canary:
    """Pickled, a call that leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    return train(tmp_path_factory.mktemp("saved") / "run", *FAST)


def code_in_metadata(step: Path, canary: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Canary(canary)))


def a_class_that_is_changed(step: Path, canary: Path) -> None:
    """BUILD on a class is setattr for the whole process: here, so that every file is said to lie in the folder."""
    raw = pickle.dumps(pickle.loads((step / ".metadata").read_bytes()), protocol=2)
    state = pickle.dumps((None, {"is_relative_to": str(canary)}), protocol=2)[2:-1]
    trick = b"cpathlib\nPosixPath\n" + state + pickle.BUILD + pickle.POP
    (step / ".metadata").write_bytes(raw[:2] + trick + raw[2:])


def code_in_an_entry(step: Path, canary: Path) -> None:
    metadata = pickle.loads((step / ".metadata").read_bytes())
    index = MetadataIndex("train_state.step")
    info = metadata.storage_data[index]
    stream = io.BytesIO()
    torch.save(Canary(canary), stream)
    file = step / info.relative_path
    place = replace(info, offset=file.stat().st_size, length=len(stream.getvalue()))
    file.write_bytes(file.read_bytes() + stream.getvalue())
    metadata.storage_data[index] = place
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def a_path_that_leads_elsewhere(step: Path, _canary: Path) -> None:
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, relative_path=f"../elsewhere/{info.relative_path}")
    shutil.copytree(step, step.parent / "elsewhere")
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def an_unlisted_link_that_leads_elsewhere(step: Path, _canary: Path) -> None:
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, relative_path=f"linked_{info.relative_path}")
    for shard in list(step.glob("*.distcp")):
        elsewhere = step.parent / f"elsewhere_{shard.name}"
        shutil.copy(shard, elsewhere)
        (step / f"linked_{shard.name}").symlink_to(elsewhere)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def a_link_that_leads_elsewhere(step: Path, _canary: Path) -> None:
    shard = next(step.glob("*.distcp"))
    shard.rename(step.parent / "elsewhere.distcp")
    shard.symlink_to(step.parent / "elsewhere.distcp")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (code_in_metadata, "a checkpoint has no use for it, so this one is damaged or made to run code"),
        (a_class_that_is_changed, ".metadata: is not DCP metadata (UnpicklingError: the state of a _Name is set)"),
        (code_in_an_entry, "'train_state.step' is not plain data and was not unpickled"),
        (a_path_that_leads_elsewhere, "only plain file names in the same folder are read"),
        (an_unlisted_link_that_leads_elsewhere, "outside the source; copy the file itself to its place"),
    ],
)
def test_nothing_of_a_step_is_run_or_read_from_elsewhere(
    saved: TrainRun, dump_folder: Path, tmp_path: Path, tamper: Callable[[Path, Path], None], message: str
) -> None:
    shutil.copytree(saved.dump_folder, dump_folder)
    step, canary = dump_folder / "checkpoint" / "step-1", tmp_path / "canary"
    tamper(step, canary)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"] = describe_files(step, manifest["files"])
    (step / "manifest.json").write_text(json.dumps(manifest))
    run = train(dump_folder, *FAST, "--checkpoint.load_step=1", check=False)
    assert run.exit_codes == [1] and not canary.exists()
    (error,) = [line for line in run.ranks[0].output.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "Traceback" not in run.ranks[0].output


def test_a_file_that_the_manifest_does_not_list_is_not_read(saved: TrainRun, dump_folder: Path) -> None:
    shutil.copytree(saved.dump_folder, dump_folder)
    manifest = dump_folder / "checkpoint" / "step-1" / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["files"]["__0_0.distcp"]
    manifest.write_text(json.dumps(values))
    run = train(dump_folder, *FAST, "--checkpoint.load_step=1", check=False)
    assert run.exit_codes == [1] and "Traceback" not in run.ranks[0].output
    assert "its manifest.json does not list __0_0.distcp" in run.ranks[0].output.splitlines()[-1]


def test_a_link_is_no_file_of_a_step(saved: TrainRun, dump_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(saved.dump_folder, dump_folder)
    a_link_that_leads_elsewhere(dump_folder / "checkpoint" / "step-2", tmp_path)
    run = train(dump_folder, *FAST)
    assert "step-2: __0_0.distcp is not a file" in run.ranks[0].output and "Resumed from" in run.ranks[0].output


def test_the_canary_sings(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()
