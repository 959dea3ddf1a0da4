"""Sources of data in an object store give the batches of the same files in a folder, in the same order, also after a break."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import datasets
import pytest
import torch

from flame_ext import object_stores
from flame_ext.config.sections import DataSource
from flame_ext.data import documents
from flame_ext.errors import ConfigError
from flame_ext.object_stores import once
from tests.data.test_loader import position, resume
from tests.data.test_sources import (
    Maker,
    arrow,
    arrow_file,
    input_ids,
    job,
    jsonl,
    jsonl_gz,
    jsonl_zst,
    loaders,
    parquet,
    read,
    txt,
)
from tests.object_store import ObjectStore

MAKERS: list[Maker] = [jsonl, jsonl_gz, jsonl_zst, parquet, input_ids, arrow, arrow_file, txt]
QUICK = {(jsonl, True), (jsonl_zst, False), (parquet, True), (parquet, False)}
KINDS = [
    pytest.param(
        *kind,
        marks=[] if kind in QUICK else pytest.mark.matrix,
        id=f"{kind[0].__name__}-{'streamed' if kind[1] else 'mapped'}",
    )
    for kind in product(MAKERS, (False, True))
]


def stored(source: DataSource, folder: Path, store: ObjectStore) -> DataSource:
    """The source after its folder was uploaded."""
    return replace(source, path=source.path.replace(str(folder), store.put(folder, "corpus")))


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_DATASETS_OFFLINE=0: the datasets library else asks no store for Parquet and Arrow."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(("maker", "streaming"), KINDS)
def test_batches_are_those_of_the_folder(
    maker: Maker, streaming: bool, tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BLOCK", 8)  # several in a file
    local = replace(maker(tmp_path), streaming=streaming)
    source = stored(local, tmp_path, object_store)
    (reference,) = loaders(job(local), 1, 0)
    expected = read([reference], 4)
    (loader,) = loaders(job(source), 1, 0)
    assert object_store.asked, "it is read from the store"
    batches = read([loader], 2)
    saved = position([loader])
    again = loaders(job(source), 2, 0)  # on other ranks
    resume(again, saved)
    batches += read(again, 2)
    assert all(map(torch.equal, batches, expected))
    assert loader.layout == reference.layout


def test_workers_read_from_a_store(tmp_path: Path, object_store: ObjectStore) -> None:
    local = replace(jsonl(tmp_path), streaming=True)
    expected = read(loaders(job(local), 1, 0), 2)
    found = read(loaders(job(stored(local, tmp_path, object_store)), 1, 2), 2)
    assert all(map(torch.equal, found, expected))


def test_a_store_that_fails_in_the_middle_of_an_object_is_asked_again(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_stores, "_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr("s3fs.S3FileSystem.default_block_size", 2**20)  # what is read ahead, else 50 MiB
    content = random.Random(0).randbytes(8 * 2**20)
    (tmp_path / "a.jsonl").write_bytes(content)
    url = object_store.put(tmp_path / "a.jsonl")
    with object_stores.opened(url, ConfigError) as stream:
        begin = stream.read(1000)
        object_store.fail(8, name="a.jsonl")  # s3fs asks five times by itself
        assert begin + stream.read() == content
        assert sum(asked.status == 503 for asked in object_store.asked) == 8
        assert stream.seek(0) == 0
        object_store.fail(1000, name="a.jsonl")
        with pytest.raises(ConfigError, match=r"^s3://.*/a.jsonl: cannot be read \(.*\); check the network"), once():
            stream.read()


def test_a_stream_whose_seek_returns_nothing_is_read() -> None:
    class Silent(io.BytesIO):  # as that of sftp://
        def seek(self, offset: int, whence: int = io.SEEK_SET) -> None:  # type: ignore[override]
            super().seek(offset, whence)

    stream = io.BufferedReader(object_stores._Object("sftp://host/a", Silent(b"0123456789"), ConfigError), 4)
    assert (stream.seek(-3, io.SEEK_END), stream.read(), stream.seek(2), stream.read(3)) == (7, b"789", 2, b"234")


@pytest.mark.parametrize("ending", ["txt", "parquet"])
def test_a_changed_object_is_read_anew(ending: str, tmp_path: Path, object_store: ObjectStore) -> None:
    found = []
    for word in ("one", "two"):  # of one size
        file = tmp_path / f"a.{ending}"
        if ending == "txt":
            file.write_text(word)
        else:
            datasets.Dataset.from_dict({"text": [word]}).to_parquet(file)
        source = DataSource(object_store.put(file))
        found += read(loaders(job(source), 1, 0), 1)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/tokens/*.npy", "flat files of tokens are memory-mapped; copy them to a file system"),
        ("/nothing", "no object matches; files of documents end in .jsonl"),
        ("/mixed", "files of several kinds (1 of json, 1 of text)"),
        ("-absent/a.jsonl", "nothing is there (FileNotFoundError: The specified bucket does not exist)"),
    ],
)
def test_what_cannot_be_read_is_refused(path: str, message: str, tmp_path: Path, object_store: ObjectStore) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.txt").write_text("b")
    object_store.put(tmp_path, "mixed")
    with pytest.raises(ConfigError) as e:
        loaders(job(DataSource(f"{object_store.url}{path}")), 1, 0)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert str(e.value).startswith("data.sources[0]: ") and f"{object_store.url}{path}" in str(e.value)


def test_hidden_objects_are_passed_over_and_globs_are_the_stores(tmp_path: Path, object_store: ObjectStore) -> None:
    for name in ("a.txt", ".hidden.txt", ".folder/b.txt", "folder/c.txt", "other.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    from flame_ext.data.files import local_files

    url = object_store.put(tmp_path, "corpus")
    for pattern in ("", "/*.txt", "/*/*.txt", "/folder", "/a.txt", "/[ab].txt"):
        there = [file.removeprefix(url) for file in local_files(url + pattern, "text")]
        assert there == [file.removeprefix(str(tmp_path)) for file in local_files(str(tmp_path) + pattern, "text")]
