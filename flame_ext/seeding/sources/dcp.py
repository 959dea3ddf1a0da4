"""A DCP checkpoint: flat, nested under "model", or a full training step of which only the model is taken.

Neither its ``.metadata`` nor its tensors are unpickled as they please: the first may name a dozen classes and no more, the
second are read with ``weights_only``.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.boxes import Box, box_at, full_box, inside, tiles_exactly
from flame_ext.seeding.sources.safe_files import contained_file, require_plain_name
from flame_ext.seeding.sources.source import Chunk, ReadBox, Source, TensorEntry

METADATA_NAME = ".metadata"
NESTED_PREFIX = "model."  # what {"model": state_dict} makes of every key

# What a trainer saves beside the model, by the first part of the key (torchtitan's names, and its forerunners').
_NOT_THE_MODEL = ("optimizer", "lr_scheduler", "dataloader", "train_state", "rng", "ft_dataloader")

_MAX_METADATA_BYTES = 2**29

_ALLOWED = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        _StorageInfo,
        _MEM_FORMAT_ENCODING,
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where the checkpoint was written, as recorded there; the class and its module's name depend on system and Python.
    **{
        (module, name): PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}


@dataclass(frozen=True)
class DcpSource(Source):
    """See :func:`open_dcp`."""

    layout: str = "dcp-flat"  # type: ignore[misc]  # of the two layouts, the one that was found

    @contextmanager
    def open(self, file: Path) -> Iterator[ReadBox]:
        """Files are memory-mapped; a box is a view of the mapping, or a copy if it is not aligned."""
        with file.open("rb") as stream:
            # Never closed by hand: it lives as long as the last view of it. Copy-on-write, since torch wants no
            # read-only memory; nothing writes to it.
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

            def read(entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
                return _values(mapping, stream, file, entry, chunk, box)

            yield read


def open_dcp(folder: Path) -> DcpSource:
    """Read ``.metadata``, from which every tensor's pieces and their places in the files are known.

    Keys are as they are stored, and the layout is what the writer noted of it; :func:`in_model_layout` goes by the model's.

    Raises:
        SeedError: the metadata is damaged or wants to run code, its pieces do not tile a tensor, or a file is absent or
            of another size.
    """
    metadata_file = contained_file(folder, METADATA_NAME, "the folder")
    raw, metadata = read_metadata(metadata_file)
    digest = hashlib.sha256(raw)
    try:
        entries, objects, extents = _described(folder, metadata)
    except SeedError:
        raise
    except Exception as e:  # a class that is allowed may still hold anything
        raise SeedError(f"{metadata_file}: is malformed ({type(e).__name__}: {e}): damaged file; copy it again") from e
    for name, ranges in sorted(extents.items()):
        size = _require_filled(contained_file(folder, name, METADATA_NAME), sorted(ranges))
        digest.update(f"{name}\0{size}\0".encode())
    stray = [p for p in sorted(folder.glob("*.distcp")) if p.name not in extents and p.stat().st_size > 0]
    passed_over = tuple(f"{p.name} (not in {METADATA_NAME})" for p in stray)
    return DcpSource(folder, entries, digest.hexdigest(), passed_over, objects, _noted_layout(metadata))


def _noted_layout(metadata: Metadata) -> str:
    """By the path of each key in the dictionary that was saved, which DCP's planner keeps beside the flattened key."""
    paths = metadata.planner_data.values() if isinstance(metadata.planner_data, dict) else ()
    nested = any(isinstance(path, tuple) and len(path) > 1 and path[0] == "model" for path in paths)
    return "dcp-nested" if nested else "dcp-flat"


