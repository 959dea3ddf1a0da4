"""What a folder's index and headers say, and every way in which they can be wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.hf_safetensors import INDEX_NAME, read_header
from flame_ext.seeding.sources.open import open_source

FILES = {
    "one.safetensors": {"a": torch.ones(2, 3), "b": torch.ones(4).half()},
    "two.safetensors": {"c": torch.ones(())},
}
WEIGHT_MAP = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    for name, tensors in FILES.items():
        save_file(tensors, tmp_path / name)
    write_index(tmp_path, WEIGHT_MAP)
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_entries_are_those_of_the_files(folder: Path) -> None:
    source = open_source(folder)
    assert source.layout == "hf-safetensors" and set(source.entries) == {"a", "b", "c"}
    assert source.entries["a"].shape == (2, 3) and source.entries["a"].nbytes == 24
    assert source.entries["b"].dtype is torch.float16 and source.entries["b"].nbytes == 8
    assert source.entries["c"].shape == () and source.entries["c"].place == "two.safetensors"


def test_the_index_is_authoritative(folder: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, folder / "zzz.safetensors")
    source = open_source(folder)
    assert source.passed_over == ("zzz.safetensors (not in model.safetensors.index.json)",)
    assert source.entries["a"].place == "one.safetensors"


def test_what_the_index_lists_and_no_file_holds_is_passed_over(folder: Path) -> None:
    write_index(folder, {**WEIGHT_MAP, "d": "two.safetensors"})
    source = open_source(folder)
    assert set(source.entries) == {"a", "b", "c"}
    assert source.passed_over == ("'d', which model.safetensors.index.json lists and no file holds",)


def test_a_single_file_comes_before_an_index(folder: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, folder / "model.safetensors")
    source = open_source(folder)
    assert set(source.entries) == {"a"} and source.entries["a"].place == "model.safetensors"
    assert "model.safetensors.index.json (model.safetensors comes first, as in from_pretrained)" in source.passed_over


def test_a_complete_set_of_numbered_files_needs_no_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    for i, name in enumerate(FILES, 1):
        (folder / name).rename(folder / f"model-0000{i}-of-00002.safetensors")
    source = open_source(folder)
    assert source.entries["c"].place == "model-00002-of-00002.safetensors"
    state = source.independent_state([source.entries["a"], source.entries["c"]])
    assert state is not None and {key: tensor.tolist() for key, tensor in state.items()} == {
        "a": [[1.0] * 3] * 2,
        "c": 1.0,
    }
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SeedError, match="no complete set .*absent: model-00002-of-00002.safetensors"):
        open_source(folder)


def test_an_adapter_is_not_passed_over(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SeedError, match="adapter_config.json.*merge it into its base"):
        open_source(folder)


def test_the_heads_of_an_export_are_part_of_it(folder: Path) -> None:
    before = open_source(folder).digest
    (folder / "future_heads").mkdir()
    save_file({"future_predictor.norm.weight": torch.ones(5)}, folder / "future_heads" / "model.safetensors")
    source = open_source(folder)
    (chunk,) = source.entries["future_predictor.norm.weight"].chunks
    assert chunk.file == folder / "future_heads" / "model.safetensors"
    assert source.digest != before and source.passed_over == ()
    save_file({"a": torch.ones(2, 3)}, folder / "future_heads" / "model.safetensors")
    with pytest.raises(SeedError, match="'a' stands in both one.safetensors and future_heads/model.safetensors"):
        open_source(folder)


def test_the_digest_is_of_the_headers(folder: Path) -> None:
    before = open_source(folder).digest
    assert open_source(folder).digest == before
    save_file({"c": torch.ones(1)}, folder / "two.safetensors")
    assert open_source(folder).digest != before


def escape(folder: Path) -> None:
    write_index(folder, {**WEIGHT_MAP, "c": "../two.safetensors"})


def absolute(folder: Path) -> None:
    write_index(folder, {**WEIGHT_MAP, "c": "/etc/passwd"})


def absent_shard(folder: Path) -> None:
    (folder / "two.safetensors").unlink()


def key_in_two_files(folder: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "c": torch.ones(())}, folder / "two.safetensors")


def key_not_in_the_index(folder: Path) -> None:
    write_index(folder, {key: file for key, file in WEIGHT_MAP.items() if key != "b"})


def empty_index(folder: Path) -> None:
    write_index(folder, {})


def broken_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("{")


def repeated_key(folder: Path) -> None:
    (folder / INDEX_NAME).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')


def a_file(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (escape, "'c' points to '../two.safetensors'; only plain file names"),
        (absolute, "'c' points to '/etc/passwd'; only plain file names"),
        (absent_shard, "two.safetensors: listed in model.safetensors.index.json but absent"),
        (key_in_two_files, "'a' stands in both one.safetensors and two.safetensors"),
        (key_not_in_the_index, "holds key 'b', which model.safetensors.index.json puts in None"),
        (empty_index, "no 'weight_map'"),
        (broken_index, "its index is not valid JSON"),
        (repeated_key, "key 'a' stands twice in its index"),
        (a_file, "is not a folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_folder_is_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(SeedError) as e:
        open_source(folder)
    assert message in str(e.value) and folder.name in str(e.value)


def entry(dtype: str, shape: list, offsets: list) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": entry("F32", [2], [0, 4])}, "in 'x': .*invalid shape, data type, or offset"),
        ({"x": entry("F4", [16], [0, 8])}, "'x' has dtype 'F4'"),
        ({"x": entry("Q4", [16], [0, 8])}, "in 'x': .*unknown variant `Q4`"),
        ({"x": entry(["F32"], [2], [0, 8])}, "in 'x': .*invalid type: sequence"),
        ({"x": entry("F32", [-2], [0, 8])}, "in 'x': .*integer `-2`"),
        ({"x": entry("F32", [2.0], [0, 8])}, "in 'x': .*floating point `2.0`"),
        ({"x": entry("F32", "2", [0, 8])}, "in 'x': .*string \"2\""),
        ({"x": {"dtype": "F32"}}, "in 'x': .*missing field `shape`"),
        ({"x": [1]}, "in 'x': .*invalid type"),
        ({"x": entry("F32", [1], [4, 8])}, "invalid offset for tensor `x`"),
        ({"x": entry("F32", [2], [0, 8]), "y": entry("F32", [1], [4, 8])}, "invalid offset for tensor `y`"),
        ({"x": entry("F32", [2**62, 2**62], [0, 8])}, "in 'x': .*overflow"),
        ({"x": entry("F32", [1], [0, 4])}, "file not fully covered"),
        ([], "its header is not a JSON object"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, header: object, message: str) -> None:
    raw = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(SeedError) as e:
        read_header(file)
    assert re.search(message, str(e.value)) and "x.safetensors: " in str(e.value)


def test_a_header_that_says_a_key_twice_is_refused(tmp_path: Path) -> None:
    """safetensors would take the last."""
    first, last = json.dumps(entry("F32", [2], [0, 8])), json.dumps(entry("I32", [2], [0, 8]))
    raw = f'{{"x": {first}, "x": {last}}}'.encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(SeedError, match="x.safetensors: key 'x' stands twice in its header"):
        read_header(file)
