"""What lies at ``checkpoint.initial_load_path``, from headers alone: keys, shapes, dtypes, files. No weight is read here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flame_ext.errors import SeedError

HEADS_FOLDER = "future_heads"  # of an export: the heads beside the backbone (checkpoint/export.py)
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# The names that safetensors gives the dtypes a weight can be seeded from.
SOURCE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Far above any real checkpoint's header or index; a larger length field means a damaged file, not a larger model.
_MAX_JSON_BYTES = 100 * 2**20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its file's header describes it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int
    """Of the first byte, from the start of the file's data section: the order in which to read."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A folder of weights that can be seeded from."""

    path: Path
    layout: str
    """As in the report: "hf-safetensors"."""
    entries: Mapping[str, TensorEntry]
    digest: str
    """SHA-256 over names, sizes and headers of its files and the index: identifies the source without reading weights."""
    passed_over: tuple[str, ...]
    """Weight files in the folder that the index does not list."""


def open_source(path: str | Path) -> Source:
    """Read the index and the headers of a Hugging Face folder of safetensors, with the heads of an export if it is one.

    Raises:
        SeedError: the folder or a file is missing, a header does not describe its file, a key stands in two files, the
            index and the files disagree, or a dtype can not be seeded from.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise SeedError(f"checkpoint.initial_load_path {str(folder)!r} {what}; give a Hugging Face model folder")
    if not (folder / "config.json").is_file():
        raise SeedError(
            f"{folder}: no config.json, so this is not a Hugging Face model folder (found: {_listing(folder)})"
        )
    index_file = folder / INDEX_NAME
    digest = hashlib.sha256()
    weight_map: dict[str, str] | None = None
    if index_file.is_file():
        weight_map = _read_index(index_file)
        digest.update(index_file.read_bytes())
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    else:
        raise SeedError(
            f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} (found: {_listing(folder)}); save the model with "
            "save_pretrained() as safetensors"
        )
    heads = f"{HEADS_FOLDER}/{SINGLE_NAME}"
    if (folder / heads).is_file():
        names.append(heads)
    entries: dict[str, TensorEntry] = {}
    for name in names:
        file = folder / name
        header, raw = read_header(file)
        digest.update(f"{name}\0{file.stat().st_size}\0".encode() + raw)
        for key, entry in header.items():
            if key in entries:
                raise SeedError(f"{folder}: key {key!r} stands in both {entries[key].file.name} and {name}; keep one")
            if weight_map is not None and name != heads and weight_map.get(key) != name:
                raise SeedError(
                    f"{file}: holds key {key!r}, which {INDEX_NAME} puts in {weight_map.get(key)!r}; write the index anew"
                )
            entries[key] = entry
    if weight_map is not None:
        absent = sorted(set(weight_map) - set(entries))
        if absent:
            raise SeedError(f"{index_file}: lists {absent[0]!r} in {weight_map[absent[0]]}, which does not hold it")
    stray = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in names)
    return Source(folder, "hf-safetensors", entries, digest.hexdigest(), tuple(stray))


def read_header(file: Path) -> tuple[dict[str, TensorEntry], bytes]:
    """Read and check one safetensors header; returns its entries and its raw bytes.

    Format: an 8-byte little-endian length, that many bytes of JSON, the data section, which the entries' byte ranges
    cover without gap or overlap (https://huggingface.co/docs/safetensors/index#format).

    Raises:
        SeedError: naming the file, and the key where there is one.
    """
    if not file.is_file():
        raise SeedError(f"{file}: listed in {INDEX_NAME} but absent; download or copy it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_JSON_BYTES):
            raise SeedError(
                f"{file}: {size} bytes can not hold a header of {length} bytes: truncated or not safetensors; copy it again"
            )
        raw = stream.read(length)
    header = _parse_json(raw, file, "header")
    entries = {}
    for key, value in header.items():
        if key != "__metadata__":
            entries[key] = _parse_entry(file, key, value)
    end = 0
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise SeedError(
                f"{file}: {entry.key!r} starts at byte {entry.offset} of the data, expected {end}: damaged header"
            )
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
    if dtype_name not in SOURCE_DTYPES:
        raise SeedError(
            f"{file}: {key!r} has dtype {dtype_name!r}; only unquantised weights can be seeded from "
            f"({', '.join(SOURCE_DTYPES)}): dequantise the model first"
        )
    entry = TensorEntry(key, shape, SOURCE_DTYPES[dtype_name], file, begin)
    if end - begin != entry.nbytes:
        raise SeedError(
            f"{file}: {key!r} of shape {list(shape)} and dtype {dtype_name} needs {entry.nbytes} bytes, "
            f"its range has {end - begin}: damaged header"
        )
    return entry


def _read_index(index_file: Path) -> dict[str, str]:
    if index_file.stat().st_size > _MAX_JSON_BYTES:
        raise SeedError(
            f"{index_file}: {index_file.stat().st_size} bytes is no index; expected at most {_MAX_JSON_BYTES}"
        )
    weight_map = _parse_json(index_file.read_bytes(), index_file, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SeedError(
            f"{index_file}: no 'weight_map' from keys to files; write the index anew with save_pretrained()"
        )
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise SeedError(
                f"{index_file}: {key!r} points to {name!r}; only plain file names in the same folder are read"
            )
    return weight_map


def _parse_json(raw: bytes, file: Path, what: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            keys = [key for key, _ in pairs]
            raise SeedError(f"{file}: key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in its {what}")
        return seen

    try:
        value = json.loads(raw, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as e:
        raise SeedError(f"{file}: its {what} is not valid JSON ({e}): damaged file; copy it again") from e
    if not isinstance(value, dict):
        raise SeedError(f"{file}: its {what} is not a JSON object: damaged file; copy it again")
    return value


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
