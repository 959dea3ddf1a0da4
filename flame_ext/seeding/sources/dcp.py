"""Reads DCP checkpoints, without running code: flat, nested under "model", or the model of a full training step."""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.boxes import Box, box_at, full_box, inside, tiles_exactly
from flame_ext.seeding.sources.dcp_metadata import METADATA_NAME, read_metadata
from flame_ext.seeding.sources.safe_files import as_seed_error, some
from flame_ext.seeding.sources.source import Chunk, ReadBox, Source, TensorEntry

NESTED_PREFIX = "model."  # of every key in {"model": state_dict}
_LAYOUTS = {"": "dcp-flat", NESTED_PREFIX: "dcp-nested"}

# The first part of the keys that a trainer saves beside the model (torchtitan's names, and its forerunners').
_NOT_THE_MODEL = ("optimizer", "lr_scheduler", "dataloader", "train_state", "rng", "ft_dataloader")


class DcpSource(Source):
    def for_model(self, *is_models: Callable[[str], bool]) -> DcpSource:
        keys = {*self.entries, *self.objects}
        flat, nested = set[str](), set[str]()
        for is_model in is_models:
            flat = {key for key in keys if is_model(key)}
            rest = {key for key in keys - flat if key.startswith(NESTED_PREFIX)}
            nested = {key for key in rest if is_model(key.removeprefix(NESTED_PREFIX))}
            if flat or nested:
                break
        if flat and nested:
            raise SeedError(
                f"{self.path}: holds the model both flat ({some(map(repr, flat))}) and nested under 'model' "
                f"({some(map(repr, nested))}); which one is meant cannot be known: save one of them alone"
            )
        return self._part(NESTED_PREFIX if nested else "", flat)

    def model_part(self) -> DcpSource:
        return self._part(self.nesting)

    def _part(self, nesting: str, models: Collection[str] = ()) -> DcpSource:
        """Leave out what a trainer saves beside the model, unless it is in ``models``, and take the nesting off."""
        keys = {*self.entries, *self.objects}.difference(models)
        beside = {key for key in keys if key.split(".")[0] in _NOT_THE_MODEL}
        rest = Counter(key.split(".")[0] for key in beside)
        return replace(
            self,
            entries={k.removeprefix(nesting): entry for k, entry in self.entries.items() if k not in beside},
            objects={k.removeprefix(nesting): file for k, file in self.objects.items() if k not in beside},
            passed_over=(*self.passed_over, *(f"{part} ({n} entries)" for part, n in sorted(rest.items()))),
            layout=_LAYOUTS[nesting],
            nesting=nesting,
        )

    def independent_state(self, stored: Collection[TensorEntry]) -> dict[str, Tensor]:
        state = {entry.key: torch.empty(entry.shape, dtype=entry.dtype) for entry in stored}
        dcp.load(state, storage_reader=DcpReader(self.path, self.follow_links), no_dist=True)
        return state

    @contextmanager
    def open(self, file: Path) -> Iterator[ReadBox]:
        with file.open("rb") as stream:
            # Never closed by hand: it lives as long as the last view of it. Copy-on-write, since torch wants no
            # read-only memory; nothing writes to it.
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            yield partial(_read_box, mapping, stream, file)


def open_dcp(folder: Path, follow_links: bool = False) -> DcpSource:
    """Read the pieces of every tensor from ``.metadata``; keys are as stored, and the layout is the one that the writer noted.

    Raises SeedError if the metadata is damaged or wants to run code, pieces do not tile a tensor, or a file has another size.
    """
    raw, metadata = read_metadata(folder, follow_links)
    digest = hashlib.sha256(raw)
    with as_seed_error(f"{folder / METADATA_NAME}: is malformed"):
        entries, objects, extents = _described(folder, metadata)
    for name, ranges in sorted(extents.items()):
        file = folder / name
        size, end = file.stat().st_size, 0
        for offset, length in sorted(ranges):
            if offset < end:
                raise SeedError(f"{file}: two entries of {METADATA_NAME} share byte {offset}: damaged; copy it again")
            end = offset + length
        if size != end:
            found = f"has {size} bytes, {METADATA_NAME} describes {end}"
            raise SeedError(f"{file}: {found}: truncated or damaged; copy the folder again")
        digest.update(f"{name}\0{size}\0".encode())
    stray = [
        p for p in sorted(folder.glob("*.distcp")) if p.name not in extents and p.is_file() and p.stat().st_size > 0
    ]
    passed_over = tuple(f"{p.name} (not in {METADATA_NAME})" for p in stray)
    # DCP's planner keeps, beside each flattened key, its path in the dictionary that was saved.
    nested = any(len(path) > 1 and path[0] == "model" for path in (metadata.planner_data or {}).values())
    nesting = NESTED_PREFIX if nested else ""
    return DcpSource(
        folder,
        entries,
        digest.hexdigest(),
        passed_over,
        objects,
        _LAYOUTS[nesting],
        nesting=nesting,
        follow_links=follow_links,
    )


