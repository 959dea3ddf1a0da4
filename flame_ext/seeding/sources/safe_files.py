"""Files of a source, opened with suspicion: names stay inside their folder, JSON is bounded and says each key once."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from flame_ext.errors import SeedError

# One of these is what the host's tokenizer is built from.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")

# Far above any real checkpoint's header or index; a larger length field means a damaged file, not a larger model.
MAX_JSON_BYTES = 100 * 2**20


def contained_file(root: Path, name: str, named_by: str, subfolder: str = "") -> Path:
    """The file ``name`` of ``root`` (or of a subfolder), which as a link has to stay inside ``root``.

    The one link that may leave is the Hub cache's own: ``models--org--name/snapshots/REVISION/FILE`` points into
    ``models--org--name/blobs``.

    Args:
        root: the source.
        name: a plain name, see :func:`require_plain_name`.
        named_by: what names it, for the message.
        subfolder: of ``root``, in which the file lies.

    Raises:
        SeedError: for an absent file and for a link that leaves the source.
    """
    file = root / subfolder / name
    if not file.exists():
        raise SeedError(f"{file}: listed in {named_by} but absent; download or copy it again")
    target, resolved_root = file.resolve(), root.resolve()
    snapshots = resolved_root.parent
    is_hub_cache = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    allowed = [resolved_root, snapshots.parent / "blobs"] if is_hub_cache else [resolved_root]
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise SeedError(f"{file}: is a link to {target}, outside the source; copy the file itself to its place")
    if not target.is_file():
        raise SeedError(f"{file}: is not a file")
    return file


def require_plain_name(name: object, key: str, named_by: Path) -> str:
    """``name`` as it is, if it names a file in the same folder.

    Raises:
        SeedError: for anything that could lead elsewhere.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise SeedError(f"{named_by}: {key!r} points to {name!r}; only plain file names in the same folder are read")
    return name


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; see :func:`parse_json`."""
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise SeedError(f"{file}: {size} bytes is no {what}; expected at most {MAX_JSON_BYTES}")
    return parse_json(file.read_bytes(), file, what)


def parse_json(raw: bytes, file: Path, what: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice.

    Raises:
        SeedError: naming ``file`` and ``what`` of it is wrong.
    """

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


def read_weight_map(index_file: Path) -> dict[str, str]:
    """Key to file name, as a Hugging Face index has it.

    Raises:
        SeedError: if there is none, or a file name is not plain.
    """
    weight_map = read_json(index_file, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SeedError(
            f"{index_file}: no 'weight_map' from keys to files; write the index anew with save_pretrained()"
        )
    for key, name in weight_map.items():
        require_plain_name(name, key, index_file)
    return weight_map


class IndexedFiles:
    """The files of a Hugging Face folder: those that its index lists, or the single one.

    Args:
        folder: the source.
        index_name: of the index, if there is one.
        single_name: of the file otherwise.

    Raises:
        SeedError: a file that is listed is absent, or lies elsewhere.
    """

    def __init__(self, folder: Path, index_name: str, single_name: str) -> None:
        self._index: Path | None = None
        self._weight_map: dict[str, str] = {}
        self.raw_index = b""
        names = [single_name]
        if (folder / index_name).exists():
            self._index = contained_file(folder, index_name, "the folder")
            self._weight_map = read_weight_map(self._index)
            self.raw_index = self._index.read_bytes()
            names = sorted(set(self._weight_map.values()))
        named_by = index_name if self._index is not None else "the folder"
        self.files = {name: contained_file(folder, name, named_by) for name in names}

    def require_place(self, key: str, name: str) -> None:
        """Raise unless ``key``, which the file ``name`` holds, is listed there."""
        if self._index is not None and self._weight_map.get(key) != name:
            raise SeedError(
                f"{self.files[name]}: holds key {key!r}, which {self._index.name} puts in {self._weight_map.get(key)!r}; write "
                "the index anew"
            )

    def require_all(self, keys: Container[str]) -> None:
        """Raise unless every key that is listed is in ``keys``."""
        for key, name in self._weight_map.items():
            if key not in keys:
                raise SeedError(f"{self._index}: lists {key!r} in {name}, which does not hold it")


def listing(folder: Path) -> str:
    """A few names of what is in a folder, for a message."""
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
