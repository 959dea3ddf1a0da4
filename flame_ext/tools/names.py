"""What a source is called without a trainer: its model's part under plain names."""

from __future__ import annotations

from pathlib import Path

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.dcp import DcpSource, in_noted_layout
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.sources.source import Source


def folder_of(path: str, allow_pickle: bool = False) -> Path:
    """The local folder of a path, as the trainer locates a source.

    Raises:
        SeedError: there is none.
    """
    folder, _ = locate(path, allow_pickle)
    if not folder.is_dir():
        found = f"is a file; name its folder, {folder.parent}" if folder.exists() else "does not exist"
        raise SeedError(f"{path}: {found}")
    return folder


def plain(source: Source) -> Source:
    """The model's part of a source: without what a trainer saves beside it, and without the nesting of its keys."""
    return in_noted_layout(source) if isinstance(source, DcpSource) else source
