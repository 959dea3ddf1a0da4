"""The sources of Python's standard library as a small text corpus, so that the debug job runs offline on any machine. A hash of
a file's relative path determines its split. The tiny model in ``tests/assets`` was trained on ``pretrain`` alone.
"""

import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["pretrain", "train", "validation"]

_SPLIT_OF_BUCKET: tuple[Split, ...] = ("pretrain",) * 7 + ("train",) * 2 + ("validation",)  # of each tenth of the files

# Generated tables, bundled packages, and tests that distributions often leave out.
_SKIPPED_FOLDERS = {"__pycache__", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"}
_SKIPPED_FOLDERS |= {"dist-packages", "test", "tests", "turtledemo"}


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # These folders are not even listed: site-packages alone may hold a hundred thousand files.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def read_stdlib(split: Split) -> list[str]:
    """Returns the texts of one split, in the order of their paths; FileNotFoundError if there are none (a zipped library)."""
    root, texts = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(_sources(root)):
        bucket = zlib.crc32(path.relative_to(root).as_posix().encode()) % len(_SPLIT_OF_BUCKET)
        if _SPLIT_OF_BUCKET[bucket] == split:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    if not (texts := [text for text in texts if text.strip()]):
        raise FileNotFoundError(
            f"no Python sources of split {split!r} below {root}; set training.dataset to another text"
        )
    return texts
