"""The layouts that a source can have. Which one it is, is read off the folder and never configured."""

from __future__ import annotations

from pathlib import Path

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.dcp import METADATA_NAME, open_dcp
from flame_ext.seeding.sources.hf_bin import BIN_INDEX_NAME, BIN_NAME, open_hf_bin
from flame_ext.seeding.sources.hf_safetensors import INDEX_NAME, SINGLE_NAME, open_hf_safetensors
from flame_ext.seeding.sources.safe_files import listing
from flame_ext.seeding.sources.source import Source


def open_source(path: str | Path, allow_pickle: bool = False) -> Source:
    """Recognise the layout of a folder and read its index and headers.

    Args:
        path: a Hugging Face folder (safetensors or, with ``allow_pickle``, ``.bin``), or a DCP checkpoint.
        allow_pickle: whether ``.bin`` files may be read (``seed.allow_pickle``).

    Raises:
        SeedError: nothing that is known lies there, or more than one thing, or its files contradict each other.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise SeedError(
            f"checkpoint.initial_load_path {str(folder)!r} {what}; give a Hugging Face model folder, a DCP checkpoint or "
            "hf://org/name"
        )
    has_safetensors = any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME))
    has_bin = any((folder / name).exists() for name in (BIN_INDEX_NAME, BIN_NAME))
    if (folder / METADATA_NAME).exists():
        if has_safetensors or has_bin:
            raise SeedError(
                f"{folder}: holds a DCP checkpoint ({METADATA_NAME}) and Hugging Face weights; move one of them to a folder "
                "of its own"
            )
        return open_dcp(folder)
    if has_safetensors or has_bin:
        if not (folder / "config.json").exists():
            raise SeedError(
                f"{folder}: no config.json, so this is not a Hugging Face model folder (found: {listing(folder)})"
            )
        return open_hf_safetensors(folder) if has_safetensors else open_hf_bin(folder, allow_pickle)
    steps = sorted(p.name for p in folder.glob("step-*") if (p / METADATA_NAME).exists())
    if steps:
        raise SeedError(f"{folder}: holds checkpoints ({', '.join(steps[:8])}); name one of them")
    if any(folder.glob("*.distcp")):
        raise SeedError(
            f"{folder}: DCP files without {METADATA_NAME}, which is written last: the save did not finish; take another step"
        )
    raise SeedError(
        f"{folder}: no weights: neither {SINGLE_NAME} nor {INDEX_NAME}, {BIN_NAME}, {BIN_INDEX_NAME} or {METADATA_NAME} "
        f"(found: {listing(folder)}); save the model with save_pretrained() as safetensors"
    )