def _described(
    folder: Path, metadata: Metadata
) -> tuple[dict[str, TensorEntry], dict[str, Path], dict[str, list[tuple[int, int]]]]:
    """Tensors, other objects, and each file's byte ranges (offset, length)."""
    metadata_file = folder / METADATA_NAME
    storage, extents = {}, defaultdict(list)
    for index, info in metadata.storage_data.items():
        if info.transform_descriptors:
            raise SeedError(f"{metadata_file}: {index.fqn!r} was transformed on saving (compressed?); save it plainly")
        storage[index.fqn, None if index.offset is None else tuple(index.offset)] = info
        extents[info.relative_path].append((info.offset, info.length))
    entries: dict[str, TensorEntry] = {}
    objects: dict[str, Path] = {}
    for key, value in metadata.state_dict_metadata.items():
        if not isinstance(value, TensorStorageMetadata):
            info = storage.get((key, None))
            objects[key] = folder / info.relative_path if info is not None else metadata_file
            continue
        shape, dtype, chunks = tuple(value.size), value.properties.dtype, []
        for chunk in value.chunks:
            box = box_at(chunk.offsets, chunk.sizes)
            info = storage.get((key, tuple(chunk.offsets)))
            if info is None:
                raise SeedError(f"{metadata_file}: no file for {key!r} at {[*chunk.offsets]}: damaged; copy it again")
            chunks.append(Chunk(box, folder / info.relative_path, info.offset, info.length))
        boxes = [chunk.box for chunk in chunks]
        if any(len(box) != len(shape) for box in boxes) or not tiles_exactly(full_box(shape), boxes):
            pieces = f"the pieces of {key!r} ({len(chunks)}) do not tile its shape {list(shape)} exactly"
            raise SeedError(f"{metadata_file}: {pieces}: the checkpoint is incomplete")
        entries[key] = TensorEntry(key, shape, dtype, tuple(chunks))
    return entries, objects, extents


def _read_box(mapping: mmap.mmap, stream: Any, file: Path, entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
    """Return a view of a box of one piece in the mapped file, or a copy if it is not aligned."""
    begin, strides = stored_at(stream, file, entry, chunk)
    # The first and the last element of the box, as the storage counts.
    where = list(zip(inside(box, chunk.box), strides, strict=True))
    first = sum(part.start * stride for part, stride in where)
    last = sum((part.stop - 1) * stride for part, stride in where)
    itemsize = entry.dtype.itemsize
    count = (last - first + 1) * itemsize
    raw = torch.frombuffer(mapping, dtype=torch.uint8, offset=begin + first * itemsize, count=count)
    if raw.data_ptr() % itemsize:
        raw = raw.clone()  # not aligned in the file
    return raw.view(entry.dtype).as_strided([end - begin for begin, end in box], strides, 0)


def stored_at(stream: Any, file: Path, entry: TensorEntry, chunk: Chunk) -> tuple[int, tuple[int, ...]]:
    """Return the offset in bytes of a piece's first element in its file, and the strides in elements; raise SeedError if it is damaged.

    A piece is stored as a file of ``torch.save``; loaded under a fake mode, it says where its storage begins.
    """
    with as_seed_error(f"{file}: {entry.key!r} cannot be read", "; copy the folder again"):
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
        first = fake.storage_offset()
        last = first + sum((size - 1) * stride for size, stride in zip(sizes, fake.stride(), strict=True))
        if not 0 <= first <= last < storage.nbytes() // itemsize:
            raise ValueError("its elements lie outside its storage")
        return chunk.position + storage._checkpoint_offset + first * itemsize, fake.stride()


class DcpReader(FileSystemReader):
    """Reads one folder as torch does, but the metadata cannot run code or name a file outside of the folder."""

    def __init__(self, folder: Path, follow_links: bool | None = None) -> None:
        super().__init__(folder)
        self._follow_links = follow_links

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        _, metadata = read_metadata(Path(self.path), self._follow_links)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata
