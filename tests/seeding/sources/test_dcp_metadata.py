"""A ``.metadata`` is a pickle from a stranger: it cannot change this process, read elsewhere, or cost more than it is long."""

from __future__ import annotations

import pathlib
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.dcp_metadata import read_metadata
from tests.sources import save_dcp

STATE = {"model.a": torch.ones(10, 7).bfloat16(), "b": torch.tensor(3.5), "c": {"text": "plain"}}


def written(folder: Path, raw: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(raw)
    return folder


def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode()


def named(cls: Any) -> bytes:
    return pickle.GLOBAL + f"{cls.__module__}\n{cls.__qualname__}\n".encode()


def entries(metadata: dcp.Metadata) -> dict[str, Any]:
    """What torch has read of each key, of its properties only the dtype."""
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, dcp.TensorStorageMetadata):
            entry.properties = dcp.TensorProperties(dtype=entry.properties.dtype)
    return metadata.state_dict_metadata


def test_it_is_what_torch_reads(tmp_path: Path) -> None:
    folder = save_dcp(STATE, tmp_path / "dcp")
    _, found = read_metadata(folder)
    expected = FileSystemReader(folder).read_metadata()
    assert found.state_dict_metadata == entries(expected)
    assert found.storage_data == expected.storage_data and found.planner_data == expected.planner_data
    assert {type(value) for value in found.storage_data.values()} == {_StorageInfo}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    folder = save_dcp(STATE, tmp_path / "dcp")
    expected = FileSystemReader(folder).read_metadata()
    (folder / ".metadata").write_bytes(pickle.dumps(expected, protocol))
    assert read_metadata(folder)[1].state_dict_metadata == entries(expected)


@pytest.mark.parametrize("more", [(), ((7, 1),)], ids=["until torch 2.14", "with strides"])
def test_properties_are_read_as_every_torch_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[Any, ...]
) -> None:
    folder = save_dcp(STATE, tmp_path / "dcp")
    expected = FileSystemReader(folder).read_metadata()
    five = dcp.TensorProperties.__getstate__
    monkeypatch.setattr(dcp.TensorProperties, "__getstate__", lambda self: five(self)[:5] + more)
    raw = pickle.dumps(expected)
    monkeypatch.undo()
    assert read_metadata(written(folder, raw))[1].state_dict_metadata == entries(expected)


def by_name(member: Any, _protocol: int) -> Any:
    """How Python 3.11.0 to 3.11.3 reduce members of enumerations."""
    return getattr, (type(member), member.name)


