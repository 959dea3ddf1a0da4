"""Finds a source in an object store: small files and the headers of weights are copied to this machine, weights stay where they are.

In ``HF_HOME/flame_ext`` a source has a folder of its own, named after its URL and after what the store says of its objects:
``source/`` has the files that transformers and tokenizers read, ``headers/`` the first bytes of each safetensors file, and
``objects.json`` the size and the mark of every object. Weights are read from the store by ranges (remote_weights.py).
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from flame_ext.distributed import failing_together, gathered
from flame_ext.errors import SeedError
from flame_ext.files import write_json
from flame_ext.object_stores import filesystem, mark_of, patiently
from flame_ext.seeding.sources import safe_files
from flame_ext.seeding.sources.dcp_metadata import METADATA_NAME, most_metadata_bytes
from flame_ext.seeding.sources.hf_safetensors import INDEX_NAME, SINGLE_NAME
from flame_ext.seeding.sources.source import HEADS_FOLDER

logger = logging.getLogger()  # torchtitan's, as in hub.py

_OBJECTS_NAME = "objects.json"
_HEADS = f"{HEADS_FOLDER}/{SINGLE_NAME}"
_SMALL_FILES = (
    *("config.json", "config.[0-9]*.json", "generation_config.json", "adapter_config.json", "*.py"),
    *(INDEX_NAME, METADATA_NAME, f"{HEADS_FOLDER}/config.json"),
)
_OF_TOKENIZER = (
    *(*safe_files.TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("merges.txt", "chat_template.jinja"),
)
_WEIGHTS = ("*.safetensors", "*.distcp", _HEADS)
REQUESTS = 16  # at a time, of a rank


@dataclass(frozen=True)
class Store:
    """The objects of a source, by their names below its URL."""

    url: str
    sizes: Mapping[str, int]
    marks: Mapping[str, str]  # which change with the content

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return filesystem(self.url, SeedError)

    @property
    def requests(self) -> int:
        """How many may be under way: one where fsspec's file system may not be one for threads."""
        return REQUESTS if getattr(self._opened[0], "async_impl", False) else 1

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return a range of bytes of an object; raise SeedError."""
        if begin == end:
            return b""  # for which HTTP has no range
        files, root = self._opened
        what = f"{self.url}/{name}"
        raw: bytes = patiently(what, lambda: files.cat_file(f"{root}/{name}", start=begin, end=end), SeedError)
        if len(raw) != end - begin:
            raise SeedError(
                f"{what}: bytes {begin} to {end} were asked for, {len(raw)} came: the object has changed; start again"
            )
        return raw

    def require_unchanged(self, name: str) -> None:
        """Raise SeedError if an object is another than when the source was found."""
        files, root = self._opened
        what = f"{self.url}/{name}"
        info = patiently(what, lambda: files.info(f"{root}/{name}"), SeedError)
        now, then = (info["size"], mark_of(info)), (self.sizes[name], self.marks[name])
        if now != then:
            raise SeedError(
                f"{what}: has changed while it was read (size and mark were {then}, are {now}); start again"
            )


def located(url: str, with_tokenizer: bool) -> Path:
    """Return the folder of this machine that stands for a source in an object store; :func:`open_source` takes it. Collective.

    The first process of each node copies what is needed. Raises SeedError on all ranks, also if nodes find different objects.
    """
    found = ""
    with failing_together(SeedError):
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            found = str(copied(url, with_tokenizer).relative_to(_root()))
    places = {place for place in gathered(found) if place}
    with failing_together(SeedError):
        if len(places) > 1:
            raise SeedError(f"{url}: has changed while it was looked at, and nodes see different objects; start again")
        folder = _root() / places.pop()
        if not folder.is_dir():
            raise SeedError(
                f"{url}: the node's first process has copied it to another HF_HOME; give all ranks of a node the same"
            )
    logger.info(f"{url} is read by ranges; its small files are in {folder}")
    return folder


def copied(url: str, with_tokenizer: bool) -> Path:
    """Copy small files and headers, unless that was done before for the same objects; return their folder. Raises SeedError."""
    url = url.rstrip("/")
    small = _SMALL_FILES + (_OF_TOKENIZER if with_tokenizer else ())
    store = _listed(url, (*small, *_WEIGHTS))
    described = {"url": url, "sizes": store.sizes, "marks": store.marks}
    digest = hashlib.sha256(json.dumps([described, with_tokenizer], sort_keys=True).encode()).hexdigest()
    place = _root() / re.sub(r"[^\w.-]+", "-", url)[-100:].lstrip(".") / digest[:16]
    if place.is_dir():
        if _is_whole(place, store, small):
            return place / "source"
        shutil.rmtree(place, ignore_errors=True)  # something tidied up files, and left others
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
    try:

        def copy(name: str) -> None:
            if _matches(name, small):
                _write(temporary / "source" / name, store.read(name, 0, _size_of_small(store, name)))
            elif name.endswith(".safetensors"):
                _write(temporary / "headers" / name, _header(store, name))

        (temporary / "source").mkdir()
        with ThreadPoolExecutor(store.requests) as pool:
            list(pool.map(copy, store.sizes))
        if _listed(url, (*small, *_WEIGHTS)) != store:
            raise SeedError(f"{url}: objects have changed while their headers were read; start again")
        write_json(temporary / _OBJECTS_NAME, described)
        try:
            temporary.rename(place)
        except OSError:  # another node, on a file system that both have, was faster
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place / "source"


def store_of(folder: Path) -> Store | None:
    """Return the store that a folder stands for; None for a folder that :func:`located` has not made."""
    if folder.name != "source" or not folder.is_relative_to(_root()):  # a source of others might name any store
        return None
    return Store(**safe_files.read_json(folder.parent / _OBJECTS_NAME, "list of objects"))


@contextmanager
def stand_in(store: Store, folder: Path) -> Iterator[Path]:
    """Lay out the source as a folder whose files of weights have the right sizes and headers, and no weights, so that it is checked
    as any other; it is gone afterwards. Its place in messages is replaced by the URL.
    """
    with tempfile.TemporaryDirectory(prefix="flame_ext-") as name:
        place = Path(name).resolve() / "source"
        shutil.copytree(folder, place)
        for weights, size in store.sizes.items():
            if _matches(weights, _WEIGHTS):
                header = folder.parent / "headers" / weights
                _write(place / weights, header.read_bytes() if header.exists() else b"", size)
        try:
            yield place
        except SeedError as e:
            raise SeedError(str(e).replace(str(place), store.url)) from e


def _is_whole(place: Path, store: Store, small: tuple[str, ...]) -> bool:
    """Whether a folder has all that was copied of a store."""
    headers = [place / "headers" / name for name in store.sizes if name.endswith(".safetensors")]
    sizes = {place / "source" / name: size for name, size in store.sizes.items() if _matches(name, small)}
    return all(file.is_file() for file in (place / _OBJECTS_NAME, *headers)) and all(
        file.is_file() and file.stat().st_size == size for file, size in sizes.items()
    )


def _listed(url: str, patterns: tuple[str, ...]) -> Store:
    """The objects that are a source's by their names; raises SeedError if nothing is there, or no folder."""
    files, root = filesystem(url, SeedError)
    root = root.rstrip("/")
    found: list[dict[str, Any]] = patiently(url, lambda: files.ls(root, detail=True), SeedError)
    if any(info["name"].strip("/") == root.strip("/") and info["type"] == "file" and info["size"] for info in found):
        raise SeedError(f"{url}: is an object; name the folder that it is in")
    named = {info["name"].rstrip("/").rsplit("/", 1)[-1]: info for info in found}
    if named.get(HEADS_FOLDER, {}).get("type") == "directory":
        place = f"{root}/{HEADS_FOLDER}"
        heads: list[dict[str, Any]] = patiently(url, lambda: files.ls(place, detail=True), SeedError)
        named |= {f"{HEADS_FOLDER}/{info['name'].rsplit('/', 1)[-1]}": info for info in heads}
    chosen = {name: info for name, info in sorted(named.items()) if info["type"] == "file" and _matches(name, patterns)}
    for name, info in chosen.items():
        if not isinstance(info["size"], int):
            raise SeedError(f"{url}/{name}: the store does not tell its size; copy the folder to a file system")
        if not mark_of(info):
            raise SeedError(f"{url}/{name}: the store does not tell when it changes; copy the folder to a file system")
    if not any(name.endswith((".safetensors", ".distcp")) and "/" not in name for name in chosen) and any(
        name.endswith(".bin") for name in named
    ):
        raise SeedError(
            f"{url}: holds only .bin files, which are pickles and not read from a store; convert them once, with from_pretrained() "
            "and save_pretrained(), to safetensors"
        )
    return Store(url, {n: info["size"] for n, info in chosen.items()}, {n: mark_of(i) for n, i in chosen.items()})


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a plain name, or that of a file in the folder of heads, is as one of the patterns, which are of the same folder."""
    *folders, own = name.split("/")
    same = [pattern for pattern in patterns if pattern.count("/") == len(folders)]
    return safe_files.is_plain_name(own) and any(fnmatch(name, pattern) for pattern in same)


def _size_of_small(store: Store, name: str) -> int:
    """The size of a file that is copied whole; raises SeedError if it is too large for what it is."""
    limit = safe_files.LARGEST.get(name, safe_files.MAX_JSON_BYTES)
    if name == METADATA_NAME:
        limit = most_metadata_bytes(sum(name.endswith(".distcp") for name in store.sizes))
    if (size := store.sizes[name]) > limit:
        raise SeedError(f"{store.url}/{name}: {size} bytes is no model's file; expected at most {limit}")
    return size


def _header(store: Store, name: str) -> bytes:
    """A safetensors file up to its first tensor, or less if it cannot be one, which the check of headers then says."""
    begin = store.read(name, 0, min(8, store.sizes[name]))
    length = min(int.from_bytes(begin, "little"), store.sizes[name] - len(begin))
    return begin if length > safe_files.MAX_JSON_BYTES or not length else begin + store.read(name, 8, 8 + length)


def _write(file: Path, content: bytes, size: int | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(content)
        if size is not None:
            stream.truncate(size)


def _root() -> Path:
    return (Path(constants.HF_HOME) / "flame_ext").resolve()
