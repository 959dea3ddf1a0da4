"""A Hugging Face folder of safetensors: one file, or several and an index; beside them the heads of an export."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.boxes import Box, full_box, inside
from flame_ext.seeding.sources.safe_files import MAX_JSON_BYTES, IndexedFiles, contained_file, parse_json
from flame_ext.seeding.sources.source import HEADS_FOLDER, Chunk, ReadBox, Source, TensorEntry

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# The names that safetensors gives to dtypes of whole bytes.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


class SafetensorsSource(Source):
    """See :func:`open_hf_safetensors`."""

    layout = "hf-safetensors"

    @contextmanager
    def open(self, file: Path) -> Iterator[ReadBox]:
        """Files are memory-mapped; a box is a view of the mapping until it is copied."""
        try:
            with safe_open(file, framework="pt") as reader:

                def read(entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
                    if not box:
                        return reader.get_tensor(entry.key)
                    return reader.get_slice(entry.key)[inside(box, chunk.box)]

                yield read
        except (SafetensorError, OSError) as e:
            raise SeedError(f"{file}: can not be read: {e}") from e


def open_hf_safetensors(folder: Path) -> SafetensorsSource:
    """Read the index and the headers. The index is authoritative: a file that it does not list is passed over.

    Raises:
        SeedError: a file is missing, a header does not describe its file, a key stands in two files, or the index and
            the files disagree.
    """
    indexed = IndexedFiles(folder, INDEX_NAME, SINGLE_NAME)
    files = dict(indexed.files)
    if (folder / HEADS_FOLDER / SINGLE_NAME).exists():
        files[f"{HEADS_FOLDER}/{SINGLE_NAME}"] = contained_file(folder, SINGLE_NAME, "the folder", HEADS_FOLDER)
    digest = hashlib.sha256(indexed.raw_index)
    entries: dict[str, TensorEntry] = {}
    names: dict[str, str] = {}
    for name, file in files.items():
        header, raw = read_header(file)
        digest.update(f"{name}\0{file.stat().st_size}\0".encode() + raw)
        for key, entry in header.items():
            if key in entries:
                raise SeedError(f"{folder}: key {key!r} stands in both {names[key]} and {name}; keep one")
            if name in indexed.files:
                indexed.require_place(key, name)
            entries[key], names[key] = entry, name
    indexed.require_all(entries)
    where = f"not in {INDEX_NAME}" if indexed.raw_index else f"beside {SINGLE_NAME}"
    stray = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in files)
    return SafetensorsSource(folder, entries, digest.hexdigest(), tuple(f"{name} ({where})" for name in stray))


def read_header(file: Path) -> tuple[dict[str, TensorEntry], bytes]:
    """Read and check one safetensors header; returns its entries and its raw bytes.

    Format: an 8-byte little-endian length, that many bytes of JSON, the data section, which the entries' byte ranges
    cover without gap or overlap (https://huggingface.co/docs/safetensors/index#format).

    Raises:
        SeedError: naming the file, and the key where there is one.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise SeedError(
                f"{file}: {size} bytes can not hold a header of {length} bytes: truncated or not safetensors; copy it again"
            )
        raw = stream.read(length)
    header = parse_json(raw, file, "header")
    entries = {key: _parse_entry(file, key, value) for key, value in header.items() if key != "__metadata__"}
    end = 0
    for entry in sorted(entries.values(), key=lambda e: (e.chunks[0].position, e.nbytes)):
        begin = entry.chunks[0].position
        if begin != end:
            raise SeedError(f"{file}: {entry.key!r} starts at byte {begin} of the data, expected {end}: damaged header")
        end += entry.nbytes
    if 8 + length + end != size:
        raise SeedError(
            f"{file}: has {size} bytes, its header describes {8 + length + end}: truncated or damaged; copy it again"
        )
    return entries, raw


def _parse_entry(file: Path, key: str, value: Any) -> TensorEntry:
    try:
        dtype_name, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
            raise ValueError("shape and data_offsets must be non-negative integers")
    except (TypeError, KeyError, ValueError) as e:
        raise SeedError(f"{file}: header entry {key!r} is malformed ({e}): damaged header") from e
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise SeedError(
            f"{file}: {key!r} has dtype {dtype_name!r}, which can not be seeded from: damaged header, or a quantised model "
            "(dequantise it first)"
        )
    chunk = Chunk(full_box(shape), file, begin)
    entry = TensorEntry(key, shape, _DTYPES[dtype_name], (chunk,))
    if end - begin != entry.nbytes:
        raise SeedError(
            f"{file}: {key!r} of shape {list(shape)} and dtype {dtype_name} needs {entry.nbytes} bytes, "
            f"its range has {end - begin}: damaged header"
        )
    return entry
