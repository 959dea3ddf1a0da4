"""``flame-ext inspect``: every layout, every kind of difference, and whether a job could be seeded."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flame_ext.heads.future_predictor import FuturePredictor
from flame_ext.seeding.sources.source import Source, read_tensor
from flame_ext.tools import describe
from flame_ext.tools.main import main
from tests.benchmarks.seeding import OLMO_1B
from tests.ranks import DEBUG_TOML, REPOSITORY, TINY_OLMO
from tests.sources import save_all_sources, save_dcp
from tests.tiny_models import save_tiny


def inspect(capsys: pytest.CaptureFixture, *arguments: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "hub"))
        made = save_all_sources(folder)
    made.pop("hub")
    return made


def test_every_key_of_a_folder(capsys: pytest.CaptureFixture) -> None:
    facts = inspect(capsys, TINY_OLMO)
    assert facts["layout"] == "hf-safetensors" and len(facts["keys"]) == 29
    assert facts["keys"]["model.embed_tokens.weight"] == {
        "shape": [264, 128], "dtype": "bfloat16", "bytes": 264 * 128 * 2, "file": "model.safetensors",
    }  # fmt: skip
    assert facts["bytes"] == sum(key["bytes"] for key in facts["keys"].values()) == 2 * facts["parameters"]
    assert facts["model_type"] == "olmo" and facts["tie_word_embeddings"] and "tokenizer.json" in facts["tokenizer"]
    assert main(["inspect", str(TINY_OLMO)]) == 0
    table = capsys.readouterr().out
    assert all(key in table for key in facts["keys"]) and "264x128" in table


def test_every_layout_is_recognised_and_the_same_model(sources: dict, capsys: pytest.CaptureFixture) -> None:
    layouts = {"hf-bin": "hf-bin", "dcp-flat": "dcp-flat", "dcp-nested": "dcp-nested", "step-nested": "dcp-nested"}
    for name, (path, held) in sources.items():
        facts = inspect(capsys, path, "--allow-pickle")
        if name == "export":
            assert not any("not a step" in fact for fact in facts["facts"]), "though it is called step-N as well"
        groups = facts["groups"]
        heads = sum(key.startswith("future_predictor.") for key in held)
        assert groups["backbone"]["tensors"] == len(held) - heads, name
        assert groups.get("heads", {"tensors": 0})["tensors"] == heads, name
        assert ("optimizer" in groups) == name.startswith("step")
        assert facts["layout"] == layouts.get(name, facts["layout"]) and not facts["problems"]
    reference = sources["hf-single"][0]
    for name in ("hf-sharded", "hf-bin", "dcp-flat", "dcp-nested"):
        same = inspect(capsys, reference, "--against", sources[name][0], "--values", "--allow-pickle")["against"]
        assert same["differences"] == [] and same["same"] == len(sources[name][1]), name
    heads = inspect(capsys, reference, "--against", sources["dcp-nested-heads"][0], code=1)["against"]["differences"]
    assert {d["name"].split(".")[0] for d in heads} == {"future_predictor"} and {d["kind"] for d in heads} == {
        "unexpected"
    }
    trained = inspect(capsys, sources["export"][0], "--against", sources["step"][0], "--values")["against"]
    assert trained["differences"] == [] and trained["same"] == len(sources["step"][1])


def test_headers_alone_are_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A checkpoint of 1.2 billion parameters, as a file without blocks on the disk."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OLMO_1B, dtype=torch.float32)
    header, begin = {}, 0
    for name, parameter in model.named_parameters():
        header[name] = {
            "dtype": "F32",
            "shape": list(parameter.shape),
            "data_offsets": [begin, begin + parameter.nbytes],
        }
        begin += parameter.nbytes
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + begin)
    model.config.save_pretrained(tmp_path)
    started = time.perf_counter()
    facts = inspect(capsys, tmp_path)
    assert time.perf_counter() - started < 2
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters()) > 1.1e9


def test_a_dump_folder_is_its_newest_complete_step(
    sources: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    step = Path(sources["step"][0])
    dump_folder = shutil.copytree(step.parents[1], tmp_path / "run")
    manifest = shutil.copytree(step, dump_folder / "checkpoint" / "step-2") / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": 2}))
    facts = inspect(capsys, dump_folder)
    assert facts["path"].endswith("step-2") and facts["step"] == 2 and not facts["problems"]
    manifest.write_text(manifest.read_text()[:50])
    facts = inspect(capsys, dump_folder, code=1)
    assert facts["path"].endswith("step-1") and "step-2: unreadable manifest.json" in facts["problems"][0]
    assert main(["inspect", str(dump_folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    damaged = inspect(capsys, manifest.parent, code=1)
    assert damaged["step"] is None and damaged["problems"][0].startswith(
        "not a complete step: unreadable manifest.json"
    )
    seedable = inspect(capsys, dump_folder, f"--job.config_file={DEBUG_TOML}", code=1)["why_not_seedable"]
    assert "step-1" in seedable and "[264, 128]" in seedable, "it is the step that is asked about"
    assert "step-1: dcp-flat" in lines[0] and lines[1].startswith("problem: passed over"), "problems come first"
    (objects,) = [line for line in lines if line.startswith("not tensors: ")]
    assert "lr_scheduler.* (" in objects and "optimizer.param_groups" not in objects, "counted, not one by one"
    assert "lr_scheduler.last_epoch" in damaged["objects"], "which is what --json is for"
    shutil.rmtree(dump_folder / "checkpoint" / "step-1")
    assert main(["inspect", str(dump_folder)]) == 2
    assert "no complete step: step-2: unreadable manifest.json" in capsys.readouterr().err


def test_each_kind_of_difference(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(describe, "_CHUNK", 100)  # a tensor is compared in many parts
    original = save_tiny("olmo-untied", tmp_path / "original")
    tensors = load_file(original / "model.safetensors")
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    changed["lm_head.weight"] = changed["lm_head.weight"][:200].clone()
    changed["model.embed_tokens.weight"] = changed["model.embed_tokens.weight"].bfloat16()
    changed[q][3, 5] += 0.5
    changed[q][7, 1] -= 0.25
    changed[k][0, 0] = torch.nan
    del changed["model.layers.1.self_attn.q_proj.weight"]
    changed["model.extra.weight"] = torch.ones(2)
    other = save_dcp({"model": changed}, tmp_path / "other")
    facts = inspect(capsys, original, "--against", other, "--values", code=1)
    found = {d["name"]: d for d in facts["against"]["differences"]}
    kinds = [(d["name"], d["kind"]) for d in facts["against"]["differences"]]
    assert sorted(kinds) == sorted([
        ("lm_head.weight", "shape"), ("model.embed_tokens.weight", "dtype"), ("model.embed_tokens.weight", "values"),
        ("model.extra.weight", "unexpected"), (q, "values"), (k, "values"),
        ("model.layers.1.self_attn.q_proj.weight", "missing"),
    ])  # fmt: skip
    assert math.isnan(found[k]["max_abs"]), "a difference that is no number is not lost"
    difference = (tensors[q].double() - changed[q].double()).abs()
    assert found[q]["max_abs"] == difference.max().item()
    assert found[q]["mean_abs"] == pytest.approx(difference.mean().item(), rel=1e-12)
    headers = inspect(capsys, original, "--against", other, code=1)["against"]["differences"]
    assert {d["kind"] for d in headers} == {"shape", "dtype", "missing", "unexpected"}
    assert q not in {d["name"] for d in headers}, "values are not read unless they are asked for"
    assert main(["inspect", str(original), "--against", str(other), "--values"]) == 1
    assert "missing" in capsys.readouterr().out


def test_a_cast_that_loses_nothing_is_a_difference_of_dtypes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wide = save_dcp({"weight": torch.tensor([1.0, 0.5])}, tmp_path / "wide")
    narrow = save_dcp({"weight": torch.tensor([1.0, 0.5], dtype=torch.bfloat16)}, tmp_path / "narrow")
    against = inspect(capsys, wide, "--against", narrow, "--values", code=1)["against"]
    assert [d["kind"] for d in against["differences"]] == ["dtype"] and against["same"] == 0


def test_one_tensor_of_each_side_is_in_memory_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"weight{number}": torch.randn(64) for number in range(6)}
    one = save_dcp(tensors, tmp_path / "one")
    two = save_dcp(
        {name: tensor + number % 2 for number, (name, tensor) in enumerate(tensors.items())}, tmp_path / "two"
    )
    handed_out: list[weakref.ref[torch.Tensor]] = []

    def watched(source: Source, name: str) -> torch.Tensor:
        tensor = read_tensor(source, name)
        handed_out.append(weakref.ref(tensor))
        assert sum(reference() is not None for reference in handed_out) <= 2
        return tensor

    monkeypatch.setattr(describe, "read_tensor", watched)
    assert len(inspect(capsys, one, "--against", two, "--values", code=1)["against"]["differences"]) == 3
    assert len(handed_out) == 12


def test_names_and_ties_of_an_architecture_do_not_count_as_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    original = save_tiny("olmo-tied", tmp_path / "original")
    tensors = load_file(original / "model.safetensors")
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    flat = save_dcp(both, tmp_path / "flat")
    assert inspect(capsys, original, "--against", flat, "--values")["against"]["differences"] == []
    assert not inspect(capsys, flat)["tie_word_embeddings"]
    save_file(both, original / "model.safetensors")
    assert any("lm_head.weight is there though" in fact for fact in inspect(capsys, original)["facts"])
    untied = json.loads((original / "config.json").read_text()) | {"tie_word_embeddings": False}
    (original / "config.json").write_text(json.dumps(untied))
    assert not inspect(capsys, original)["problems"]
    save_file(tensors, original / "model.safetensors")
    assert "there is no output embedding" in inspect(capsys, original, code=1)["problems"][0]
    del untied["tie_word_embeddings"]
    (original / "config.json").write_text(json.dumps(untied))
    assert inspect(capsys, original, code=1)["tie_word_embeddings"] is False, "OLMo's default"
    (original / "config.json").write_text(json.dumps({**untied, "model_type": "gpt2"}))
    assert inspect(capsys, original)["tie_word_embeddings"] is True, "GPT-2's default"


def test_whether_a_job_could_be_seeded(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(DEBUG_TOML.parent.parent)
    config = f"--job.config_file={DEBUG_TOML}"
    assert inspect(capsys, TINY_OLMO, config)["seedable"]
    other = save_tiny("olmo-tied", tmp_path / "other")
    facts = inspect(capsys, other, config, code=1)
    assert not facts["seedable"] and "describes another function" in facts["why_not_seedable"]
    tensors = load_file(TINY_OLMO / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    folder = tmp_path / "less"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((TINY_OLMO / "config.json").read_bytes())
    facts = inspect(capsys, folder, config, code=1)
    assert "'model.layers.0.mlp.up_proj.weight' [512, 128] is missing from the source" in facts["why_not_seedable"]
    assert main(["inspect", str(folder), config]) == 1
    assert "cannot seed this job" in capsys.readouterr().out


def test_whether_heads_could_be_seeded(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.chdir(DEBUG_TOML.parent.parent)
    config = f"--job.config_file={DEBUG_TOML}"
    export = shutil.copytree(TINY_OLMO, tmp_path / "export")
    (export / "future_heads").mkdir()
    head = FuturePredictor(hidden_size=128, head_type="mlp", dropout=0.0)
    heads = {f"future_predictor.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(heads, export / "future_heads" / "model.safetensors")
    assert inspect(capsys, export, config)["seedable"]
    heads["future_predictor.proj.0.weight"] = torch.zeros(7, 128)
    save_file(heads, export / "future_heads" / "model.safetensors")
    reason = inspect(capsys, export, config, code=1)["why_not_seedable"]
    assert "'future_predictor.proj.0.weight'" in reason and "[7, 128]" in reason and "[256, 128]" in reason
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((TINY_OLMO / "config.json").read_bytes())
    torch.save(load_file(TINY_OLMO / "model.safetensors"), pickled / "pytorch_model.bin")
    reason = inspect(capsys, pickled, "--allow-pickle", config, code=1)["why_not_seedable"]
    assert "seed.allow_pickle" in reason, "the job's own setting is what counts"


def test_what_is_not_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save_tiny("olmo-tied", tmp_path / "model", max_shard_size="30KB")
    save_file({"model.norm.weight": torch.ones(1)}, folder / "stray.safetensors")
    assert any("passed over: stray.safetensors" in fact for fact in inspect(capsys, folder)["facts"])
    step = save_dcp({"model.norm.weight": torch.ones(1)}, tmp_path / "step-5")
    assert any("not a step of this trainer" in fact for fact in inspect(capsys, step)["facts"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: does not exist"),
        (["good/model.safetensors"], "is a file; name its folder, good"),
        (["empty"], "no weights"),
        (["damaged"], "truncated"),
        (["good", "--against", "nowhere"], "does not exist"),
        (["good", "--values"], "--against"),
        (["good", "--job.config_file=nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_can_not_be_read_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    save_tiny("olmo-tied", Path("good"))
    damaged = save_tiny("olmo-tied", Path("damaged")) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    capsys.readouterr()
    assert main(["inspect", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and not printed.out


def test_a_reader_that_leaves_early_is_no_difference() -> None:
    """``inspect … | head``: ended by the pipe, as ``cat`` is, and not with the exit code of a difference."""
    command = [sys.executable, "-m", "flame_ext.tools.main", "inspect", str(TINY_OLMO)]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    finally:
        os.close(writing)
    assert done.returncode == -signal.SIGPIPE and not done.stderr
