"""Reads weights from an object store by ranges of bytes: a rank asks for what it needs, several requests at a time."""

import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from flame_ext.seeding.sources.boxes import Box, inside
from flame_ext.seeding.sources.dcp import DcpSource, stored_at
from flame_ext.seeding.sources.dcp_metadata import read_metadata
from flame_ext.seeding.sources.hf_safetensors import SafetensorsSource, keys_by_file
from flame_ext.seeding.sources.remote import Store, stand_in
from flame_ext.seeding.sources.safe_files import as_seed_error
from flame_ext.seeding.sources.source import Chunk, ReadBox, Source, TensorEntry

_RANGE = 2**24  # bytes of a request
_GAP = 2**20  # bytes between two parts of a box that are worth a request of their own
_AHEAD = 2**28  # bytes of slices that are read ahead
_END = 2**13  # bytes at either end of a file of torch.save that hold more than what describes its tensor

ReadRange = Callable[[int, int], bytes]  # the bytes from the one to, but not including, the other
_loading = Lock()  # torch's fake mode changes what all threads see


@dataclass(frozen=True)
class _Remote(Source):
    """A source whose files of weights are in a store; ``path`` has its small files."""

    store: Store = field(kw_only=True)

    @property
    def is_stock(self) -> bool:
        return False  # from_pretrained would find no weights at its path

    @property
    def bytes_ahead(self) -> int:
        return _AHEAD

    @contextmanager
    def _reading(self, file: Path) -> Iterator[tuple[ReadRange, ThreadPoolExecutor]]:
        """Gives ranges of an object, and threads to ask for them; raises SeedError if the object has changed by the end."""
        name = file.relative_to(self.path).as_posix()
        with ThreadPoolExecutor(self.store.requests, "ranges") as pool:
            try:
                yield partial(self.store.read, name), pool
            finally:
                pool.shutdown(cancel_futures=True)
        self.store.require_unchanged(name)


