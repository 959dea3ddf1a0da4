"""A source that is not right ends every rank with the same clear message, an exit code, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks import TrainRun, train
from tests.sources import save_dcp
from tests.tiny_models import save_tiny


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the one file that ``folder`` has."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def missing_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_key(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def extra_key(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.7.extra": torch.ones(3)}))


def transposed(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.contiguous()

    rewrite(folder, change)


def padded_vocabulary(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": torch.cat([t["lm_head.weight"], torch.zeros(8, 32)])}))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def appended(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"\0" * 16)


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def endless_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:])


def integer_dtype(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].int()}))


def one_nan(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.q_proj.weight"][31, 31] = float("nan")

    rewrite(folder, change)


def flipped_dtype(folder: Path) -> None:
    """BF16 becomes I16 in the header alone: the same size, other numbers."""
    rewrite(folder, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "I16"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def two_files(folder: Path) -> tuple[Path, dict[str, str]]:
    """Split the file of ``folder`` in two, with an index; returns the index's path and its map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file({k: t for k, t in tensors.items() if weight_map[k] == name}, folder / name, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index, weight_map


def missing_shard(folder: Path) -> None:
    two_files(folder)
    (folder / "part-1.safetensors").unlink()


def key_in_two_files(folder: Path) -> None:
    two_files(folder)
    tensors = load_file(folder / "part-1.safetensors")
    tensors["model.norm.weight"] = torch.ones(32)
    tensors["lm_head.weight"] = torch.ones(264, 32)
    save_file(tensors, folder / "part-1.safetensors")


def index_escapes(folder: Path) -> None:
    index, weight_map = two_files(folder)
    (folder / "part-1.safetensors").rename(folder.parent / "part-1.safetensors")
    moved = {k: f"../{name}" if name == "part-1.safetensors" else name for k, name in weight_map.items()}
    index.write_text(json.dumps({"weight_map": moved}))


def absolute_index(folder: Path) -> None:
    index, weight_map = two_files(folder)
    index.write_text(json.dumps({"weight_map": {k: str(folder / name) for k, name in weight_map.items()}}))


def link_out(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.rename(folder.parent / "elsewhere.safetensors")
    file.symlink_to("../elsewhere.safetensors")


def wrong_vocabulary(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[key] = tensors[key][:200].clone()

    rewrite(folder, change)


def as_dcp(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Replace the Hugging Face files of ``folder`` by a DCP checkpoint of what ``change`` makes of the tensors."""
    tensors = load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    save_dcp(change(tensors), folder)


def flat_and_nested(folder: Path) -> None:
    as_dcp(folder, lambda t: {**t, "model": {"model.norm.weight": t["model.norm.weight"]}})


def half_flat_half_nested(folder: Path) -> None:
    as_dcp(folder, lambda t: {"lm_head.weight": t.pop("lm_head.weight"), "model": t})


def dcp_missing_key(folder: Path) -> None:
    as_dcp(folder, lambda t: {"model": {k: v for k, v in t.items() if k != "model.layers.1.mlp.up_proj.weight"}})


def dcp_unfinished(folder: Path) -> None:
    as_dcp(folder, lambda t: t)
    (folder / ".metadata").unlink()


def dcp_truncated(folder: Path) -> None:
    as_dcp(folder, lambda t: t)
    file = folder / "__0_3.distcp"
    file.write_bytes(file.read_bytes()[:-1])


def dcp_one_nan(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        tensors["model.layers.2.self_attn.q_proj.weight"][31, 31] = float("nan")
        return {"model": tensors}

    as_dcp(folder, change)


def dcp_runs_code(folder: Path) -> None:
    as_dcp(folder, lambda t: t)
    (folder / ".metadata").write_bytes(pickle.dumps(TouchesFile(folder.parent / "was-here")))


def pickled_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": TouchesFile(folder.parent / "was-here")}, folder / "pytorch_model.bin")


class TouchesFile:
    """Unpickled, it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.file),))


def steps_of_a_run(folder: Path) -> None:
    as_dcp(folder, lambda t: t)
    folder.rename(folder.with_name("step-7"))
    folder.mkdir()
    folder.with_name("step-7").rename(folder / "step-7")


