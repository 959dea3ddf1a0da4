"""What a DCP checkpoint says, and every way in which it can be wrong."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorProperties

from flame_ext.errors import SeedError
from flame_ext.seeding.read import read_weights
from flame_ext.seeding.sources.boxes import full_box
from flame_ext.seeding.sources.dcp import read_metadata
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.source import Source
from tests.ranks import run_ranks
from tests.sources import save_dcp

STATE = {
    "model.a": torch.arange(70.0).view(10, 7).bfloat16(),
    "lm_head.b": torch.randn(6, 3, dtype=torch.float64).t(),
    "c": torch.tensor(3.5),
    "d": torch.arange(9.0)[2:7],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_dcp(STATE, tmp_path / "dcp")


def values(source: Source) -> dict[str, torch.Tensor]:
    state = {key: torch.zeros(entry.shape, dtype=entry.dtype) for key, entry in source.entries.items()}
    read_weights(source, state, {}, check_finite=True)
    return state


@pytest.mark.parametrize("nested", [False, True])
def test_values_are_those_that_were_saved(tmp_path: Path, nested: bool) -> None:
    source = open_source(save_dcp({"model": STATE} if nested else STATE, tmp_path / "dcp"))
    assert source.layout == ("dcp-nested" if nested else "dcp-flat")
    source = source.for_model(STATE.__contains__)
    assert source.layout == ("dcp-nested" if nested else "dcp-flat") and set(source.entries) == set(STATE)
    read = values(source)
    for key, tensor in STATE.items():
        assert source.entries[key].shape == tuple(tensor.shape) and torch.equal(read[key], tensor), key


def test_a_part_is_read_and_nothing_else(folder: Path) -> None:
    source = open_source(folder)
    (chunk,) = source.entries["model.a"].chunks
    with source.open(chunk.file) as read:
        assert torch.equal(read(source.entries["model.a"], chunk, ((3, 5), (1, 4))), STATE["model.a"][3:5, 1:4])


def test_the_rest_of_a_training_step_is_passed_over(tmp_path: Path) -> None:
    step = {**STATE, "optimizer": {"state": {"x": torch.ones(3)}}, "train_state": {"step": 4}}
    source = open_source(save_dcp(step, tmp_path / "dcp")).for_model(STATE.__contains__)
    assert set(source.entries) == set(STATE) and source.objects == {}
    assert source.passed_over == ("optimizer (1 entries)", "train_state (1 entries)")


def test_what_is_not_a_tensor_is_known_as_such(tmp_path: Path) -> None:
    source = open_source(save_dcp({**STATE, "model.extra": {"state": "text"}}, tmp_path / "dcp"))
    assert list(source.objects) == ["model.extra.state"]


def rewrite(folder: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def uncovered(m: Metadata) -> None:
    m.state_dict_metadata["model.a"].chunks[0] = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([9, 7]))


def overlapping(m: Metadata) -> None:
    m.state_dict_metadata["model.a"].chunks.append(ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([10, 7])))


def other_rank(m: Metadata) -> None:
    m.state_dict_metadata["model.a"].chunks[0] = ChunkStorageMetadata(torch.Size([0]), torch.Size([70]))


def escaping(m: Metadata) -> None:
    for info in m.storage_data.values():
        info.relative_path = "../" + info.relative_path


def shared_bytes(m: Metadata) -> None:
    for info in m.storage_data.values():
        info.relative_path, info.offset = "__0_0.distcp", 0


def unplaced(m: Metadata) -> None:
    m.storage_data = {index: info for index, info in m.storage_data.items() if index.fqn != "c"}


def negative(m: Metadata) -> None:
    next(iter(m.storage_data.values())).offset = -1


def transformed(m: Metadata) -> None:
    next(iter(m.storage_data.values())).transform_descriptors = ["zstd"]


def no_dictionary(m: Metadata) -> None:
    m.state_dict_metadata = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (uncovered, "the pieces of 'model.a' (1) do not tile its shape [10, 7] exactly"),
        (overlapping, "the pieces of 'model.a' (2) do not tile"),
        (other_rank, "no file for 'model.a' at [0]"),
        (escaping, "only plain file names"),
        (shared_bytes, "two entries of .metadata share byte 0"),
        (unplaced, "no file for 'c' at []"),
        (negative, "malformed"),
        (transformed, "was transformed on saving"),
        (no_dictionary, "malformed (AttributeError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_metadata_is_refused(folder: Path, change: Callable[[Metadata], Any], message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(SeedError) as e:
        open_source(folder)
    assert message in str(e.value) and str(folder) in str(e.value)


def test_a_dtype_that_is_not_the_tensors_own_is_refused(folder: Path) -> None:
    rewrite(
        folder,
        lambda m: setattr(m.state_dict_metadata["c"], "properties", TensorProperties(dtype=torch.int32)),
    )
    with pytest.raises(
        SeedError, match=r"'c' cannot be read .*holds \[\] torch.float32, .metadata says \[\] torch.int32"
    ):
        values(open_source(folder))


def test_a_piece_that_would_run_code_is_refused(folder: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("ran",))

    source = open_source(folder)
    file = source.entries["c"].chunks[0].file
    torch.save(Runs(), file)
    rewrite(
        folder,
        lambda m: [
            setattr(info, "length", file.stat().st_size) for index, info in m.storage_data.items() if index.fqn == "c"
        ],
    )
    with pytest.raises(SeedError, match="'c' cannot be read"):
        values(open_source(folder))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (pickle.dumps(print), "asks for builtins.print"),
        (b"\x80\x04\x95", "is not DCP metadata"),
        (b"", "is not DCP metadata"),
        (pickle.dumps({"a": 1}), "but a pickled dict"),
        # A memo of four billion entries, and a bytearray of a terabyte: a length field is not an order to allocate.
        (b"\x80\x04Nr\xff\xff\xff\xff.", "but a pickled NoneType"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "is not DCP metadata"),
        (b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".", "is not DCP metadata"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / ".metadata").write_bytes(raw)
    with pytest.raises(SeedError) as e:
        read_metadata(tmp_path)
    assert message in str(e.value) and str(tmp_path) in str(e.value)


def test_a_folder_of_two_kinds_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SeedError, match="holds a DCP checkpoint .* and Hugging Face weights"):
        open_source(folder)


def save_bin(folder: Path, **options: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({**STATE, "extra": 5}, folder / "pytorch_model.bin", **options)
    return folder


def test_bin_files_are_read_where_they_are_allowed(tmp_path: Path) -> None:
    folder = save_bin(tmp_path / "bin")
    with pytest.raises(SeedError, match="seed.allow_pickle"):
        open_source(folder)
    source = open_source(folder, allow_pickle=True)
    assert source.layout == "hf-bin" and list(source.objects) == ["extra"]
    read = values(source)
    assert all(torch.equal(read[key], tensor) for key, tensor in STATE.items())
    assert source.entries["model.a"].chunks[0].box == full_box((10, 7))


def test_damaged_and_old_bin_files_are_refused(tmp_path: Path) -> None:
    old = save_bin(tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(SeedError, match="pytorch_model.bin: cannot be read as tensors alone, memory-mapped"):
        open_source(old, allow_pickle=True)
    cut = save_bin(tmp_path / "cut") / "pytorch_model.bin"
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(SeedError, match="pytorch_model.bin: cannot be read"):
        open_source(cut.parent, allow_pickle=True)
    cut.write_bytes(b"")
    with pytest.raises(SeedError, match="0 bytes"):
        open_source(cut.parent, allow_pickle=True)
    with zipfile.ZipFile(cut, "w") as archive:
        archive.writestr("nothing", "")
    with pytest.raises(SeedError, match="pytorch_model.bin: cannot be read"):
        open_source(cut.parent, allow_pickle=True)


def test_an_index_of_bin_files_is_authoritative(tmp_path: Path) -> None:
    folder = save_bin(tmp_path / "bin")
    (folder / "pytorch_model.bin").unlink()
    torch.save({"model.a": STATE["model.a"]}, folder / "one.bin")
    torch.save({"c": STATE["c"]}, folder / "two.bin")
    torch.save({"c": torch.zeros(())}, folder / "zzz.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"model.a": "one.bin", "c": "two.bin"}}))
    source = open_source(folder, allow_pickle=True)
    assert set(source.entries) == {"model.a", "c"}
    assert source.passed_over == ("zzz.bin (not in pytorch_model.bin.index.json)",)
    assert values(source)["c"].item() == 3.5
    for weight_map, message in (
        (
            {"model.a": "two.bin", "c": "two.bin", "x": "one.bin"},
            "one.bin: holds key 'model.a', which pytorch_model.bin.index.json puts in 'two.bin'",
        ),
        ({"model.a": "one.bin", "c": "two.bin", "d": "../x.bin"}, "only plain file names"),
        ({"model.a": "one.bin", "c": "three.bin"}, "three.bin: listed in pytorch_model.bin.index.json but absent"),
        (
            {"model.a": "one.bin", "x": "two.bin"},
            "two.bin: holds key 'c', which pytorch_model.bin.index.json puts in None",
        ),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(SeedError) as e:
            open_source(folder, allow_pickle=True)
        assert message in str(e.value)


UNEVEN = {"matrix": (11, 7), "vector": (5,), "short": (2, 3)}


def uneven() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {key: torch.randn(shape, generator=generator) for key, shape in UNEVEN.items()}


def sharded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return {key: distribute_tensor(tensor, mesh, [Shard(0)]) for key, tensor in state.items()}


def save_in_ranks(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    dcp.save(sharded(uneven()), checkpoint_id=folder)
    torch.distributed.destroy_process_group()


def read_in_ranks(folder: str) -> dict[str, torch.Tensor]:
    torch.distributed.init_process_group("gloo")
    state = sharded({key: torch.full(shape, float("nan")) for key, shape in UNEVEN.items()})
    read_weights(open_source(folder), state, {}, check_finite=True)
    full = {key: tensor.full_tensor() for key, tensor in state.items()}
    torch.distributed.destroy_process_group()
    return full


@pytest.mark.parametrize(("saved_by", "read_by"), [(3, 2), (2, 3), (3, 4), (4, 3)])
def test_shards_that_do_not_meet(tmp_path: Path, saved_by: int, read_by: int) -> None:
    """A rank needs parts of several pieces, and some ranks have none of a tensor."""
    folder = tmp_path / "dcp"
    for rank in run_ranks(save_in_ranks, saved_by, str(folder), folder=tmp_path / "save"):
        assert rank.exit_code == 0, rank.output
    assert len(open_source(folder).entries["matrix"].chunks) == saved_by
    for rank in run_ranks(read_in_ranks, read_by, str(folder), folder=tmp_path / "read"):
        assert rank.exit_code == 0, rank.output
        assert all(torch.equal(rank.value[key], tensor) for key, tensor in uneven().items())
