"""Whole runs whose exports are uploaded: all of them, once, whatever the server does; tests/run/test_followers.py has the mechanism."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.hub_server import TOKEN, served
from tests.object_store import ObjectStore
from tests.ranks import TrainRun, train

OPTIONS = ("--training.steps=4", "--checkpoint.interval=2", "--export.interval=2")


def run(folder: Path, store: ObjectStore, *options: str, **more: object) -> TrainRun:
    return train(folder, *OPTIONS, f"--export.upload={store.url}/one", *options, env=store.environment, **more)


def sent(store: ObjectStore) -> list[str]:
    return [a.path.partition("/one/")[2] for a in store.asked if a.method == "PUT" and a.status == 200]


def exported(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder / "hf")): p.read_bytes() for p in folder.glob("hf/step-*/**/*") if p.is_file()}


def uploaded(store: ObjectStore) -> dict[str, bytes]:
    return {name.removeprefix("one/"): store.get(name) for name in store.names}


@pytest.mark.matrix
def test_every_export_is_uploaded_and_none_twice(dump_folder: Path, object_store: ObjectStore) -> None:
    first = run(dump_folder, object_store, world_size=2)
    assert uploaded(object_store) == exported(dump_folder)
    names = sent(object_store)
    assert len(names) == len({*names}) and {name.partition("/")[0] for name in names} == {"step-2", "step-4"}
    assert "upload of step-4: Uploaded" in first.ranks[0].output and "Waiting for what follows" in first.ranks[0].output
    run(dump_folder, object_store, world_size=2)
    assert sent(object_store) == names
    (dump_folder / "hf" / "step-2" / "export.json").unlink()  # the step is gone or not: it is exported again, and known
    again = run(dump_folder, object_store, world_size=2)
    assert sent(object_store) == names and "Exported step-2 in the background" in again.ranks[0].output


@pytest.mark.matrix
def test_a_server_that_is_down_is_said_and_made_up_for(dump_folder: Path, object_store: ObjectStore) -> None:
    object_store.refuse = lambda request: 503
    down = run(dump_folder, object_store, "--checkpoint.keep_latest_k=2", timeout=280)
    lines = [line for line in down.ranks[0].output.splitlines() if "The upload of" in line]
    assert len(lines) == 2 and all(
        "the run goes on, and tries again after a success, or at its next start" in line for line in lines
    )
    assert "failed: s3://" in lines[0] and "failed: not begun, after the failure before" in lines[1]
    object_store.refuse = ObjectStore.refuse
    assert not object_store.names
    run(dump_folder, object_store, "--training.steps=6", "--checkpoint.allow_config_change=training.steps",
        "--checkpoint.keep_latest_k=2")  # fmt: skip
    assert uploaded(object_store) == exported(dump_folder)
    assert {name.partition("/")[0] for name in sent(object_store)} == {"step-2", "step-4", "step-6"}


@pytest.mark.matrix
def test_what_a_run_has_gone_back_behind_is_not_made_up_for(dump_folder: Path, object_store: ObjectStore) -> None:
    object_store.refuse = lambda request: 503
    run(dump_folder, object_store, timeout=280)
    object_store.refuse = ObjectStore.refuse
    back = ("--checkpoint.load_step=2", "--training.steps=5", "--checkpoint.interval=5", "--export.interval=5")
    for _ in range(2):  # the second start finds the branch
        run(dump_folder, object_store, *back, "--checkpoint.allow_config_change=training.steps")
    assert (dump_folder / "hf" / "step-4").is_dir()
    assert {name.partition("/")[0] for name in sent(object_store)} == {"step-2", "step-5"}


@pytest.mark.matrix
def test_a_signal_ends_an_upload_and_the_next_run_goes_on(dump_folder: Path, object_store: ObjectStore) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(request: object) -> int | None:
        if getattr(request, "method", "") == "PUT" and getattr(request, "path", "").endswith("model.safetensors"):
            reached.set()
            go_on.wait(60)
            return 503
        return None

    def stop(processes: list) -> None:
        assert reached.wait(60)
        os.kill(processes[0].pid, signal.SIGTERM)

    object_store.refuse = wait
    options = ("--export.interval=0", "--training.steps=2")
    stopped = run(dump_folder, object_store, *options, watch=stop, check=False)
    go_on.set()
    assert stopped.exit_codes == [75]
    assert "before its exports were made and followed" in stopped.ranks[0].output
    assert "one/step-2/config.json" not in object_store.names
    object_store.refuse = ObjectStore.refuse
    assert run(dump_folder, object_store, *options).exit_codes == [0]
    assert uploaded(object_store) == exported(dump_folder)


@pytest.mark.matrix
def test_the_last_export_is_pushed_to_the_hub(dump_folder: Path) -> None:
    options = (*OPTIONS, "--export.push_to_hub=org/name", "--export.push=last")
    with served() as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        first = train(dump_folder, *options, env=variables)
        model = hub.repositories["org/name"]
        files = {
            name.removeprefix("step-4/"): data for name, data in exported(dump_folder).items() if "step-4/" in name
        }
        assert model.private and model.at("main") == model.at("step-4") == {".gitattributes": b"", **files}
        assert [commit.message for commit in model.commits] == ["initial commit", "step 4"]
        assert "push of step-4: Pushed" in first.ranks[0].output and TOKEN not in first.ranks[0].output
        asked = len(hub.asked)
        train(dump_folder, *options, env=variables)
        assert len(hub.asked) == asked


@pytest.mark.matrix
def test_a_run_that_cannot_push_for_want_of_a_token_does_not_begin(dump_folder: Path) -> None:
    refused = train(
        dump_folder, *OPTIONS, "--export.push_to_hub=org/name", world_size=2, check=False, env={"HF_TOKEN": ""}
    )
    assert refused.exit_codes == [1, 1] and not (dump_folder / "metrics.jsonl").exists()
    for rank in refused.ranks:
        assert "needs a token that may write there: set HF_TOKEN" in rank.output.splitlines()[-1]