FAULTS: list[tuple[Callable[[Path], None], list[str]]] = [
    (missing_folder, ["initial_load_path", "does not exist"]),
    (missing_config, ["no config.json", "not a Hugging Face model folder"]),
    (no_weights, ["holds only .bin files", "safetensors", "seed.allow_pickle = true"]),
    (missing_key, ["'model.layers.1.mlp.up_proj.weight' [48, 32] is missing", "seed.new_parameters"]),
    (extra_key, ["'model.layers.7.extra' [3] in model.safetensors is not in the model", "seed.ignore_source_keys"]),
    (transposed, ["'model.layers.0.mlp.up_proj.weight'", "[32, 48]", "[48, 32]", "transposed"]),
    (padded_vocabulary, ["'lm_head.weight'", "a vocabulary of 272 in the source, of 264", "vocab_size = 272"]),
    (wrong_vocabulary, ["'model.embed_tokens.weight'", "a vocabulary of 200 in the source", "resize_token_embeddings"]),
    (truncated, ["model.safetensors", "truncated or damaged"]),
    (appended, ["model.safetensors", "truncated or damaged"]),
    (empty_file, ["model.safetensors: has 0 bytes", "header too small", "truncated or damaged"]),
    (endless_header, ["model.safetensors: has", "header too large", "truncated or damaged"]),
    (integer_dtype, ["'model.norm.weight' in model.safetensors has dtype int32", "dequantise"]),
    (flipped_dtype, ["'model.norm.weight' in model.safetensors has dtype int16", "dequantise"]),
    (one_nan, ["'model.layers.2.self_attn.q_proj.weight' holds NaN or infinity", "model.safetensors"]),
    (missing_shard, ["part-1.safetensors: listed in model.safetensors.index.json but absent"]),
    (key_in_two_files, ["stands in both part-0.safetensors and part-1.safetensors", "keep one"]),
    (index_escapes, ["model.safetensors.index.json", "points to '../part-1.safetensors'"]),
    (absolute_index, ["model.safetensors.index.json", "only plain file names in the same folder are read"]),
    (link_out, ["model.safetensors: is a link to", "elsewhere.safetensors, outside the source"]),
    (flat_and_nested, ["both flat (", "and nested under 'model' ('model.model.norm.weight')"]),
    (half_flat_half_nested, ["both flat ('lm_head.weight') and nested under 'model' ('model.model."]),
    (dcp_missing_key, ["'model.layers.1.mlp.up_proj.weight' [48, 32] is missing"]),
    (dcp_unfinished, ["DCP files without .metadata", "the save did not finish"]),
    (dcp_truncated, ["__0_3.distcp: has", "truncated or damaged"]),
    (dcp_one_nan, ["'model.model.layers.2.self_attn.q_proj.weight' holds NaN or infinity", ".distcp"]),
    (dcp_runs_code, [".metadata: asks for posix.mkdir", "made to run code"]),
    (pickled_code, ["pytorch_model.bin: cannot be read as tensors alone"]),
    (steps_of_a_run, ["holds checkpoints (step-7); name one of them"]),
]


def run_with_source(source: Path, assets: Path, dump_folder: Path, *options: str) -> TrainRun:
    arguments = [f"--model.hf_assets_path={assets}", f"--checkpoint.initial_load_path={source}", "--training.steps=1"]
    return train(dump_folder, *arguments, "--training.local_batch_size=2", *options, world_size=2, check=False)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's configuration and tokenizer, intact, beside the sources that are damaged."""
    return save_tiny("olmo2", tmp_path_factory.mktemp("assets") / "olmo2")


