"""The S3 server of the tests is one to s3fs, records what it is asked for, and fails when it is told to."""

from __future__ import annotations

from pathlib import Path

import fsspec

from tests.object_store import ObjectStore


def test_the_server_records_and_fails(object_store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.bin").write_bytes(bytes(range(100)))
    url = object_store.put(tmp_path / "a")
    assert object_store.names == ["a/b/c.bin"]
    object_store.asked.clear()
    object_store.fail(2, name="c.bin")
    store, root = fsspec.url_to_fs(url)
    assert store.cat_file(f"{root}/b/c.bin", start=10, end=20) == bytes(range(10, 20))
    read = [(a.range, a.status, a.sent) for a in object_store.asked if a.method == "GET" and a.path.endswith("c.bin")]
    assert [status for _, status, _ in read] == [503, 503, 206]
    assert read[-1] == ("bytes=10-19", 206, 10)
