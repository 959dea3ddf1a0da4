"""Exports on the Hub, a server on this machine: commits, revisions, what is sent again, and what is refused."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from flame_ext.checkpoint import push as push_module
from flame_ext.checkpoint.push import check_token, push
from flame_ext.errors import CheckpointError
from tests.checkpoint.test_upload import FILES, WEIGHTS, save
from tests.hub_server import TOKEN, Commit, Hub, Repository, served

NAME = "org/name"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def contents(export: Path) -> dict[str, bytes]:
    files = {path.relative_to(export).as_posix(): path.read_bytes() for path in export.rglob("*") if path.is_file()}
    return {".gitattributes": b"", **files}


def test_each_export_is_one_commit_and_a_revision(tmp_path: Path, hub: Hub) -> None:
    first = save(tmp_path / "step-4")
    second = save(tmp_path / "step-8", {"config.json": '{"8": 8}', "model.safetensors": "8" * 50}, digest="8")
    assert push(first, NAME, private=True) == "Pushed 9 files to hf://org/name@step-4"
    push(second, NAME, private=True)
    model = hub.repositories[NAME]
    assert model.private and [commit.message for commit in model.commits] == ["initial commit", "step 4", "step 8"]
    assert model.at("step-4") == contents(first)
    assert model.at("main") == model.at("step-8") == contents(second), "without the shards of the other"
    before, asked = len(model.commits), len(hub.asked)
    assert push(first, NAME, private=True) == "hf://org/name@step-4 was there"
    assert len(model.commits) == before and not any(method == "PUT" for method, _ in hub.asked[asked:])


def test_an_older_step_that_is_made_up_for_leaves_main_as_it_is(tmp_path: Path, hub: Hub) -> None:
    late, new = save(tmp_path / "step-4"), save(tmp_path / "step-8", {"config.json": "[]"}, digest="8")
    push(new, NAME, private=True)
    push(late, NAME, private=True)
    model = hub.repositories[NAME]
    assert model.at("main") == contents(new) and model.at("step-4") == contents(late)
    assert push(late, NAME, private=True).endswith("was there")


def test_a_step_that_is_another_after_going_back_replaces_the_first(tmp_path: Path, hub: Hub) -> None:
    push(save(tmp_path / "step-4"), NAME, private=True)
    again = save(tmp_path / "again" / "step-4", {**FILES, WEIGHTS[0]: "x" * 900}, digest="second")
    push(again, NAME, private=True)
    model = hub.repositories[NAME]
    assert model.at("step-4") == model.at("main") == contents(again)


def test_a_late_step_that_is_another_after_going_back_replaces_the_first(tmp_path: Path, hub: Hub) -> None:
    push(save(tmp_path / "step-8", {"config.json": "[]", "of_eight.json": ""}, digest="8"), NAME, private=True)
    push(save(tmp_path / "step-4"), NAME, private=True)
    again = save(tmp_path / "again" / "step-4", {"config.json": "{ }", "model.safetensors": "x" * 900}, digest="second")
    push(again, NAME, private=True)
    model = hub.repositories[NAME]
    assert model.at("step-4") == contents(again), "without the shards of the first"
    assert "of_eight.json" in model.at("main")


@pytest.mark.matrix
def test_what_was_sent_before_a_kill_is_not_sent_again(tmp_path: Path, hub: Hub) -> None:
    export = save(tmp_path / "step-4")
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "flame_ext.tools.main", "upload", str(export), f"hf://{NAME}"]
    process = subprocess.Popen(command, env={**os.environ, **variables})

    def kill(method: str, path: str) -> int | None:
        if path.endswith("/commit/main"):
            process.send_signal(signal.SIGKILL)
            return 500
        return None

    hub.refuse = kill
    assert process.wait(60) == -signal.SIGKILL
    assert len(hub.sent) == len(WEIGHTS) and len(hub.repositories[NAME].commits) == 1
    hub.refuse = Hub.refuse
    push(export, NAME, private=True)
    large = {hashlib.sha256(FILES[name].encode()).hexdigest() for name in WEIGHTS}
    assert sorted(hub.sent) == sorted(large), "each once"
    assert hub.repositories[NAME].at("step-4") == contents(export)


def test_a_push_that_failed_before_its_tag_gets_it(tmp_path: Path, hub: Hub) -> None:
    export = save(tmp_path / "step-4")
    hub.refuse = lambda _method, path: 403 if "/tag/" in path else None
    with pytest.raises(CheckpointError, match="hf://org/name: .*403.*HF_TOKEN may write"):
        push(export, NAME, private=True)
    hub.refuse = Hub.refuse
    push(export, NAME, private=True)
    assert hub.repositories[NAME].at("step-4") == contents(export)


def test_what_belongs_to_others_stays(tmp_path: Path, hub: Hub) -> None:
    push(save(tmp_path / "step-4"), NAME, private=False)
    model = hub.repositories[NAME]
    with pytest.raises(CheckpointError, match="is public, and export.hub_private = true"):
        push(save(tmp_path / "step-8"), NAME, private=True)
    with pytest.raises(CheckpointError, match="holds the exports of another run"):
        push(save(tmp_path / "other" / "step-8", run="other"), NAME, private=False)
    assert len(model.commits) == 2
    hub.repositories["org/other"] = Repository(True, [Commit("", {"config.json": b"", "README.md": b""})])
    with pytest.raises(CheckpointError, match=r"org/other holds files that are no export \(config.json\)"):
        push(tmp_path / "step-8", "org/other", private=True)
    assert len(hub.repositories["org/other"].commits) == 1


def test_a_hub_that_never_answers_is_down(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(push_module, "_SILENCE_AT_START", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        check_token(NAME)
    assert time.monotonic() - began < 10 and "the Hub cannot be reached (ReadTimeout" in caplog.text
    push(save(tmp_path / "step-4"), NAME, private=True)
    assert get_session().timeout.read == 300


def test_a_token_is_asked_for_and_a_hub_that_is_down_is_said(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_token(NAME)
    assert "training begins all the same" not in caplog.text
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    check_token(NAME)
    assert "the Hub cannot be reached" in caplog.text and "training begins all the same" in caplog.text
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match="the Hub refuses the token in HF_TOKEN") as refused:
        check_token(NAME)
    assert "hf_wrong" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="needs a token that may write there: set HF_TOKEN"):
        check_token(NAME)
