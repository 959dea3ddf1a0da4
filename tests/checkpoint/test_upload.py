"""Exports in an object store: in which order files go there, what is sent again, and what is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from flame_ext import object_stores
from flame_ext.checkpoint.upload import upload
from flame_ext.errors import CheckpointError
from flame_ext.object_stores import problem_of
from tests.object_store import SECRET_KEY, ObjectStore

FILES = {
    "README.md": "a card",
    "config.json": "{}",
    "future_heads/config.json": "{}",
    "future_heads/model.safetensors": "h" * 900,
    "model-00001-of-00002.safetensors": "1" * 1000,
    "model-00002-of-00002.safetensors": "2" * 1000,
    "model.safetensors.index.json": "{}",
    "tokenizer.json": "{}",
}
WEIGHTS = [name for name in FILES if name.endswith(".safetensors")]


def save(folder: Path, files: dict[str, str] = FILES, run: str = "run", digest: str = "first") -> Path:
    """An export as far as names, sizes and its record tell."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    sizes = {name: len(text) for name, text in files.items()}
    record = {"run": run, "step": int(folder.name.removeprefix("step-")), "files_sha256": digest, "files": sizes}
    (folder / "export.json").write_text(json.dumps(record))
    return folder


def put(object_store: ObjectStore) -> list[str]:
    """The names of files that were sent, in order."""
    return [a.path.partition("/step-4/")[2] for a in object_store.asked if a.method == "PUT" and a.status == 200]


def test_the_record_goes_first_and_what_makes_it_a_model_last(tmp_path: Path, object_store: ObjectStore) -> None:
    export = save(tmp_path / "step-4")
    said = upload(export, f"{object_store.url}/runs/one/")
    sent = put(object_store)
    assert sent[0] == "export.json" and sorted(sent[1:4]) == sorted(WEIGHTS)
    assert sent[-2:] == ["model.safetensors.index.json", "config.json"]
    assert sorted(sent) == sorted([*FILES, "export.json"])
    for name in (*FILES, "export.json"):
        assert object_store.get(f"runs/one/step-4/{name}") == (export / name).read_bytes()
    assert said == f"Uploaded 9 files (0.0 MiB) to {object_store.url}/runs/one/step-4; 0 were there"
    object_store.asked.clear()
    assert "Uploaded 0 files" in upload(export, f"{object_store.url}/runs/one") and put(object_store) == []


def test_an_upload_that_failed_goes_on(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_stores, "_WAITS", ())
    export = save(tmp_path / "step-4")
    object_store.fail(10**6, "PUT", "model-00002-of-00002.safetensors", status=400)
    with pytest.raises(CheckpointError, match="step-4: cannot be written"):
        upload(export, object_store.url)
    first = put(object_store)
    assert "config.json" not in first and f"step-4/{WEIGHTS[1]}" in object_store.names
    object_store.refuse = ObjectStore.refuse
    object_store.client.put_object(Bucket=object_store.bucket, Key=f"step-4/{WEIGHTS[1]}", Body=b"cut off")
    object_store.asked.clear()
    upload(export, object_store.url)
    assert set(put(object_store)) == {*FILES, "export.json"} - {*first} | {WEIGHTS[1]}
    assert object_store.get(f"step-4/{WEIGHTS[1]}") == (export / WEIGHTS[1]).read_bytes()


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, object_store: ObjectStore) -> None:
    object_store.fail(2, "PUT", "config.json")
    upload(save(tmp_path / "step-4"), object_store.url)
    assert object_store.get("step-4/config.json") == b"{}"


def test_another_export_of_the_step_replaces_it_wholly(tmp_path: Path, object_store: ObjectStore) -> None:
    upload(save(tmp_path / "step-4"), object_store.url)
    object_store.client.put_object(Bucket=object_store.bucket, Key="step-4/notes.txt", Body=b"a user's")
    other = {"config.json": "{}", "model.safetensors": "3" * 1000, "README.md": "A CARD"}
    object_store.asked.clear()
    upload(save(tmp_path / "again" / "step-4", other, digest="second"), object_store.url)
    assert object_store.names == sorted(f"step-4/{name}" for name in (*other, "export.json", "notes.txt"))
    assert object_store.get("step-4/README.md") == b"A CARD", "of the same size, and another"
    deleted = [a.path.partition("/step-4/")[2] for a in object_store.asked if a.method == "DELETE"]
    assert deleted[0] == "config.json" and deleted[-1] == "export.json", (
        "no model while it is replaced; what it was, till then"
    )


