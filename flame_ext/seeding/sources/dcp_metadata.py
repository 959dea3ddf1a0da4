"""Reads DCP's ``.metadata``, a pickle, without letting it name, call or change anything of this process.

The unpickler makes inert records; explicit code then checks their types and makes torch's metadata of them.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.safe_files import (
    MAX_RANK,
    as_seed_error,
    contained_file,
    read_bytes,
    require_plain_name,
)

METADATA_NAME = ".metadata"
MAX_METADATA_BYTES = 2**26  # about 450,000 pieces of tensors
_MORE_PER_FILE = 2**20  # for each file of data, of which every rank writes one: some 7,000 pieces
_BYTES_OF_AN_OBJECT = 4  # at least, on average; memory is bounded by the number of objects
_BYTES_OF_A_RECORD = 12  # the same for records; a piece of a tensor has some 7 in 143 bytes
_MAX_NAME = 2**12  # characters
_MAX_DEPTH = 64  # of the dictionary that was saved

_CLASSES = {
    f"{cls.__module__}.{cls.__qualname__}": cls
    for cls in (
        _StorageInfo, dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata, dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta,
        dcp.TensorProperties, dcp.TensorStorageMetadata,
    )
}  # fmt: skip
_MEMORY_FORMAT = f"{dcp.__name__}._MEM_FORMAT_ENCODING"
# The class of the path of the checkpoint when it was written depends on system and Python.
_PATHS = tuple(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath"))
_GETATTR = "builtins.getattr"  # of this enumeration: Python 3.11.0 to 3.11.3 pickle its members so
_NAMES = {*_CLASSES, _MEMORY_FORMAT, _GETATTR, "torch.Size", "torch.serialization._get_layout", *_PATHS}
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

# Operations that make numbers, text and containers, or keep and repeat them. BYTEARRAY8 is not among them: it allocates what a
# length field says.
_PLAIN = (
    "PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1",
    "LONG4", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET",
    "LONG_BINGET", "GLOBAL", "STACK_GLOBAL",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Name:
    """Stands for a class or function that the pickle names."""

    of: str


@dataclasses.dataclass(eq=False, slots=True)
class _Record:
    """Stands for an object: what it is of, what it was made from, and the state that was put into it."""

    of: str
    arguments: tuple[Any, ...]
    state: Any = None


def most_metadata_bytes(files: int) -> int:
    """Return the largest size of metadata beside so many files of data."""
    return MAX_METADATA_BYTES + _MORE_PER_FILE * files


def read_metadata(folder: Path, follow_links: bool | None = None) -> tuple[bytes, dcp.Metadata]:
    """Return raw bytes and metadata; raise SeedError if it is none, or names other classes than DCP's or files elsewhere."""
    file = contained_file(folder, METADATA_NAME, "the folder", follow_links)
    raw = read_bytes(file, "DCP metadata", most_metadata_bytes(sum(1 for _ in folder.glob("*.distcp"))))
    with as_seed_error(f"{file}: is not DCP metadata"):
        found = _Unpickler(raw, file).load()
    if not isinstance(found, _Record) or found.of != f"{dcp.__name__}.Metadata":
        what = found.of if isinstance(found, _Record) else type(found).__name__
        raise SeedError(f"{file}: is not DCP metadata but a pickled {what}")
    with as_seed_error(f"{file}: is malformed"):
        metadata = _metadata(found)
        for name in sorted(
            {require_plain_name(i.relative_path, k.fqn, file) for k, i in metadata.storage_data.items()}
        ):
            contained_file(folder, name, METADATA_NAME, follow_links)
    return raw, metadata