def test_members_of_enumerations_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_dcp(STATE, tmp_path / "dcp")
    expected = FileSystemReader(folder).read_metadata()
    monkeypatch.setattr(dcp._MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    raw = pickle.dumps(expected)
    assert b"getattr" in raw
    assert read_metadata(written(folder, raw))[1].state_dict_metadata == entries(expected)


@pytest.mark.parametrize("of", [dcp.Metadata, dcp.MetadataIndex, pathlib.PosixPath])
def test_nothing_else_is_named_by_an_attribute(tmp_path: Path, of: type) -> None:
    call = named(getattr) + named(of) + text("__init__") + pickle.TUPLE2 + pickle.REDUCE
    with pytest.raises(SeedError, match=r"asks for builtins\.getattr; a checkpoint has no use for it"):
        read_metadata(written(tmp_path / "dcp", pickle.PROTO + b"\2" + call + pickle.STOP))


@pytest.mark.parametrize("target", [dcp.MetadataIndex, dcp.Metadata, pathlib.PosixPath, torch.Size])
def test_no_operation_changes_a_class(tmp_path: Path, target: type) -> None:
    """BUILD with a pair of states sets attributes of whatever stands on the stack, here of a class."""
    folder = save_dcp(STATE, tmp_path / "dcp")
    honest = pickle.dumps(FileSystemReader(folder).read_metadata(), protocol=2)
    state = pickle.EMPTY_DICT + pickle.MARK + text("canary") + text("sang") + pickle.SETITEMS
    trick = named(target) + pickle.NONE + state + pickle.TUPLE2 + pickle.BUILD + pickle.POP
    written(folder, honest[:2] + trick + honest[2:])
    with pytest.raises(SeedError, match="is not DCP metadata .*the state of a _Name is set"):
        read_metadata(folder)
    assert not hasattr(target, "canary")


@pytest.mark.parametrize("name", ["builtins.setattr", "pathlib.Path", "torch.load", "torch._utils._rebuild_tensor_v2"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    raw = pickle.PROTO + b"\2" + pickle.GLOBAL + f"{module}\n{function}\n".encode() + pickle.STOP
    with pytest.raises(SeedError, match=f"asks for {name}; a checkpoint has no use for it"):
        read_metadata(written(tmp_path / "dcp", raw))


def test_a_path_is_no_path_of_this_process(tmp_path: Path) -> None:
    """The path of the checkpoint when it was written is of no use, and stands for nothing else."""
    folder = save_dcp(STATE, tmp_path / "dcp")
    metadata = FileSystemReader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = pathlib.PurePosixPath("__0_0.distcp")
    written(folder, pickle.dumps(metadata).replace(b"PurePosixPath", b"PosixPath"))
    with pytest.raises(SeedError):
        read_metadata(folder)


def honest() -> dcp.Metadata:
    chunk = dcp.ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    tensor = dcp.TensorStorageMetadata(dcp.TensorProperties(torch.float32), torch.Size([4]), [chunk])
    places = {dcp.MetadataIndex("a", [0]): _StorageInfo("x.distcp", 0, 4)}
    return dcp.Metadata({"a": tensor}, {"a": ("a",)}, places)


def test_every_field_has_its_type(tmp_path: Path) -> None:
    """Each field of each object in turn holds something else, and the message says where."""

    def objects(metadata: dcp.Metadata) -> list[Any]:
        tensor = metadata.state_dict_metadata["a"]
        index, info = next(iter(metadata.storage_data.items()))
        return [metadata, tensor, tensor.chunks[0], info, index]

    folder = tmp_path / "dcp"
    for number, sample in enumerate(objects(honest())):
        for field in [*vars(sample), "unknown"]:
            metadata = honest()
            object.__setattr__(objects(metadata)[number], field, 1.5)
            if field == "storage_meta":  # is not read
                continue
            with pytest.raises(SeedError, match="is (malformed|not DCP metadata) \\("):
                read_metadata(written(folder, pickle.dumps(metadata)))


def test_bombs_are_refused_at_once(tmp_path: Path) -> None:
    metadata = honest()
    tensor = metadata.state_dict_metadata["a"]
    tensor.chunks *= 20_000  # one list that stands for the pieces of many tensors
    metadata.state_dict_metadata = {str(i): tensor for i in range(20_000)}
    many_pieces = pickle.dumps(metadata)
    # Integers of one hash value in a dictionary: a quadratic number of comparisons.
    colliding = pickle.dumps({i * (2**61 - 1): None for i in range(30_000)})
    index = dcp.MetadataIndex("x" * 10**6)
    one_long_name = pickle.dumps(
        dcp.Metadata({}, storage_data={dcp.MetadataIndex(index.fqn, None, i): None for i in range(10**4)})
    )
    for raw in (
        many_pieces,
        colliding,
        one_long_name,
        b"\x80\x04" + named(torch.Size) + b"\x94](" + b"h\x00)\x81" * 2**21 + b"e.",
        b"\x80\x04" + pickle.EMPTY_DICT * 2**25 + b".",
        b"\x80\x04N" + b"\x94" * 2**25 + b".",
    ):
        begin = time.process_time()
        with pytest.raises(SeedError, match=r"\.metadata: "):
            read_metadata(written(tmp_path / "dcp", raw))
        assert time.process_time() - begin < 10


def test_a_tensor_of_many_columns_takes_linear_time(tmp_path: Path) -> None:
    from flame_ext.seeding.sources.boxes import tiles_exactly

    begin = time.process_time()
    columns = [((0, 2), (i, i + 1)) for i in range(50_000)]
    assert tiles_exactly(((0, 2), (0, 50_000)), columns) and not tiles_exactly(((0, 2), (0, 50_000)), columns[1:])
    assert time.process_time() - begin < 10