@dataclass(frozen=True)
class RemoteSafetensors(_Remote, SafetensorsSource):
    @contextmanager
    def open(self, file: Path) -> Iterator[ReadBox]:
        with self._reading(file) as (read_range, pool):

            def read(entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
                strides = torch.empty(entry.shape, device="meta").stride()
                return read_box(read_range, pool, chunk.position, strides, entry.dtype, chunk.box, box)

            yield read

    def independent_state(self, stored: Collection[TensorEntry]) -> dict[str, Tensor]:
        """Each tensor is read whole, where the file's header says, and decoded by safetensors from a file of its own in memory."""
        state: dict[str, Tensor] = {}
        for file, keys in keys_by_file(stored).items():
            with self._reading(file) as (read_range, pool):
                begin = 8 + int.from_bytes(read_range(0, 8), "little")
                header = json.loads(read_range(8, begin))
                ends = [header[key]["data_offsets"] for key in keys]
                values = pool.map(read_range, [begin + first for first, _ in ends], [begin + last for _, last in ends])
                for key, raw in zip(keys, values, strict=True):
                    alone = json.dumps({key: header[key] | {"data_offsets": [0, len(raw)]}}).encode()
                    state |= safetensors.torch.load(len(alone).to_bytes(8, "little") + alone + raw)
        return state


@dataclass(frozen=True)
class RemoteDcp(_Remote, DcpSource):
    @contextmanager
    def open(self, file: Path) -> Iterator[ReadBox]:
        with self._reading(file) as (read_range, pool):

            def read(entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
                ends = _Ends(read_range, chunk.position, chunk.position + chunk.nbytes)
                with _loading:
                    begin, strides = stored_at(ends, file, entry, chunk)
                return read_box(read_range, pool, begin, strides, entry.dtype, chunk.box, box)

            yield read

    def independent_state(self, stored: Collection[TensorEntry]) -> dict[str, Tensor]:
        """Tensors are read by torch's own reader of what fsspec opens."""
        state = {entry.key: torch.empty(entry.shape, dtype=entry.dtype) for entry in stored}
        with as_seed_error(f"{self.store.url}: cannot be read", "; check the network, and start again"):
            dcp.load(state, storage_reader=_Reader(self.store, self.path), no_dist=True)
        for name in {chunk.file.name for entry in stored for chunk in entry.chunks}:
            self.store.require_unchanged(name)
        return state


class _Reader(FsspecReader):
    """Reads a store as torch does, but its metadata, in ``folder``, cannot run code, as that of :class:`DcpReader`."""

    def __init__(self, store: Store, folder: Path) -> None:
        super().__init__(store.url, use_listings_cache=False)
        self._store, self._folder = store, folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with stand_in(self._store, self._folder) as place:
            _, metadata = read_metadata(place)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def remote(source: Source, place: Path, folder: Path, store: Store) -> Source:
    """Return what was read of a stand-in at ``place`` as a source whose small files are in ``folder`` and its weights in the store."""

    def moved(file: Path) -> Path:
        return folder / file.relative_to(place)

    def entry_of(entry: TensorEntry) -> TensorEntry:
        return replace(entry, chunks=tuple(replace(chunk, file=moved(chunk.file)) for chunk in entry.chunks))

    kind = RemoteDcp if isinstance(source, DcpSource) else RemoteSafetensors
    fields = vars(source) | {
        "path": folder,
        "entries": {key: entry_of(entry) for key, entry in source.entries.items()},
        "objects": {key: moved(file) for key, file in source.objects.items()},
    }
    return kind(**fields, store=store)


def read_box(
    read_range: ReadRange,
    pool: ThreadPoolExecutor,
    begin: int,
    strides: Sequence[int],
    dtype: torch.dtype,
    outer: Box,
    box: Box,
) -> Tensor:
    """Read a box of what lies at ``outer`` of a tensor, with its first element at byte ``begin`` and ``strides`` in elements."""
    values = torch.empty([end - begin for begin, end in box], dtype=dtype)

    def fill(part: Box) -> None:
        where = list(zip(inside(part, outer), strides, strict=True))
        first = sum(place.start * stride for place, stride in where)
        last = sum((place.stop - 1) * stride for place, stride in where)
        raw = bytearray(read_range(begin + first * dtype.itemsize, begin + (last + 1) * dtype.itemsize))
        lying = torch.frombuffer(raw, dtype=dtype).as_strided([end - begin for begin, end in part], strides, 0)
        values[inside(part, box)].copy_(lying)

    for filled in [pool.submit(fill, part) for part in parts_to_ask_for(box, strides, dtype.itemsize)]:
        filled.result()
    return values


def parts_to_ask_for(box: Box, strides: Sequence[int], itemsize: int) -> Iterator[Box]:
    """Cut a box into boxes that each span at most :data:`_RANGE` bytes of the file. What lies between their elements is read with them
    where it is less than :data:`_GAP`, as of rows of which a rank has some columns.
    """
    lengths = [end - begin for begin, end in box]
    axis = max((a for a, n in enumerate(lengths) if n > 1), key=lambda a: strides[a], default=None)
    if axis is None:
        yield box
        return
    stride = strides[axis] * itemsize
    inner = itemsize * (1 + sum((n - 1) * strides[a] for a, n in enumerate(lengths) if a != axis))
    if stride - inner >= _GAP:
        rows = 1
    elif inner + (lengths[axis] - 1) * stride <= _RANGE:
        yield box
        return
    else:
        rows = max(1, (_RANGE - inner) // stride + 1)
    begin, end = box[axis]
    for first in range(begin, end, rows):
        part = (*box[:axis], (first, min(first + rows, end)), *box[axis + 1 :])
        yield from parts_to_ask_for(part, strides, itemsize)


class _Ends(io.RawIOBase):
    """A stream of an object between two bytes, whose first and last kibibytes are fetched at once, and others when they are read."""

    def __init__(self, read_range: ReadRange, begin: int, end: int) -> None:
        self._read_range, self._end, self._at = read_range, end, begin
        cuts = [(begin, end)] if end - begin <= 2 * _END else [(begin, begin + _END), (end - _END, end)]
        self._held = [(first, read_range(first, last)) for first, last in cuts]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET  # as torch's view of a part of a file asks
        self._at = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        last = min(self._at + len(buffer), self._end)
        raw = next(
            (
                held[self._at - first : last - first]
                for first, held in self._held
                if first <= self._at <= last <= first + len(held)
            ),
            None,
        )
        if raw is None:
            raw = self._read_range(self._at, last)
        buffer[: len(raw)] = raw
        self._at += len(raw)
        return len(raw)