def in_model_layout(source: DcpSource, is_models: Callable[[str], bool]) -> DcpSource:
    """Keep the model's part of the checkpoint, under keys without the nesting.

    Args:
        source: as :func:`open_dcp` gives it.
        is_models: whether a key, as files spell it, is one of the model's.

    Raises:
        SeedError: some keys are the model's as they are, others are once "model." is taken off.
    """
    keys = [*source.entries, *source.objects]
    flat = {key for key in keys if is_models(key)}
    nested = {
        key
        for key in keys
        if key not in flat and key.startswith(NESTED_PREFIX) and is_models(key.removeprefix(NESTED_PREFIX))
    }
    if flat and nested:
        raise SeedError(
            f"{source.path}: holds the model both flat ({_some(flat)}) and nested under 'model' ({_some(nested)}); which one "
            "is meant can not be known: save one of them alone"
        )
    prefix = NESTED_PREFIX if nested else ""

    def beside_the_model(key: str) -> bool:
        part = key.split(".")[0]
        return part in _NOT_THE_MODEL and key not in flat

    rest = Counter(key.split(".")[0] for key in keys if beside_the_model(key))
    return replace(
        source,
        entries={k.removeprefix(prefix): entry for k, entry in source.entries.items() if not beside_the_model(k)},
        objects={k.removeprefix(prefix): file for k, file in source.objects.items() if not beside_the_model(k)},
        passed_over=(*source.passed_over, *(f"{part} ({n} entries)" for part, n in sorted(rest.items()))),
        layout="dcp-nested" if nested else "dcp-flat",
    )


def in_noted_layout(source: DcpSource) -> DcpSource:
    """As :func:`in_model_layout`, for who does not know the model: by what the writer noted of the nesting."""
    keys = {*source.entries, *source.objects}

    def is_models(key: str) -> bool:
        if source.layout == "dcp-nested":
            return key not in keys  # what is left of a key when the nesting is taken off
        return key.split(".")[0] not in _NOT_THE_MODEL

    return in_model_layout(source, is_models)


def _some(keys: Collection[str]) -> str:
    shown = sorted(keys)[:5]
    return ", ".join(repr(key) for key in shown) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def read_metadata(file: Path) -> tuple[bytes, Metadata]:
    """The raw bytes of a ``.metadata`` and what they say.

    Raises:
        SeedError: if it is not a DCP metadata file, or names anything beside DCP's own classes.
    """
    size = file.stat().st_size
    if size > _MAX_METADATA_BYTES:
        raise SeedError(f"{file}: {size} bytes is no DCP metadata; expected at most {_MAX_METADATA_BYTES}")
    raw = file.read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
    except _ForbiddenError as e:
        raise SeedError(
            f"{file}: {e}; a checkpoint has no use for it, so this one is damaged or made to run code"
        ) from e
    except Exception as e:  # a damaged pickle fails in every way there is
        raise SeedError(f"{file}: is not DCP metadata ({type(e).__name__}: {e}): damaged file; copy it again") from e
    if not isinstance(metadata, Metadata):
        raise SeedError(f"{file}: is not DCP metadata but a pickled {type(metadata).__name__}")
    return raw, metadata


class _ForbiddenError(Exception):
    """A pickle asks for what it is not given."""


class _MetadataUnpickler(pickle._Unpickler):
    """Gives DCP's own classes and dtypes, nothing else.

    The Python implementation, not the C one: there a single damaged byte can ask for a memo of 2**32 entries, which is
    allocated at once.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: method
        for code, method in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]  # allocates what a length field says
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _ForbiddenError(f"asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenError("asks for an object from outside the file")


def _described(
    folder: Path, metadata: Metadata
) -> tuple[dict[str, TensorEntry], dict[str, Path], dict[str, list[tuple[int, int]]]]:
    """Tensors, other objects, and each file's byte ranges (offset, length)."""
    metadata_file = folder / METADATA_NAME
    storage: dict[tuple[str, tuple[int, ...] | None], _StorageInfo] = {}
    extents: dict[str, list[tuple[int, int]]] = {}
    for index, info in metadata.storage_data.items():
        name = require_plain_name(info.relative_path, index.fqn, metadata_file)
        if getattr(info, "transform_descriptors", None):
            raise SeedError(f"{metadata_file}: {index.fqn!r} was transformed on saving (compressed?); save it plainly")
        if type(info.offset) is not int or type(info.length) is not int or info.offset < 0 or info.length < 0:
            raise ValueError(f"{index.fqn!r} lies at {info.offset!r} with length {info.length!r}")
        storage[index.fqn, None if index.offset is None else tuple(index.offset)] = info
        extents.setdefault(name, []).append((info.offset, info.length))
    entries: dict[str, TensorEntry] = {}
    objects: dict[str, Path] = {}
    for key, value in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"key {key!r}")
        if not isinstance(value, TensorStorageMetadata):
            info = storage.get((key, None))
            objects[key] = folder / info.relative_path if info is not None else metadata_file
            continue
        shape = _sizes(value.size)
        if not isinstance(value.properties.dtype, torch.dtype):
            raise TypeError(f"dtype of {key!r}: {value.properties.dtype!r}")
        chunks = []
        for chunk in value.chunks:
            box = box_at(_sizes(chunk.offsets), _sizes(chunk.sizes))
            info = storage.get((key, tuple(chunk.offsets)))
            if info is None:
                raise SeedError(
                    f"{metadata_file}: no file for {key!r} at {list(chunk.offsets)}: damaged file; copy it again"
                )
            chunks.append(Chunk(box, folder / info.relative_path, info.offset, info.length))
        if any(len(chunk.box) != len(shape) for chunk in chunks) or not tiles_exactly(
            full_box(shape), [chunk.box for chunk in chunks]
        ):
            raise SeedError(
                f"{metadata_file}: the pieces of {key!r} ({len(chunks)}) do not tile its shape {list(shape)} exactly: the "
                "checkpoint is incomplete"
            )
        entries[key] = TensorEntry(key, shape, value.properties.dtype, tuple(chunks))
    return entries, objects, extents


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    if any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError(f"{sizes} are no sizes")
    return sizes


