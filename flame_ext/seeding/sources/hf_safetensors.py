"""Reads Hugging Face folders: one file of weights, or several with an index or the numbers of a complete set in their names."""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.sources import safe_files
from flame_ext.seeding.sources.boxes import Box, full_box, inside
from flame_ext.seeding.sources.source import HEADS_FOLDER, Chunk, ReadBox, Source, TensorEntry

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Reads one file: key to its tensor, or to None where it is none, and what the digest covers beside name and size.
ReadFile = Callable[[Path], tuple[Mapping[str, TensorEntry | None], bytes]]
S = TypeVar("S", bound=Source)

# The names that safetensors gives to dtypes of whole bytes.
_DTYPES: dict[str, Any] = {**_TYPES, "F8_E8M0": torch.float8_e8m0fnu}


class SafetensorsSource(Source):
    @property
    def is_stock(self) -> bool:
        # from_pretrained does not read numbered files without an index.
        return any((self.path / name).exists() for name in (SINGLE_NAME, INDEX_NAME))

    def independent_state(self, stored: Collection[TensorEntry]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for file, keys in keys_by_file(stored).items():
            with safe_files.as_seed_error(f"{file}: cannot be read"), safe_open(file, framework="pt") as reader:
                state |= {key: reader.get_tensor(key) for key in keys}
        return state

    @contextmanager
    def open(self, file: Path) -> Iterator[ReadBox]:
        with safe_files.as_seed_error(f"{file}: cannot be read"), safe_open(file, framework="pt") as reader:

            def read(entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
                key = entry.key
                return reader.get_slice(key)[inside(box, chunk.box)] if box else reader.get_tensor(key)

            yield read


def keys_by_file(stored: Collection[TensorEntry]) -> dict[Path, list[str]]:
    """Return the files of tensors that lie in one piece, each with its keys."""
    files: dict[Path, list[str]] = defaultdict(list)
    for entry in stored:
        files[entry.chunks[0].file].append(entry.key)
    return files


def read_folder(
    kind: type[S],
    folder: Path,
    index_name: str,
    single_name: str,
    read: ReadFile,
    beside: Sequence[str] = (),
    follow_links: bool = False,
) -> S:
    """Describe a folder of safetensors or ``.bin`` files and the files ``beside``: as in ``from_pretrained``, its single file comes
    before the files of an index. Where there is neither, its numbered files are read.

    Raises SeedError if a file is absent, a key stands in two files, or in another than the index says.
    """
    index, single = folder / index_name, folder / single_name
    indexed = index.exists() and not single.exists()
    weight_map = safe_files.read_weight_map(index, follow_links) if indexed else {}
    named_by = index_name if weight_map else "the folder"
    names = sorted({*weight_map.values()})
    if not indexed:
        names = [single_name] if single.exists() else numbered_files(folder, single_name)
    files = {name: safe_files.contained_file(folder, name, named_by, follow_links) for name in names}
    files |= {name: safe_files.contained_file(folder, name, "the folder", follow_links) for name in beside}
    entries: dict[str, TensorEntry] = {}
    objects: dict[str, Path] = {}
    places: dict[str, str] = {}
    digest = hashlib.sha256(index.read_bytes() if indexed else b"")
    for name, file in files.items():
        tensors, header = read(file)
        digest.update(f"{name}\0{file.stat().st_size}\0".encode() + header)
        for key in tensors:
            if key in places:
                raise SeedError(f"{folder}: key {key!r} stands in both {places[key]} and {name}; keep one")
            if weight_map and name in names and weight_map.get(key) != name:
                other = f"{index_name} puts in {weight_map.get(key)!r}"
                raise SeedError(f"{file}: holds key {key!r}, which {other}; write the index anew")
            places[key] = name
        entries |= {key: entry for key, entry in tensors.items() if entry is not None}
        objects |= {key: file for key, entry in tensors.items() if entry is None}
    unheld = [key for key in weight_map if key not in places]
    where = f"not in {index_name}" if weight_map else f"beside {names[0]}"
    ending = single_name.split(".")[-1]
    stray = [f"{p.name} ({where})" for p in sorted(folder.glob(f"*.{ending}")) if p.name not in files]
    if unheld:  # from_pretrained takes what the files hold
        stray.append(f"{safe_files.some(map(repr, unheld))}, which {index_name} lists and no file holds")
    if index.exists() and not indexed:
        stray.append(f"{index_name} ({single_name} comes first, as in from_pretrained)")
    return kind(folder, entries, digest.hexdigest(), tuple(stray), objects, f"hf-{ending}", follow_links=follow_links)


def numbered_files(folder: Path, single_name: str) -> list[str]:
    """Return the names ``model-00001-of-0000N.safetensors`` and so on in a folder; raise SeedError unless all N or none are there."""
    stem, ending = single_name.split(".", 1)
    matches = [re.fullmatch(rf"{stem}-(\d{{5}})-of-(\d{{5}})\.{ending}", file.name) for file in folder.iterdir()]
    found = sorted(match[0] for match in matches if match)
    counts = {int(match[2]) for match in matches if match}
    expected = [f"{stem}-{i:05d}-of-{n:05d}.{ending}" for n in counts for i in range(1, min(n, 10**4) + 1)]
    if len(counts) > 1 or set(found) != set(expected):
        absent = safe_files.some(set(expected) - {*found})
        raise SeedError(
            f"{folder}: has neither {single_name} nor {single_name}.index.json, and its numbered files are no complete set "
            f"(found: {safe_files.some(found)}; absent: {absent}); copy what is absent, and leave one set there"
        )
    return found


def open_hf_safetensors(folder: Path, follow_links: bool = False) -> SafetensorsSource:
    """Read the index and headers, those of an export's heads too; may raise SeedError."""
    heads = [name for name in (f"{HEADS_FOLDER}/{SINGLE_NAME}",) if (folder / name).exists()]
    return read_folder(SafetensorsSource, folder, INDEX_NAME, SINGLE_NAME, read_header, heads, follow_links)


def read_header(file: Path) -> tuple[dict[str, TensorEntry], bytes]:
    """Check a safetensors file by its header; returns its entries and the header's raw bytes. May raise SeedError.

    safetensors checks all but two things, which are refused here: two entries for one key, and dtypes of less than a byte.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        raw = stream.read(min(size, safe_files.MAX_JSON_BYTES))
    header = {}
    if size <= file.stat().st_size - 8:  # else it is truncated, which safetensors says
        header = _bounded(raw, size, file)
    try:
        with safe_open(file, framework="pt") as reader:
            slices = {key: reader.get_slice(key) for key in reader.offset_keys()}
            found = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as e:
        raise SeedError(
            f"{file}: has {file.stat().st_size} bytes, an error{_wrong_entry(raw, file)}: {e}: truncated or damaged; copy it again"
        ) from e
    entries = {}
    for key, (dtype, shape) in found.items():
        if dtype not in _DTYPES:
            raise SeedError(
                f"{file}: {key!r} has dtype {dtype!r}, which cannot be seeded from: dequantise the model, or copy a damaged file again"
            )
        begin, end = header[key]["data_offsets"]
        chunk = Chunk(full_box(shape), file, 8 + size + begin, end - begin)
        entries[key] = TensorEntry(key, shape, _DTYPES[dtype], (chunk,))
    return entries, raw


def _bounded(raw: bytes, size: int, file: Path) -> dict[str, Any]:
    """Return a header; raise SeedError if it would take long, or much memory, or has a key twice, before safetensors reads it."""
    if size > safe_files.MAX_JSON_BYTES:
        raise SeedError(f"{file}: {size} bytes is no header; expected at most {safe_files.MAX_JSON_BYTES}")
    header = safe_files.parse_json(raw, file, "header")
    for key, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) > safe_files.MAX_RANK:
            raise SeedError(f"{file}: {key!r} has {len(shape)} dimensions; expected at most {safe_files.MAX_RANK}")
    return header


def _wrong_entry(raw: bytes, file: Path) -> str:
    """Name the first entry that is wrong by itself, since safetensors' messages do not."""
    with suppress(SeedError):
        for key, entry in safe_files.parse_json(raw, file, "header").items():
            try:
                begin, end = entry["data_offsets"]
                whole = all(type(n) is int for n in entry["shape"])
                right = whole and math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize == end - begin
            except (TypeError, KeyError, ValueError):
                right = key == "__metadata__"
            if not right:
                return f" in {key!r}"
    return ""
