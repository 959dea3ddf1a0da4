"""Models that are not transformers' own: registered by a user's import, or brought by their folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flame_ext.tools.conversion import Conversion, convert
from tests import tiny_models
from tests.ranks import REPOSITORY, TrainRun, run_ranks, train

SHAPE = {**tiny_models._SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": False}


def save_own(folder: str) -> None:
    """In a process of its own: registering is for good."""
    from tests.own_architecture import OwnConfig, OwnForCausalLM

    torch.manual_seed(0)
    model = OwnForCausalLM(OwnConfig(**SHAPE))
    model.logit_scale.fill_(0.75)
    model.tokens_seen.fill_(2**53 + 1)
    model.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (rank,) = run_ranks(save_own, 1, str(tmp_path / "own"), folder=tmp_path / "save")
    assert rank.exit_code == 0, rank.output
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "own" / name).write_bytes((tiny_models.TINY_OLMO / name).read_bytes())
    return tmp_path / "own"


def run(folder: Path, dump_folder: Path, *options: str, world_size: int = 2) -> TrainRun:
    arguments = [f"--model.hf_assets_path={folder}", f"--checkpoint.initial_load_path={folder}", "--training.steps=1"]
    arguments += ["--training.local_batch_size=2", "--seed.verify=parity", *options]
    return train(dump_folder, *arguments, world_size=world_size, check=False)


def test_a_registered_architecture_with_saved_buffers(folder: Path, dump_folder: Path) -> None:
    done = run(folder, dump_folder, "--experimental.custom_import=tests.own_architecture")
    assert done.exit_codes == [0, 0], done.ranks[0].output[-3000:]
    report = json.loads((dump_folder / "seed_report.json").read_text())
    assert {"logit_scale", "tokens_seen"} <= set(report["keys"]["loaded"])
    assert report["verification"]["max_abs_diff"] == 0.0
    exported = load_file(dump_folder / "hf" / "step-1" / "model.safetensors")
    assert exported["logit_scale"].item() == 0.75
    assert exported["tokens_seen"].dtype == torch.int64 and exported["tokens_seen"].item() == 2**53 + 1


def test_an_unregistered_architecture_is_refused(folder: Path, dump_folder: Path) -> None:
    refused = run(folder, dump_folder)
    assert refused.exit_codes == [2, 2]
    assert all("flame_ext_test_own" in rank.output and "no usable config.json" in rank.output for rank in refused.ranks)


def bring_code(folder: Path) -> None:
    """The architecture in a file of the folder, which notes that it ran."""
    code = (REPOSITORY / "tests" / "own_architecture.py").read_text().partition("AutoConfig.register")[0]
    (folder / "modeling_own.py").write_text(f"{code}open({str(folder.parent / 'ran')!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_dcp_checkpoint_finds_the_code_where_it_stays(folder: Path, tmp_path: Path) -> None:
    bring_code(folder)
    trusted = Conversion(trust_remote_code=True)
    convert(str(folder), tmp_path / "dcp", "dcp", trusted)
    assert not list((tmp_path / "dcp").rglob("*.py"))
    convert(str(tmp_path / "dcp"), tmp_path / "back", "hf", trusted)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_code_in_the_folder_runs_only_where_it_is_trusted(folder: Path, dump_folder: Path) -> None:
    bring_code(folder)
    refused = run(folder, dump_folder, world_size=1)
    assert refused.exit_codes == [2] and "trust_remote_code" in refused.ranks[0].output
    assert not (folder.parent / "ran").exists()
    trusted = run(folder, dump_folder, "--seed.trust_remote_code", world_size=1)
    assert trusted.exit_codes == [0], trusted.ranks[0].output[-3000:]
    assert (folder.parent / "ran").exists()
    export = dump_folder / "hf" / "step-1"
    assert (export / "config.json").is_file() and not list(export.rglob("*.py")), "code is not carried on"
