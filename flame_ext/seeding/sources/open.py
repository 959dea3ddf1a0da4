"""Recognises a source's layout from its folder."""

from pathlib import Path

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.dcp import open_dcp
from flame_ext.seeding.sources.dcp_metadata import METADATA_NAME
from flame_ext.seeding.sources.hf_bin import BIN_INDEX_NAME, BIN_NAME, open_hf_bin
from flame_ext.seeding.sources.hf_safetensors import INDEX_NAME, SINGLE_NAME, numbered_files, open_hf_safetensors
from flame_ext.seeding.sources.remote import stand_in, store_of
from flame_ext.seeding.sources.remote_weights import remote
from flame_ext.seeding.sources.safe_files import require_contained, some
from flame_ext.seeding.sources.source import Source


def open_source(path: str | Path, allow_pickle: bool = False, follow_links: bool = False) -> Source:
    """Read index and headers of a Hugging Face folder (safetensors or, with ``allow_pickle``, ``.bin``) or a DCP checkpoint, or of
    the one in an object store that the folder stands for (:func:`hub.locate`).

    Raises SeedError if the folder has no known layout, or two, its files contradict each other, or, without ``follow_links``, a
    file that is read is a link out of the folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise SeedError(
            f"checkpoint.initial_load_path {str(folder)!r} {what}; give a Hugging Face folder, a DCP checkpoint, hf://org/name or a URL "
            "of an object store (s3://, gs://)"
        )
    if (store := store_of(folder)) is not None:
        with stand_in(store, folder) as place:
            return remote(open_source(place), place, folder, store)
    require_contained(folder, follow_links)
    has_safetensors = any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME))
    has_weights = has_safetensors or any((folder / name).exists() for name in (BIN_INDEX_NAME, BIN_NAME))
    if not has_weights:
        has_weights = has_safetensors = bool(numbered_files(folder, SINGLE_NAME))
    if (folder / METADATA_NAME).exists():
        if has_weights:
            raise SeedError(
                f"{folder}: holds a DCP checkpoint ({METADATA_NAME}) and Hugging Face weights; move one of them away"
            )
        return open_dcp(folder, follow_links)
    found = f"(found: {some(p.name for p in folder.iterdir())})"
    if (folder / "adapter_config.json").exists():
        raise SeedError(
            f"{folder}: holds an adapter (adapter_config.json), which from_pretrained would add to the model: merge it into its base "
            "with peft's merge_and_unload() and save the result; or, to go on from the base without it, move the adapter away"
        )
    if has_weights:
        if not (folder / "config.json").exists():
            raise SeedError(f"{folder}: no config.json, so this is not a Hugging Face model folder {found}")
        if has_safetensors:
            return open_hf_safetensors(folder, follow_links)
        return open_hf_bin(folder, allow_pickle, follow_links)
    if steps := [p.name for p in folder.glob("step-*") if (p / METADATA_NAME).exists()]:
        raise SeedError(f"{folder}: holds checkpoints ({some(steps)}); name one of them")
    if any(folder.glob("*.distcp")):
        raise SeedError(
            f"{folder}: DCP files without {METADATA_NAME}, which is written last: the save did not finish; take another step"
        )
    raise SeedError(
        f"{folder}: no weights: neither {SINGLE_NAME} nor {INDEX_NAME}, {BIN_NAME}, {BIN_INDEX_NAME} or {METADATA_NAME} "
        f"{found}; save the model with save_pretrained() as safetensors"
    )
