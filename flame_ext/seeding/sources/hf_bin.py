"""A Hugging Face folder of ``.bin`` files, which are pickles: read only where ``seed.allow_pickle`` says so."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.boxes import Box, full_box, inside
from flame_ext.seeding.sources.safe_files import IndexedFiles
from flame_ext.seeding.sources.source import Chunk, ReadBox, Source, TensorEntry

BIN_INDEX_NAME = "pytorch_model.bin.index.json"
BIN_NAME = "pytorch_model.bin"


class BinSource(Source):
    """See :func:`open_hf_bin`."""

    layout = "hf-bin"

    @contextmanager
    def open(self, file: Path) -> Iterator[ReadBox]:
        """Files are memory-mapped; a box is a view of the mapping until it is copied."""
        tensors = _load(file)

        def read(entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
            tensor = tensors.get(entry.key)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise SeedError(f"{file}: {entry.key!r} is not what it was a moment ago: the file has changed")
            return tensor[inside(box, chunk.box)]

        yield read


def open_hf_bin(folder: Path, allow_pickle: bool) -> BinSource:
    """Read the index and the structure of the files; tensors stay on disk.

    Raises:
        SeedError: not allowed; a file is missing, damaged or holds more than tensors' pickles; the index and the files
            disagree.
    """
    if not allow_pickle:
        raise SeedError(
            f"{folder}: holds only .bin files, which are pickles; convert them once, with from_pretrained() and "
            "save_pretrained(), to safetensors, or trust them with seed.allow_pickle = true (then read with weights_only)"
        )
    indexed = IndexedFiles(folder, BIN_INDEX_NAME, BIN_NAME)
    digest = hashlib.sha256(indexed.raw_index)
    entries: dict[str, TensorEntry] = {}
    objects: dict[str, Path] = {}
    for name, file in indexed.files.items():
        digest.update(f"{name}\0{file.stat().st_size}\0".encode() + _directory(file))
        for position, (key, tensor) in enumerate(_load(file).items()):
            if key in entries or key in objects:
                other = entries[key].place if key in entries else objects[key].name
                raise SeedError(f"{folder}: key {key!r} stands in both {other} and {name}; keep one")
            indexed.require_place(key, name)
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_quantized:
                shape = tuple(tensor.shape)
                entries[key] = TensorEntry(key, shape, tensor.dtype, (Chunk(full_box(shape), file, position),))
            else:
                objects[key] = file
    indexed.require_all({**entries, **objects})
    where = f"not in {BIN_INDEX_NAME}" if indexed.raw_index else f"beside {BIN_NAME}"
    stray = sorted(p.name for p in folder.glob("*.bin") if p.name not in indexed.files)
    return BinSource(folder, entries, digest.hexdigest(), tuple(f"{name} ({where})" for name in stray), objects)


def _load(file: Path) -> dict[str, Any]:
    if file.stat().st_size == 0:
        raise SeedError(f"{file}: 0 bytes: truncated; copy it again")
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # whatever a damaged pickle or archive makes of itself
        reason = " ".join(str(e).split())[:300]
        raise SeedError(
            f"{file}: can not be read as tensors alone, memory-mapped ({type(e).__name__}: {reason}); copy it again, or "
            "save the model anew as safetensors"
        ) from e
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise SeedError(f"{file}: holds a {type(tensors).__name__}, not a state dict from names to tensors")
    return tensors


def _directory(file: Path) -> bytes:
    """Names, sizes and checksums of the archive's records."""
    if not zipfile.is_zipfile(file):
        return b""  # an old or damaged file; reading it says what is wrong
    try:
        with zipfile.ZipFile(file) as archive:
            return repr([(r.filename, r.file_size, r.CRC) for r in archive.infolist()]).encode()
    except (zipfile.BadZipFile, OSError, ValueError) as e:
        raise SeedError(f"{file}: damaged archive ({e}); copy it again") from e