def _require_filled(file: Path, ranges: list[tuple[int, int]]) -> int:
    """Raise unless the ranges follow each other without overlap up to the file's last byte; returns its size."""
    end = 0
    for offset, length in ranges:
        if offset < end:
            raise SeedError(
                f"{file}: two entries of {METADATA_NAME} share byte {offset}: damaged; copy the folder again"
            )
        end = offset + length
    size = file.stat().st_size
    if size != end:
        raise SeedError(
            f"{file}: has {size} bytes, {METADATA_NAME} describes {end}: truncated or damaged; copy the folder again"
        )
    return size


def _values(mapping: mmap.mmap, stream: Any, file: Path, entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
    """A box of one piece, out of the mapped file: what ``torch.load`` would give, without reading the rest.

    A piece is stored as a file of ``torch.save``. Loaded under a fake mode, it says where its storage begins.
    """
    try:
        with FakeTensorMode():
            view: Any = _create_file_view(stream, chunk.position, chunk.nbytes)
            fake = torch.load(view, map_location="cpu", weights_only=True)
        if not isinstance(fake, Tensor):
            raise TypeError(f"holds a {type(fake).__name__}")
        sizes = [end - begin for begin, end in chunk.box]
        if list(fake.shape) != sizes or fake.dtype != entry.dtype:
            raise ValueError(f"holds {list(fake.shape)} {fake.dtype}, {METADATA_NAME} says {sizes} {entry.dtype}")
        storage: Any = fake.untyped_storage()
        itemsize = entry.dtype.itemsize
        if storage._checkpoint_offset + storage.nbytes() > chunk.nbytes:
            raise ValueError("its storage ends beyond it")
        # The first and the last element of the box, as the storage counts.
        where = list(zip(inside(box, chunk.box), fake.stride(), strict=True))
        first = fake.storage_offset() + sum(part.start * stride for part, stride in where)
        last = fake.storage_offset() + sum((part.stop - 1) * stride for part, stride in where)
        if not 0 <= first <= last < storage.nbytes() // itemsize:
            raise ValueError("its elements lie outside its storage")
        begin = chunk.position + storage._checkpoint_offset + first * itemsize
        raw = torch.frombuffer(mapping, dtype=torch.uint8, offset=begin, count=(last - first + 1) * itemsize)
        if raw.data_ptr() % itemsize:
            raw = raw.clone()  # not aligned in the file
        return raw.view(entry.dtype).as_strided([end - begin for begin, end in box], fake.stride(), 0)
    except Exception as e:  # whatever a damaged pickle or archive makes of itself
        reason = " ".join(str(e).split())[:300]
        raise SeedError(
            f"{file}: {entry.key!r} can not be read ({type(e).__name__}: {reason}); copy the folder again"
        ) from e
