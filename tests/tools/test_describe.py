"""Descriptions from headers: groups, ties, newest step, and names under which two sources are compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flame_ext.checkpoint.steps import complete_step, describe_files, start, written_files
from flame_ext.errors import SeedError
from flame_ext.tools.describe import describe, differences, folder_of
from tests.sources import save_dcp
from tests.tiny_models import save_tiny

WEIGHT = torch.ones(3)


def save_step(folder: Path, number: int) -> Path:
    final = folder / f"step-{number}"
    save_dcp({"norm.weight": WEIGHT}, start(final))
    files = describe_files(final.with_name(f".incomplete-{final.name}"), written_files(final))
    complete_step(final, number, {"world_size": 2, "run": "a-run"}, files)
    return final


def test_the_newest_step_of_a_dump_folder_whatever_its_steps_lie_in(tmp_path: Path) -> None:
    for number in (2, 4):
        save_step(tmp_path / "ckpt", number)
    (tmp_path / "hf" / "step-4").mkdir(parents=True)
    assert describe(str(tmp_path)).step == 4 and describe(str(tmp_path / "ckpt")).step == 4


def test_groups_of_a_training_step(tmp_path: Path) -> None:
    state = {
        "model": {"model.norm.weight": WEIGHT, "future_predictor.norm.weight": WEIGHT},
        "optimizer": {"state": {"model.norm.weight.exp_avg": WEIGHT}, "lr": 0.1, "betas": (0.9, 0.95)},
        "train_state": {"step": torch.tensor(3)},
        "note": "text",
    }
    found = describe(str(save_dcp(state, tmp_path / "step-3")))
    assert found.groups == {
        "backbone": ["model.model.norm.weight"],
        "heads": ["model.future_predictor.norm.weight"],
        "optimizer": ["optimizer.state.model.norm.weight.exp_avg"],
        "rest": ["train_state.step"],
    }
    assert list(found.groups) == ["backbone", "heads", "optimizer", "rest"]
    assert set(found.source.model_part().entries) == {"model.norm.weight", "future_predictor.norm.weight"}
    assert any("not tensors: note, optimizer.* (" in fact for fact in found.facts)
    assert any("no manifest.json: not a step of this trainer" in fact for fact in found.facts)
    assert found.step is None and found.tied is None and found.model_type is None and not found.problems


@pytest.mark.parametrize(
    ("model", "fields", "output", "tied", "problem", "fact"),
    [
        ("olmo-tied", {}, False, True, False, False),
        ("olmo-tied", {}, True, True, False, True),
        ("olmo-untied", {}, True, False, False, False),
        ("olmo-untied", {}, False, False, True, False),
        ("olmo-tied", {"tie_word_embeddings": None}, False, False, True, False),  # OLMo's default
        ("olmo-tied", {"tie_word_embeddings": None, "model_type": "gpt2"}, False, True, False, False),  # GPT-2's
        ("olmo-tied", {"tie_word_embeddings": None, "model_type": "unknown"}, False, True, False, False),
        ("olmo-tied", {"tie_word_embeddings": False, "model_type": "unknown"}, True, False, False, False),
    ],
)
def test_ties_are_those_of_the_configuration(
    tmp_path: Path, model: str, fields: dict, output: bool, tied: bool, problem: bool, fact: bool
) -> None:
    folder = save_tiny(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    if output:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    found = describe(str(folder))
    assert found.tied is tied and found.model_type == config["model_type"]
    assert any("no output embedding" in line for line in found.problems) == problem == bool(found.problems)
    assert any("lm_head.weight is there though" in line for line in found.facts) == fact


@pytest.mark.parametrize("inside", ["", "checkpoint"])
def test_the_newest_complete_step_counts_by_number(tmp_path: Path, inside: str) -> None:
    for number in (9, 10, 2):
        save_step(tmp_path / inside, number)
    found = describe(str(tmp_path))
    assert found.source.path == tmp_path / inside / "step-10" and found.step == 10 and not found.problems
    assert f"steps in {tmp_path / inside}: 2, 9, 10; this is the newest" in found.facts
    assert "a complete step 10 of 2 ranks, run a-run" in found.facts
    (tmp_path / inside / "step-10" / "manifest.json").unlink()
    found = describe(str(tmp_path))
    assert found.step == 9 and found.source.path.name == "step-9"
    assert len(found.problems) == 1 and "step-10: no manifest.json" in found.problems[0]


def test_a_run_without_a_complete_step_is_no_source(tmp_path: Path) -> None:
    (save_step(tmp_path / "checkpoint", 1) / "manifest.json").write_text("{")
    with pytest.raises(SeedError, match="no complete step: step-1: unreadable"):
        describe(str(tmp_path))
    found = describe(str(tmp_path / "checkpoint" / "step-1"))
    assert found.step is None and found.problems[0].startswith("not a complete step: unreadable")


def test_names_are_the_model_s_where_one_side_has_a_configuration(tmp_path: Path) -> None:
    folder = save_tiny("gpt-neox-renamed-keys", tmp_path / "model")
    in_files = load_file(folder / "model.safetensors")
    in_model = {key.replace("embed_out", "lm_head"): tensor for key, tensor in in_files.items()}
    assert in_model.keys() != in_files.keys()
    in_model["lm_head.weight"] = in_model["lm_head.weight"][:5].clone()
    del in_model["gpt_neox.final_layer_norm.bias"]
    (tmp_path / "files").mkdir()
    save_file(in_files, tmp_path / "files" / "model.safetensors")
    (tmp_path / "files" / "config.json").write_text("{}")
    one, other = describe(str(folder)), describe(str(save_dcp(dict(in_model), tmp_path / "dcp")))
    found, a, b, common = differences(one, other)
    assert [(d.name, d.kind) for d in found] == [
        ("gpt_neox.final_layer_norm.bias", "missing"),
        ("lm_head.weight", "shape"),
    ]
    assert common == sorted(in_model.keys() - {"lm_head.weight"}) and set(b.entries) == set(in_model)
    assert a.entries["lm_head.weight"].key == "embed_out.weight"
    unknown, _, _, common = differences(describe(str(tmp_path / "files")), other)
    assert {("embed_out.weight", "missing"), ("lm_head.weight", "unexpected")} < {(d.name, d.kind) for d in unknown}
    assert "lm_head.weight" not in common, "without a known model, names of files are compared"


def test_a_path_has_to_be_a_folder(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    assert folder_of(str(folder)) == folder
    with pytest.raises(SeedError, match=f"is a file; name its folder, {folder}"):
        folder_of(str(folder / "manifest.json"))
    shutil.rmtree(folder)
    with pytest.raises(SeedError, match="step-1: does not exist"):
        folder_of(str(folder))