def test_an_export_that_is_replaced_meanwhile_does_not_become_a_model(
    tmp_path: Path, object_store: ObjectStore
) -> None:
    export = save(tmp_path / "step-4")

    def replace(request: object) -> None:
        if len(put(object_store)) == 3:
            save(export, digest="second")

    object_store.after = replace
    with pytest.raises(CheckpointError, match="step-4: was replaced while it was uploaded"):
        upload(export, object_store.url)
    object_store.after = ObjectStore.after
    assert "step-4/config.json" not in object_store.names
    upload(export, object_store.url)
    assert object_store.get("step-4/export.json") == (export / "export.json").read_bytes()


def test_what_is_not_of_the_run_stays(tmp_path: Path, object_store: ObjectStore) -> None:
    upload(save(tmp_path / "step-4"), object_store.url)
    with pytest.raises(CheckpointError, match="holds the export of another run, which stay"):
        upload(save(tmp_path / "other" / "step-4", run="other"), object_store.url)
    object_store.client.put_object(Bucket=object_store.bucket, Key="step-6/model.safetensors", Body=b"somebody's")
    with pytest.raises(CheckpointError, match="step-6 holds files that are no export"):
        upload(save(tmp_path / "step-6"), object_store.url)
    assert object_store.get("step-6/model.safetensors") == b"somebody's"
    for held in (b"not JSON", b'{"run": "run"}', b"\xff"):
        object_store.client.put_object(Bucket=object_store.bucket, Key="step-6/export.json", Body=held)
        with pytest.raises(CheckpointError, match="step-6 holds files that are no export"):
            upload(save(tmp_path / "step-6"), object_store.url)
    assert object_store.get("step-4/export.json") == (tmp_path / "step-4" / "export.json").read_bytes()


def test_a_folder_that_is_no_export_of_its_name_is_refused(tmp_path: Path, object_store: ObjectStore) -> None:
    save(tmp_path / "step-4").rename(tmp_path / "step-5")
    with pytest.raises(CheckpointError, match="step-5: its export.json does not fit"):
        upload(tmp_path / "step-5", object_store.url)
    (tmp_path / "private").write_text("a key")
    for name in ("../private", str(tmp_path / "private")):
        export = save(tmp_path / "step-4", {"config.json": "{}"})
        record = json.loads((export / "export.json").read_text())
        (export / "export.json").write_text(json.dumps(record | {"files": {name: 5}}))
        with pytest.raises(CheckpointError, match="step-4: its export.json does not fit"):
            upload(export, object_store.url)
    with pytest.raises(CheckpointError, match="absent: its export.json cannot be read"):
        upload(tmp_path / "absent", object_store.url)
    assert object_store.names == []


@pytest.mark.matrix
def test_a_killed_command_goes_on(tmp_path: Path, object_store: ObjectStore) -> None:
    export = save(tmp_path / "step-4")
    command = [sys.executable, "-m", "flame_ext.tools.main", "upload", str(export), object_store.url]
    process = subprocess.Popen(command, env={**os.environ})

    def kill(request: object) -> None:
        if len(put(object_store)) == 3 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    object_store.after = kill
    assert process.wait(60) == -signal.SIGKILL
    time.sleep(0.1)
    object_store.after = ObjectStore.after
    assert "step-4/config.json" not in object_store.names
    finished = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0 and "Uploaded 6 files" in finished.stdout and "; 3 were there" in finished.stdout
    assert sorted(put(object_store)) == sorted([*FILES, "export.json"]), "nothing twice"


def test_a_folder_of_this_machine_is_a_store(tmp_path: Path) -> None:
    upload(save(tmp_path / "step-4"), f"file://{tmp_path}/copies")
    assert (tmp_path / "copies" / "step-4" / "future_heads" / "config.json").read_text() == "{}"


def test_credentials_are_not_repeated(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    S3FileSystem.clear_instance_cache()  # of the key before
    with pytest.raises(CheckpointError, match="access is refused") as refused:
        upload(save(tmp_path / "step-4"), object_store.url)
    S3FileSystem.clear_instance_cache()
    assert SECRET_KEY not in str(refused.value)
    assert SECRET_KEY not in str(problem_of(f"s3://key:{SECRET_KEY}@bucket/prefix"))