@pytest.mark.parametrize(("damage", "expected"), FAULTS, ids=[damage.__name__ for damage, _ in FAULTS])
def test_a_damaged_source_is_refused_on_every_rank(
    tmp_path: Path, dump_folder: Path, assets: Path, damage: Callable[[Path], None], expected: list[str]
) -> None:
    source = save_tiny("olmo2", tmp_path / "source")
    damage(source)
    allow = ["--seed.allow_pickle"] if damage is pickled_code else []
    begin = time.monotonic()
    run = run_with_source(source, assets, dump_folder, *allow)
    assert run.exit_codes == [1, 1] and time.monotonic() - begin < 60, "no rank waits for another that has failed"
    assert not (tmp_path / "was-here").exists(), "nothing in a source runs"
    for rank in run.ranks:
        messages = [line for line in rank.output.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1 and "Traceback" not in rank.output, rank.output[-3000:]
        message = rank.output[rank.output.index("error: ") :]
        for part in [*expected, str(source)]:
            assert part in message
    written = [p for p in dump_folder.rglob("*") if p.is_file()]
    assert written == [], "nothing but (empty) log folders"


def test_a_truncated_shard_is_named(tmp_path: Path, dump_folder: Path, assets: Path) -> None:
    source = save_tiny("olmo2", tmp_path / "source", max_shard_size="50KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    run = run_with_source(source, assets, dump_folder)
    assert run.exit_codes == [1, 1]
    assert all(f"error: {shards[1]}: has" in rank.output for rank in run.ranks)


def test_an_error_on_one_rank_reaches_all(tmp_path: Path, dump_folder: Path, assets: Path) -> None:
    """A NaN in the last row lies in the second rank's shard only; the first has to say so, too."""
    source = save_tiny("olmo2", tmp_path / "source")
    one_nan(source)
    run = run_with_source(source, assets, dump_folder)
    assert run.exit_codes == [1, 1]
    assert all("error: [rank 1] " in rank.output for rank in run.ranks)


def test_a_tied_model_with_another_lm_head_is_refused(tmp_path: Path, dump_folder: Path) -> None:
    source = save_tiny("olmo-tied", tmp_path / "source")
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    run = run_with_source(source, source, dump_folder)
    assert run.exit_codes == [1, 1]
    assert all("'lm_head.weight'" in r.output and "tie_word_embeddings" in r.output for r in run.ranks)


def test_a_tied_model_with_the_same_lm_head_is_seeded(tmp_path: Path, dump_folder: Path) -> None:
    source = save_tiny("olmo-tied", tmp_path / "source")
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert run_with_source(source, source, dump_folder, "--seed.dry_run").exit_codes == [0, 0]
    report = json.loads((dump_folder / "seed_report.json").read_text())
    assert report["keys"]["tied"] == ["lm_head.weight"]


def test_a_source_of_another_function_is_refused(tmp_path: Path, dump_folder: Path, assets: Path) -> None:
    """The weights fit; only config.json tells that the model is another one."""
    source = save_tiny("olmo2", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10.0
    config["rms_norm_eps"] = 1e-3
    config["transformers_version"] = "5.0.0"
    (source / "config.json").write_text(json.dumps(config))
    run = run_with_source(source, assets, dump_folder)
    assert run.exit_codes == [1, 1]
    for rank in run.ranks:
        message = rank.output[rank.output.index("error: ") :]
        assert "rms_norm_eps: 0.001 in the source, 1e-05 in the model" in message
        assert "rope_parameters.rope_theta: 10.0 in the source, 10000.0 in the model" in message
        assert "transformers_version" not in message
    assert not (dump_folder / "seed_report.json").exists()


def test_an_undeclared_new_parameter_is_refused(dump_folder: Path, assets: Path) -> None:
    run = run_with_source(assets, assets, dump_folder, "--seed.new_parameters=future_encoder.*")
    assert run.exit_codes == [1, 1]
    assert all("'future_predictor.norm.weight' [32] is missing" in rank.output for rank in run.ranks)


def test_an_undeclared_backbone_parameter_has_no_initialisation(
    tmp_path: Path, dump_folder: Path, assets: Path
) -> None:
    source = save_tiny("olmo2", tmp_path / "source")
    missing_key(source)
    run = run_with_source(source, assets, dump_folder, "--seed.new_parameters=*")
    assert run.exit_codes == [1, 1]
    assert all("has no initialisation" in rank.output for rank in run.ranks)


def test_a_declared_extra_key_and_a_stray_file_are_passed_over(tmp_path: Path, dump_folder: Path, assets: Path) -> None:
    source = save_tiny("olmo2", tmp_path / "source", max_shard_size="50KB")
    save_file({"model.norm.weight": torch.full((32,), 7.0)}, source / "zz-stray.safetensors")
    run = run_with_source(source, assets, dump_folder, "--seed.dry_run")
    assert run.exit_codes == [0, 0]
    assert f"Passed over in {source}: zz-stray.safetensors (not in model.safetensors.index.json)" in run.ranks[0].output
    single = save_tiny("olmo2", tmp_path / "single")
    extra_key(single)
    options = ["--seed.dry_run", "--seed.ignore_source_keys=model.layers.7.*"]
    assert run_with_source(single, assets, dump_folder, *options).exit_codes == [0, 0]
    assert json.loads((dump_folder / "seed_report.json").read_text())["keys"]["ignored"] == ["model.layers.7.extra"]
