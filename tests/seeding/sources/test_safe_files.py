"""The one door to a source's files: what is a link out of the folder, or too large, is not read by anybody."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flame_ext.errors import SeedError, UserError
from flame_ext.seeding.sources.hf_safetensors import read_header
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.safe_files import MAX_KEYS, parse_json, require_contained
from flame_ext.seeding.sources.source import read_tensor
from flame_ext.tools.conversion import Conversion, convert
from flame_ext.tools.main import main
from flame_ext.train import parse
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML
from tests.sources import save_dcp
from tests.tiny_models import save_tiny

SECRET = "TOP-SECRET"
ASSETS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("olmo2", tmp_path / "model", torch.bfloat16)


def link(folder: Path, name: str) -> None:
    """The file ``name`` becomes a link to the same bytes, or a secret, outside."""
    file, target = folder / name, folder.with_name(f"outside-{name}")
    if file.exists():
        shutil.move(file, target)
    else:
        target.write_text(SECRET)
    file.symlink_to(target)


@pytest.mark.parametrize("name", [*ASSETS, "model.safetensors"])
def test_no_file_of_a_model_may_be_a_link_out_of_it(model: Path, tmp_path: Path, name: str) -> None:
    link(model, name)
    message = re.escape(f"{model / name}: is a link to ") + ".*outside the source; .*seed.follow_links = true"
    with pytest.raises(SeedError, match=message):
        open_source(model)
    with pytest.raises(SeedError, match=message):
        convert(str(model), tmp_path / "out", "hf", Conversion())
    if name != "model.safetensors":
        (model / "model.safetensors").rename(tmp_path / "model.safetensors")
        source = tmp_path / "weights"
        save_dcp(load_file(tmp_path / "model.safetensors"), source)
        with pytest.raises(SeedError, match=message):
            convert(str(source), tmp_path / "out", "hf", Conversion(assets=model))
    assert not (tmp_path / "out").exists()


def test_links_are_followed_where_they_are_trusted(model: Path, tmp_path: Path) -> None:
    """A model put together of links into a store: the same weights, and an export of files."""
    expected = load_file(model / "model.safetensors")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        link(model, name)
    source = open_source(model, follow_links=True)
    assert all(torch.equal(read_tensor(source, key), tensor) for key, tensor in expected.items())
    assert main(["convert", str(model), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert main(["convert", str(model), str(tmp_path / "out"), "--to", "hf", "--follow-links"]) == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert main(["inspect", str(model)]) == 2
    assert main(["inspect", str(model), "--follow-links"]) == 0


def test_a_checkpoint_of_links_is_read_where_they_are_trusted(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0)}
    folder = save_dcp(state, tmp_path / "dcp")
    for file in sorted(folder.iterdir()):
        link(folder, file.name)
    with pytest.raises(SeedError, match="seed.follow_links"):
        open_source(folder)
    source = open_source(folder, follow_links=True)
    assert torch.equal(read_tensor(source, "a"), state["a"])
    assert torch.equal(source.independent_state([source.entries["a"]])["a"], state["a"])


def test_the_model_of_a_run_is_behind_the_same_door(model: Path) -> None:
    link(model, "chat_template.jinja")
    option = f"--model.hf_assets_path={model}"
    assert "chat_template.jinja: is a link to" in refusal(option)
    assert parse([f"--job.config_file={DEBUG_TOML}", option, "--seed.follow_links"]).seed.follow_links


def test_a_pipe_is_no_file(model: Path) -> None:
    """It would never end."""
    os.mkfifo(model / "vocab.json")
    with pytest.raises(SeedError, match=r"vocab.json: is not a file"):
        open_source(model)


def test_links_within_the_folder_are_fine(model: Path) -> None:
    (model / "kept").mkdir()
    (model / "config.json").rename(model / "kept" / "config.json")
    (model / "config.json").symlink_to("kept/config.json")
    require_contained(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1e+09; expected at most 1024"),
        ({"n_layer": 5000}, "n_layer is 5e+03"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1e+09"),
        ({"num_labels": 10**9}, "num_labels is 1e+09; expected at most 65536"),
        ({"head_dim": 10**12}, "head_dim is 1e+12"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings is 1e+12"),
        ({"anything": 10**40}, "anything is 1e+40"),
        ({"junk": [0] * 140_000}, "more than 131072 values"),
        ({"junk": "x" * 2**22}, "bytes is no "),
        ({"x" * 100_000: {f"k{i}": 2**65 for i in range(50_000)}}, "k0 is 3.69e+19; expected at most"),
    ],
)
def test_a_configuration_is_of_a_model(model: Path, fields: dict[str, Any], message: str) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    begin = time.process_time()
    with pytest.raises(SeedError, match=re.escape(message)):
        open_source(model)
    assert time.process_time() - begin < 5


def test_numbers_that_are_no_sizes_may_be_large(model: Path) -> None:
    config = model / "config.json"
    fields = {"model_max_length": 10**30, "seed": 2**64 - 1, "label2id": {"player": 5000}, "label_layers": 3}
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    open_source(model)


@pytest.mark.parametrize("field", ["vocab", "merges"])
def test_a_tokenizer_may_not_name_files_elsewhere(model: Path, tmp_path: Path, field: str) -> None:
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: str(tmp_path / "secret")}))
    with pytest.raises(SeedError, match=f"tokenizer_config.json: {field} names a file, '.*'; remove the field"):
        require_contained(model)
    assert f"tokenizer_config.json: {field} names a file" in refusal(f"--model.hf_assets_path={model}")


def test_files_that_nothing_reads_are_let_be(model: Path) -> None:
    (model / "latest.json").symlink_to("gone.json")
    (model / "config.train.json").write_text("[1]")
    require_contained(model)


def test_a_folder_within_the_hubs_cache_is_of_the_cache(model: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--org--name"
    (cached / "blobs").mkdir(parents=True)
    folder = cached / "snapshots" / "0123" / "checkpoint-1000"
    folder.parent.mkdir(parents=True)
    model.rename(folder)
    (folder / "config.json").rename(cached / "blobs" / "abc")
    (folder / "config.json").symlink_to("../../../blobs/abc")
    open_source(folder)
    (folder / "tokenizer.json").rename(tmp_path / "outside")
    (folder / "tokenizer.json").symlink_to(tmp_path / "outside")
    with pytest.raises(SeedError, match="outside the source"):
        open_source(folder)


def test_layers_are_those_of_the_tensors(model: Path, tmp_path: Path) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1000, "layer_types": None}))
    with pytest.raises(UserError, match="num_hidden_layers is 1000, and the source holds"):
        convert(str(model), tmp_path / "out", "hf", Conversion())


def header(file: Path, text: str, data: bytes = b"") -> Path:
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{" + "".join(f'"k{i}":1,' for i in range(200_000)) + '"k199999":1}', "'k199999' stands twice in its header"),
        ('{"a":{"dtype":"F32","shape":[' + ",".join(["4294967296"] * 500_000) + '],"data_offsets":[0,4]}}', "500000 dimensions"),
        (
            "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(2**18 + 1)) + "}",
            f"{2**18 + 1} keys in its header; expected at most {MAX_KEYS}",
        ),
        ('{"a":' + "[" * 10**6, "is not valid JSON"),
    ],
    ids=["repeated", "dimensions", "keys", "nested"],
)  # fmt: skip
def test_a_header_takes_linear_time(tmp_path: Path, text: str, message: str) -> None:
    file, begin = header(tmp_path / "x.safetensors", text), time.process_time()
    with pytest.raises(SeedError, match=re.escape(message)):
        read_header(file)
    assert time.process_time() - begin < 5


def test_the_limits_leave_room_for_large_models(tmp_path: Path) -> None:
    save_file({f"model.layers.{i}.weight": torch.zeros(1) for i in range(20_000)}, tmp_path / "x.safetensors")
    begin = time.process_time()
    assert len(read_header(tmp_path / "x.safetensors")[0]) == 20_000
    assert time.process_time() - begin < 5


def test_json_is_an_object_of_unique_keys() -> None:
    assert parse_json(b'{"a": {"b": 1}, "c": {"b": 2}}', Path("x"), "file") == {"a": {"b": 1}, "c": {"b": 2}}
    for raw in (b"[]", b"", b"\xff", b'{"a": 1' + b"1" * 5000 + b"}", b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}'):
        with pytest.raises(SeedError, match="x: "):
            parse_json(raw, Path("x"), "file")