class _Unpickler(pickle._Unpickler):
    """Makes numbers, text, containers, dtypes and records; every other operation is refused.

    It is Python's implementation: in C's a damaged byte can ask for a memo of 2**32 entries, allocated at once.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _PLAIN)
    }
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, raw: bytes, file: Path) -> None:
        super().__init__(io.BytesIO(raw))
        self._file = file
        makers = pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.MARK, pickle.TUPLE1, pickle.MEMOIZE
        objects = sum(map(raw.count, makers))  # an upper bound, since these bytes may also be parts of text and numbers
        size = max(len(raw), MAX_METADATA_BYTES // 4)
        self._more_records = size // _BYTES_OF_A_RECORD
        if objects > (most := size // _BYTES_OF_AN_OBJECT):
            raise SeedError(f"{file}: up to {objects} objects; expected at most {most}")

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _DTYPES:
            return _DTYPES[full]
        if full in _NAMES:
            return _Name(full)
        raise self._asking_for(full)

    def _asking_for(self, name: str) -> SeedError:
        asks = f"{self._file}: asks for {ascii(name)[1:-1]:.200}"
        return SeedError(f"{asks}; a checkpoint has no use for it, so this one is damaged or made to run code")

    def load_made(self) -> None:
        """Stands for calls of functions and classes, and new instances."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not _Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a {type(name).__name__} is called")
        if name.of == _GETATTR:
            if len(arguments) != 2 or arguments[0] != _Name(_MEMORY_FORMAT) or type(arguments[1]) is not str:
                raise self._asking_for(_GETATTR)
            name, arguments = arguments[0], arguments[1:]
        self._more_records -= 1
        if self._more_records < 0:
            raise pickle.UnpicklingError("more records than its bytes can be meant for")
        self.stack.append(_Record(name.of, arguments))

    def load_build(self) -> None:
        """Puts a state into a record, once; classes and everything else have none."""
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not _Record or record.state is not None:
            raise pickle.UnpicklingError(f"the state of a {type(record).__name__} is set")
        record.state = state

    def load_items(self) -> None:
        """Puts items into a dictionary; keys of other types, such as integers, can be made to collide."""
        items = self.pop_mark()
        if type(self.stack[-1]) is not dict or any(type(key) not in (str, _Record) for key in items[::2]):
            raise pickle.UnpicklingError("an item is set of what is no dictionary from names or records")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_item(self) -> None:
        """Puts one item into a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        if type(self.stack[-1]) is not dict or type(key) not in (str, _Record):
            raise pickle.UnpicklingError("an item is set of what is no dictionary from names or records")
        self.stack[-1][key] = value

    dispatch |= {pickle.SETITEM[0]: load_item, pickle.SETITEMS[0]: load_items}
    dispatch |= {pickle.REDUCE[0]: load_made, pickle.NEWOBJ[0]: load_made, pickle.BUILD[0]: load_build}


# -- records to torch's metadata: each function raises TypeError or ValueError if a record is not what it has to be ---


def _metadata(record: Any) -> dcp.Metadata:
    fields = _fields(record, dcp.Metadata)
    places = _dict(fields.get("storage_data") or {})
    storage = {_index(key): _storage_info(value) for key, value in places.items()}
    if len(storage) < len(places):
        raise ValueError("two entries are of the same piece of a tensor")
    entries: dict[str, Any] = {}
    pieces = 0
    for key, value in _dict(fields.get("state_dict_metadata")).items():
        try:
            entries[_text(key)] = entry = _entry(value, 2 * len(storage) + 1 - pieces)
        except (TypeError, ValueError) as e:
            raise type(e)(f"{_text(key)!r}: {e}") from e
        pieces += len(getattr(entry, "chunks", ()))
    paths = fields.get("planner_data")
    return dcp.Metadata(
        state_dict_metadata=entries,
        planner_data=None if paths is None else {_text(key): _path(path) for key, path in _dict(paths).items()},
        storage_data=storage,
        storage_meta=None,  # of the run that wrote it; of no use to a reader
        version=_optional(_text, fields.get("version")),
    )


def _entry(record: Any, max_pieces: int) -> dcp.TensorStorageMetadata | dcp.BytesStorageMetadata:
    if isinstance(record, _Record) and record.of == f"{dcp.__name__}.BytesStorageMetadata":
        _fields(record, dcp.BytesStorageMetadata)
        return dcp.BytesStorageMetadata()
    fields = _fields(record, dcp.TensorStorageMetadata)
    # Before they are looked at: one long list in the file may stand for the pieces of every tensor.
    if len(_typed(fields.get("chunks"), list)) > max_pieces:
        raise ValueError("no file for some of its pieces")
    chunks = [_fields(chunk, dcp.ChunkStorageMetadata) for chunk in fields["chunks"]]
    return dcp.TensorStorageMetadata(
        properties=_properties(fields.get("properties")),
        size=_size(fields.get("size")),
        chunks=[dcp.ChunkStorageMetadata(_size(c.get("offsets")), _size(c.get("sizes"))) for c in chunks],
    )


def _properties(record: Any) -> dcp.TensorProperties:
    """Only the dtype matters to a reader; torch has given up the other properties. From 2.15 on it adds strides."""
    state = record.state if isinstance(record, _Record) else None
    if type(state) is not tuple or len(state) not in (5, 6) or record.of != f"{dcp.__name__}.TensorProperties":
        raise TypeError(f"properties of a tensor are {_named(record)}")
    return dcp.TensorProperties(dtype=_typed(state[0], torch.dtype))


def _storage_info(record: Any) -> _StorageInfo:
    fields = _fields(record, _StorageInfo)
    place = [_natural(fields.get(name)) for name in ("offset", "length")]
    transforms = _typed(fields.get("transform_descriptors") or [], list, tuple)
    named = [_text(name) for name in transforms[:MAX_RANK]] or None
    return _StorageInfo(_text(fields.get("relative_path")), place[0], place[1], transform_descriptors=named)


def _index(record: Any) -> dcp.MetadataIndex:
    fields = _fields(record, dcp.MetadataIndex)
    offset, number = _optional(_size, fields.get("offset")), _optional(_natural, fields.get("index"))
    return dcp.MetadataIndex(_text(fields.get("fqn")), offset, number)


def _fields(record: Any, cls: type) -> dict[str, Any]:
    """Return the state of a record of ``cls``, all of whose fields the class has."""
    if not isinstance(record, _Record) or record.of != f"{cls.__module__}.{cls.__qualname__}" or record.arguments:
        raise TypeError(f"a {_named(record)} stands where a {cls.__name__} should be")
    state = _dict({} if record.state is None else record.state)
    if unknown := {*map(_text, state)} - {field.name for field in dataclasses.fields(cls)}:
        raise ValueError(f"{cls.__name__} has no field {min(unknown)!r}")
    return state


def _size(record: Any) -> torch.Size:
    values = record
    if isinstance(record, _Record) and record.of == "torch.Size" and len(record.arguments) == 1:
        (values,) = record.arguments
    if len(_typed(values, tuple, list)) > MAX_RANK:
        raise ValueError(f"{len(values)} dimensions; expected at most {MAX_RANK}")
    return torch.Size([_natural(n) for n in values])


def _path(value: Any) -> tuple[str | int, ...]:
    if len(_typed(value, tuple, list)) > _MAX_DEPTH:
        raise ValueError(f"a path of {len(value)} parts; expected at most {_MAX_DEPTH}")
    return tuple(part if type(part) is int else _text(part) for part in value)


def _dict(value: Any) -> dict[Any, Any]:
    return _typed(value, dict)


def _text(value: Any) -> str:
    if len(_typed(value, str)) > _MAX_NAME:  # before it is looked at: one string in the file may stand for many names
        raise ValueError(f"a name of {len(value)} characters; expected at most {_MAX_NAME}")
    value.encode()  # raises if it cannot be printed: a pickle may hold half of a surrogate pair
    return value


def _natural(value: Any) -> int:
    if _typed(value, int) < 0 or value >= 2**63:
        raise ValueError("a size or an offset is negative or beyond 64 bits")
    return value


def _optional(convert: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else convert(value)


def _typed(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise TypeError(f"a {_named(value)} stands where a {' or '.join(t.__name__ for t in types)} should be")
    return value


def _named(value: Any) -> str:
    return value.of if isinstance(value, (_Record, _Name)) else type(value).__name__
