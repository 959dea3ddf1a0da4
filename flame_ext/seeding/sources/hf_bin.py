"""Reads Hugging Face folders of ``.bin`` files, which are pickles, only if ``seed.allow_pickle`` is set."""

import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.boxes import Box, full_box, inside
from flame_ext.seeding.sources.hf_safetensors import keys_by_file, read_folder
from flame_ext.seeding.sources.safe_files import as_seed_error
from flame_ext.seeding.sources.source import Chunk, ReadBox, Source, TensorEntry

BIN_INDEX_NAME = "pytorch_model.bin.index.json"
BIN_NAME = "pytorch_model.bin"


class BinSource(Source):
    is_stock = True

    def independent_state(self, stored: Collection[TensorEntry]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for file, keys in keys_by_file(stored).items():
            tensors = _load(file)
            state |= {key: tensors[key] for key in keys}
        return state

    @contextmanager
    def open(self, file: Path) -> Iterator[ReadBox]:
        tensors = _load(file)

        def read(entry: TensorEntry, chunk: Chunk, box: Box) -> Tensor:
            return tensors[entry.key][inside(box, chunk.box)]

        yield read


def open_hf_bin(folder: Path, allow_pickle: bool, follow_links: bool = False) -> BinSource:
    """Read the index and the structure of the files; raise SeedError unless pickles are allowed and hold tensors alone."""
    if not allow_pickle:
        raise SeedError(
            f"{folder}: holds only .bin files, which are pickles; convert them once, with from_pretrained() and "
            "save_pretrained(), to safetensors, or trust them with seed.allow_pickle = true (then read with weights_only)"
        )
    return read_folder(BinSource, folder, BIN_INDEX_NAME, BIN_NAME, _read_structure, follow_links=follow_links)


def _read_structure(file: Path) -> tuple[dict[str, TensorEntry | None], bytes]:
    """Return the entries by key, and names, sizes and checksums of the archive's records."""
    directory = b""
    with as_seed_error(f"{file}: damaged archive"):
        if zipfile.is_zipfile(file):  # else it is old or damaged, and reading it says what is wrong
            with zipfile.ZipFile(file) as archive:
                directory = repr([(r.filename, r.file_size, r.CRC) for r in archive.infolist()]).encode()
    entries: dict[str, TensorEntry | None] = {}
    for position, (key, tensor) in enumerate(_load(file).items()):
        entries[key] = None
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_quantized:
            shape = tuple(tensor.shape)
            entries[key] = TensorEntry(key, shape, tensor.dtype, (Chunk(full_box(shape), file, position),))
    return entries, directory


def _load(file: Path) -> dict[str, Any]:
    if file.stat().st_size == 0:
        raise SeedError(f"{file}: 0 bytes: truncated; copy it again")
    remedy = "; copy it again, or save the model anew as safetensors"
    with as_seed_error(f"{file}: cannot be read as tensors alone, memory-mapped", remedy):
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise SeedError(f"{file}: holds a {type(tensors).__name__}, not a state dict from names to tensors")
    return tensors
