"""The Python standard library's own sources as a small text corpus that every machine has.

The debug job has to run offline on any machine, so its text is read from the interpreter that runs it. Files are
assigned to a split by a hash of their relative path, so that the split is the same for every Python version: the
tiny model in ``tests/assets`` was trained from scratch on ``pretrain`` and never saw the other two.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["pretrain", "train", "validation"]

# Share of the files in each split, in tenths.
_SPLIT_OF_BUCKET: tuple[Split, ...] = ("pretrain",) * 7 + ("train",) * 2 + ("validation",)

# Not prose of the same kind: generated tables, bundled packages, and tests that distributions often leave out.
_SKIPPED_FOLDERS = {"__pycache__", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"}
_SKIPPED_FOLDERS |= {"dist-packages", "test", "tests", "turtledemo"}


def split_of(relative_path: str) -> Split:
    """The split that the file at ``relative_path`` (below the library's folder, with ``/``) belongs to."""
    return _SPLIT_OF_BUCKET[zlib.crc32(relative_path.encode()) % len(_SPLIT_OF_BUCKET)]


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # Not entered at all: site-packages alone may hold a hundred thousand files.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def read_stdlib(split: Split) -> list[str]:
    """The texts of one split, in the order of their paths.

    Raises:
        FileNotFoundError: if the interpreter has no readable standard library (a zipped one, for example).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(_sources(root)):
        if split_of(path.relative_to(root).as_posix()) == split:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                texts.append(text)
    if not texts:
        raise FileNotFoundError(
            f"no Python sources of split {split!r} below {root}; set training.dataset to another text"
        )
    return texts
