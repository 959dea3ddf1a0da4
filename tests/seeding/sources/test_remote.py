"""Sources in object stores are described, read and refused as the same folder on a disk, and no more of them is asked for than needed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
import torch
from fsspec.registry import _registry
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from flame_ext import object_stores
from flame_ext.errors import SeedError
from flame_ext.object_stores import patiently
from flame_ext.seeding.report import changed_source
from flame_ext.seeding.sources import remote_weights
from flame_ext.seeding.sources.boxes import Box, full_box, inside, tiles_exactly, volume
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.remote import copied
from flame_ext.seeding.sources.remote_weights import _GAP, _RANGE, parts_to_ask_for
from flame_ext.seeding.sources.source import Source, read_tensor, same_bits
from flame_ext.tools.describe import describe
from flame_ext.tools.main import main
from tests.object_store import ObjectStore
from tests.sources import random_heads, save_dcp
from tests.tiny_models import save_tiny


def sharded_with_heads(folder: Path) -> Path:
    model = save_tiny("olmo2", folder / "hf", torch.bfloat16, max_shard_size="30KB")
    (model / "future_heads").mkdir()
    save_file(random_heads(), model / "future_heads" / "model.safetensors")
    (model / "future_heads" / "config.json").write_text("{}")
    return model


def single(folder: Path) -> Path:
    return save_tiny("olmo2", folder / "single", torch.bfloat16)


def nested_dcp(folder: Path) -> Path:
    tensors = {
        "a": torch.arange(60_000.0).view(300, 200),
        "transposed": torch.randn(300, 200).T,
        "scalar": torch.tensor(3),
    }
    return save_dcp({"model": tensors, "train_state": {"step": torch.tensor(1)}, "note": "text"}, folder / "dcp")


MAKERS: list[Callable[[Path], Path]] = [sharded_with_heads, single, nested_dcp]


def opened(url: str) -> Source:
    return open_source(locate(url)[0])


@pytest.fixture
def in_memory(tmp_path: Path) -> Any:
    """Copies a folder to ``memory://``; returns its URL."""
    files = fsspec.filesystem("memory")

    def put(folder: Path) -> str:
        files.put(str(folder), f"{tmp_path}/{folder.name}", recursive=True)
        return f"memory://{tmp_path}/{folder.name}"

    yield put
    files.store.clear()


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
@pytest.mark.parametrize("place", ["in_memory", "object_store"])
def test_a_source_is_the_folder_bit_for_bit(
    maker: Callable[[Path], Path],
    place: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if place == "in_memory":  # where a range costs little: every box is cut, across rows or between them
        monkeypatch.setattr(remote_weights, "_RANGE", 1024)
        monkeypatch.setattr(remote_weights, "_GAP", 256)
    local_folder = maker(tmp_path)
    store = request.getfixturevalue(place)
    url = store(local_folder) if place == "in_memory" else store.put(local_folder)
    local, found = open_source(local_folder), opened(url)
    assert (found.digest, found.layout, found.passed_over) == (local.digest, local.layout, local.passed_over)
    assert found.objects.keys() == local.objects.keys() and list(found.entries) == list(local.entries)
    independent = found.independent_state(found.entries.values())
    for key, entry in local.entries.items():
        expected = read_tensor(local, key)
        assert same_bits(read_tensor(found, key), expected) and same_bits(independent[key], expected), key
        box = tuple((n // 3, n // 3 + max(1, n // 2)) for n in entry.shape)
        (chunk,) = found.entries[key].chunks
        with found.open(chunk.file) as read_box:
            assert same_bits(read_box(found.entries[key], chunk, box), expected[inside(box, full_box(entry.shape))]), (
                key
            )
    assert not any(file.is_file() for file in {chunk.file for e in found.entries.values() for chunk in e.chunks})


boxes = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39), st.integers(1, 40)), max_size=4)


@given(boxes, st.sampled_from([1, 2, 8, 2**16, 2**20]))
def test_the_ranges_of_a_box_tile_it_and_are_few_and_bounded(sides: list[tuple[int, int, int]], itemsize: int) -> None:
    shape = [max(n, begin + 1) for n, begin, _ in sides]
    box: Box = tuple((begin, min(begin + n, size)) for (_, begin, n), size in zip(sides, shape, strict=True))
    strides = torch.empty(shape, device="meta").stride()
    parts = list(parts_to_ask_for(box, strides, itemsize))
    assert tiles_exactly(box, parts) if box else parts == [()]
    spans = [itemsize * (1 + sum((e - b - 1) * s for (b, e), s in zip(part, strides, strict=True))) for part in parts]
    assert max(spans) <= max(_RANGE, itemsize)
    # A range ends because it is full, or because what follows is not worth reading.
    span = itemsize * (1 + sum((e - b - 1) * s for (b, e), s in zip(box, strides, strict=True)))
    assert len(parts) <= 1 + span // min(_GAP, _RANGE // 2)
    assert sum(spans) <= span and volume(box) * itemsize <= sum(spans)


def big_model(folder: Path) -> dict[str, Tensor]:
    """Something that ``open_source`` takes for a model, whose header is small beside its weights."""
    tensors = {"rows": torch.randn(512, 300), "more": torch.randn(3, 100, 256)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return tensors


@pytest.mark.parametrize("layout", ["safetensors", "dcp"])
def test_half_of_the_rows_are_half_of_the_bytes(layout: str, tmp_path: Path, object_store: ObjectStore) -> None:
    tensors = big_model(tmp_path / "model")
    folder = tmp_path / "model" if layout == "safetensors" else save_dcp(tensors, tmp_path / "dcp")
    source = opened(object_store.put(folder))
    object_store.asked.clear()
    for key, entry in source.entries.items():
        box = ((0, entry.shape[0] // 2), *full_box(entry.shape)[1:])
        with source.open(entry.chunks[0].file) as read_box:
            assert torch.equal(read_box(entry, entry.chunks[0], box), tensors[key][: entry.shape[0] // 2])
    half = sum(tensor[: len(tensor) // 2].nbytes for tensor in tensors.values())
    described = {"safetensors": 0, "dcp": 2 * 2**14}[layout]  # both ends of a file of torch.save for each tensor
    assert object_store.read() == half + described
    assert all(a.range for a in object_store.asked if a.method == "GET")


def test_headers_alone_are_read_before_the_weights_and_once_on_a_node(
    tmp_path: Path, object_store: ObjectStore
) -> None:
    big_model(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    url = object_store.put(tmp_path / "model")
    object_store.asked.clear()
    opened(url)
    assert object_store.read("model.safetensors") == 8 + int.from_bytes(file.read_bytes()[:8], "little")
    opened(url)
    assert object_store.read("config.json") == 2, "what is in the cache is not asked for again"


def test_empty_tensors_and_files_are_read(tmp_path: Path, object_store: ObjectStore) -> None:
    (tmp_path / "model").mkdir()
    tensors = {"some": torch.arange(6.0), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "merges.txt").touch()
    source = open_source(locate(object_store.put(tmp_path / "model"), with_tokenizer=True)[0])
    found = source.independent_state(source.entries.values())
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    assert (source.path / "merges.txt").read_bytes() == b""


def test_a_cache_that_was_tidied_up_is_filled_again(tmp_path: Path, object_store: ObjectStore) -> None:
    big_model(tmp_path / "model")
    url = object_store.put(tmp_path / "model")
    folder = locate(url)[0]
    for left in (
        folder / "config.json",
        folder.parent / "headers" / "model.safetensors",
        folder.parent / "objects.json",
    ):
        left.unlink()
        assert opened(url).entries.keys() == {"rows", "more"} and left.exists()


def test_an_object_that_changes_meanwhile_is_noticed(tmp_path: Path, object_store: ObjectStore) -> None:
    for layout in ("safetensors", "dcp"):
        tensors = big_model(tmp_path / layout)
        folder = tmp_path / layout if layout == "safetensors" else save_dcp(tensors, tmp_path / "saved")
        source = opened(object_store.put(folder))
        name = source.entries["rows"].chunks[0].file.name
        raw = bytearray((folder / name).read_bytes())
        raw[-2000] ^= 1  # of the same size, with the same header
        (folder / name).write_bytes(raw)
        object_store.put(folder)
        for read in (
            lambda s=source: read_tensor(s, "rows"),
            lambda s=source: s.independent_state([s.entries["rows"]]),
        ):
            with pytest.raises(SeedError, match=f"/{name}: has changed while it was read .*; start again"):
                read()
        assert opened(object_store.put(folder)).digest == source.digest, (
            "as of a folder, which has the same headers and sizes"
        )


def test_a_resumed_run_says_if_the_source_is_another(tmp_path: Path, object_store: ObjectStore) -> None:
    url = object_store.put(single(tmp_path))
    identity = {"source": url, "source_digest": opened(url).digest}
    assert changed_source(identity, url, False, False) is None
    object_store.put(save_tiny("olmo2", tmp_path / "other", torch.float32), "single")
    assert f"was seeded from {url} (digest {identity['source_digest'][:12]})" in (
        changed_source(identity, url, False, False) or ""
    )
    assert changed_source(identity, f"{object_store.url}/gone", False, False) is None, "as of a folder that is gone"


def test_a_resumed_run_does_not_wait_for_a_store_that_is_down(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = {"source": (url := object_store.put(single(tmp_path))), "source_digest": "another"}
    object_store.refuse = lambda _request: 500
    monkeypatch.setattr(object_stores, "_WAITS", (600,))
    assert changed_source(identity, url, False, False) is None


def test_a_store_that_does_not_tell_when_objects_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flame_ext.seeding.sources.remote.mark_of", lambda _info: "")
    fsspec.filesystem("memory").put(str(single(tmp_path)), "/unmarked", recursive=True)
    with pytest.raises(SeedError, match="the store does not tell when it changes; copy the folder"):
        copied("memory://unmarked", with_tokenizer=False)


def test_errors_that_pass_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_stores, "_WAITS", (0, 0))
    answers: list[Any] = [OSError("no route"), RuntimeError("reset"), b"data"]

    def ask() -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently("s3://a/b", ask, SeedError) == b"data"
    answers[:] = [OSError("no\nroute")] * 3
    with pytest.raises(SeedError, match=r"^s3://a/b: cannot be read \(OSError: no route\); check the network"):
        patiently("s3://a/b", ask, SeedError)
    answers[:] = [FileNotFoundError("x"), b""]
    with pytest.raises(SeedError, match="nothing is there"):
        patiently("s3://a/b", ask, SeedError)
    assert answers == [b""], "that it is absent is an answer"


def test_a_server_that_fails_some_times_is_asked_again_and_one_that_goes_on_is_named(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(object_stores, "_WAITS", (0, 0, 0))
    s3fs.S3FileSystem.clear_instance_cache()
    tensors = big_model(tmp_path / "model")
    source = opened(object_store.put(tmp_path / "model"))
    object_store.asked.clear()
    object_store.fail(3, name="model.safetensors")
    assert torch.equal(read_tensor(source, "rows"), tensors["rows"])
    assert sum(a.status == 503 for a in object_store.asked) == 3
    object_store.fail(100, name="model.safetensors")
    object_store.asked.clear()
    with pytest.raises(SeedError) as e:
        read_tensor(source, "rows")
    assert len(object_store.asked) == 4, "four attempts, and not four times those of botocore"
    assert str(e.value).startswith(f"{object_store.url}/model/model.safetensors: cannot be read (")
    assert "check the network" in str(e.value) and "\n" not in str(e.value)
    s3fs.S3FileSystem.clear_instance_cache()


def refusal(url: str) -> str:
    with pytest.raises(SeedError) as e:
        opened(url)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_cannot_be_a_source_is_refused_with_its_url(tmp_path: Path, object_store: ObjectStore) -> None:
    model = sharded_with_heads(tmp_path)
    url = object_store.put(model)
    shard = next(model.glob("model-*.safetensors")).name
    assert "is an object; name the folder that it is in" in refusal(f"{url}/{shard}")
    object_store.client.delete_object(Bucket=object_store.bucket, Key=f"hf/{shard}")
    assert (
        refusal(url) == f"{url}/{shard}: listed in model.safetensors.index.json but absent; download or copy it again"
    )
    assert f"{url}-absent: nothing is there" in refusal(f"{url}-absent")
    assert "nothing is there (FileNotFoundError: The specified bucket does not exist)" in refusal(
        "s3://no-such-bucket/model"
    )
    (model / shard).write_bytes((model / shard).read_bytes()[:-10])
    object_store.put(model)
    assert f"{url}/{shard}: has " in (message := refusal(url)) and "truncated or damaged" in message
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")
    assert "holds only .bin files, which are pickles and not read from a store" in refusal(
        object_store.put(model, "bin")
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    empty = object_store.put(tmp_path / "empty")
    assert refusal(empty).startswith(f"{empty}: no weights: neither model.safetensors nor")


def test_files_that_are_too_large_are_refused_unread(tmp_path: Path, object_store: ObjectStore) -> None:
    model = single(tmp_path)
    with (model / "config.json").open("ab") as stream:
        stream.truncate(2**22 + 1)
    url = object_store.put(model)
    object_store.asked.clear()
    assert refusal(url) == f"{url}/config.json: {2**22 + 1} bytes is no model's file; expected at most {2**22}"
    assert object_store.read("/config.json") == 0


def test_wrong_credentials_are_named_and_not_told(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = object_store.put(single(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    message = refusal(url)
    assert f"{url}: access is refused (PermissionError: " in message and "check credentials: AWS_PROFILE" in message
    assert "another" not in message
    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{url}: access is refused (" in refusal(url)
    s3fs.S3FileSystem.clear_instance_cache()
    in_it = refusal("s3://user:password@bucket/model")
    assert "has credentials in it" in in_it and "password" not in in_it and "user" not in in_it


@pytest.mark.parametrize(("url", "package", "extra"), [("s3://b/m", "s3fs", "s3"), ("gs://b/m", "gcsfs", "gcs")])
def test_a_missing_package_is_named_with_its_extra(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(_registry, url.split(":")[0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(url)
    assert "needs a package that is not installed" in message and f"pip install 'flame_ext[{extra}]'" in message


def test_an_unknown_protocol_is_refused() -> None:
    assert "nonsense:// is no protocol that fsspec knows" in refusal("nonsense://bucket/model")


def test_a_folder_cannot_claim_to_stand_for_a_store(tmp_path: Path) -> None:
    """Only the cache's folders do: a folder of others could else have any address asked for."""
    folder = single(tmp_path).rename(tmp_path / "source")
    (tmp_path / "objects.json").write_text('{"url": "s3://bucket/model", "sizes": {}, "marks": {}}')
    assert math.prod(open_source(folder).entries["model.norm.weight"].shape) == 32


def test_inspect_and_convert_take_a_url(
    tmp_path: Path, object_store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    model = single(tmp_path)
    url = object_store.put(model)
    there, here = describe(url), describe(str(model))
    assert (there.groups, there.tokenizer, there.tied, there.problems) == (
        here.groups,
        here.tokenizer,
        here.tied,
        here.problems,
    )
    assert main(["inspect", url, "--against", str(model), "--values"]) == 0
    assert main(["convert", url, str(tmp_path / "converted"), "--to", "hf"]) == 0
    assert "s3-" not in capsys.readouterr().err
    expected, written = load_file(model / "model.safetensors"), load_file(tmp_path / "converted" / "model.safetensors")
    assert expected.keys() == written.keys() and all(same_bits(written[key], expected[key]) for key in expected)
