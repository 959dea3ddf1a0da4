"""A conversion is complete or absent, and holds one tensor or one file's tensors at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flame_ext.errors import CheckpointError, SeedError, UserError
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.source import Source, read_tensor, same_bits
from flame_ext.tools import conversion
from flame_ext.tools.conversion import Conversion, Layout, convert, write_dcp
from tests.sources import load_dcp, save_dcp
from tests.tiny_models import save_tiny

LAYOUTS: tuple[Layout, ...] = ("hf", "dcp", "dcp-nested")
CASTS = Conversion(dtype=torch.bfloat16, max_shard_size="30KB")


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return save_tiny("olmo-untied", tmp_path / "original")


@pytest.mark.parametrize("error", [SeedError("damaged"), OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("to", LAYOUTS)
def test_nothing_is_at_the_destination_after_an_error(
    original: Path, monkeypatch: pytest.MonkeyPatch, to: Layout, error: BaseException
) -> None:
    destination, before = original.parent / "out", sorted(original.parent.iterdir())
    count = 0

    def failing(source: Source, name: str) -> Tensor:
        nonlocal count
        count += 1
        if count == 12:  # in the middle; a Hugging Face folder has files already
            assert not destination.exists() and list(original.parent.glob(".incomplete-out-*"))
            raise error
        return read_tensor(source, name)

    monkeypatch.setattr(conversion, "read_tensor", failing)
    expected = UserError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(str(original), destination, to, CASTS)
    assert count == 12 and sorted(original.parent.iterdir()) == before
    monkeypatch.undo()
    assert convert(str(original), destination, to, CASTS).tensors == len(load_file(original / "model.safetensors"))


@pytest.mark.parametrize("to", LAYOUTS)
def test_what_is_at_the_destination_stays(original: Path, monkeypatch: pytest.MonkeyPatch, to: Layout) -> None:
    folder, file, link = (original.parent / name for name in ("folder", "file", "link"))
    folder.mkdir()
    (folder / "kept").write_text("content")
    file.write_text("content")
    link.symlink_to("nowhere")
    monkeypatch.setattr(conversion, "read_tensor", lambda *_: pytest.fail("a tensor was read"))
    for destination in (folder, file, link):
        with pytest.raises(CheckpointError, match="is there already and is not overwritten"):
            convert(str(original), destination, to, Conversion())
    with pytest.raises(CheckpointError, match="lies inside the source"):
        convert(str(original), original / "deep" / "out", to, Conversion())
    assert [p.name for p in folder.iterdir()] == ["kept"] and file.read_text() == "content" and link.is_symlink()
    assert not (original / "deep").exists() and not list(original.parent.glob(".incomplete-*"))


def counted(most: int) -> tuple[Callable[[Source, str], Tensor], list[weakref.ref[Tensor]]]:
    """``read_tensor``, which fails if more than ``most`` of what it gave out is still there."""
    handed_out: list[weakref.ref[Tensor]] = []

    def read(source: Source, name: str) -> Tensor:
        assert sum(reference() is not None for reference in handed_out) <= most
        tensor = read_tensor(source, name).clone()
        handed_out.append(weakref.ref(tensor))
        return tensor

    return read, handed_out


@pytest.mark.parametrize("nested", [False, True])
def test_dcp_is_written_one_tensor_at_a_time(tmp_path: Path, nested: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{n}.weight": torch.randn(2 * n + 1, 3, generator=generator) for n in range(12)}
    source = open_source(save_dcp(dict(tensors), tmp_path / "source"))
    (tmp_path / "out").mkdir()
    read, handed_out = counted(most=0)
    described = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_dcp(described, lambda name: read(source, name), tmp_path / "out", nested)
    assert len(handed_out) == len(tensors), "each once"
    prefix = "model." if nested else ""
    found = load_dcp(tmp_path / "out", {prefix + name: tensor for name, tensor in tensors.items()})
    assert all(same_bits(found[prefix + name], tensor) for name, tensor in tensors.items())
    assert open_source(tmp_path / "out").layout == ("dcp-nested" if nested else "dcp-flat")
    assert len(list((tmp_path / "out").glob("*.distcp"))) == 1


def test_a_hugging_face_folder_is_written_one_file_at_a_time(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = convert(str(original), original.parent / "one", "hf", Conversion()).tensors
    most = 0
    for file in save_tiny("olmo-untied", original.parent / "cut", max_shard_size="30KB").glob("*.safetensors"):
        most = max(most, len(load_file(file)))
    assert 1 < most < every
    read, handed_out = counted(most)
    monkeypatch.setattr(conversion, "read_tensor", read)
    convert(str(original), original.parent / "out", "hf", Conversion(max_shard_size="30KB"))
    assert len(handed_out) == every


def test_tied_tensors_are_compared_before_one_is_dropped(tmp_path: Path) -> None:
    original = save_tiny("olmo-tied", tmp_path / "original")
    tensors = load_file(original / "model.safetensors")
    for name, factor in (("same", 1), ("other", 2)):
        save_dcp({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * factor}, tmp_path / name)
    assets = Conversion(assets=original)
    assert convert(str(tmp_path / "same"), tmp_path / "hf", "hf", assets).tensors == len(tensors)
    assert convert(str(tmp_path / "hf"), tmp_path / "dcp", "dcp", Conversion()).tensors == len(tensors) + 1
    for to in LAYOUTS:
        with pytest.raises(SeedError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'"):
            convert(str(tmp_path / "other"), tmp_path / "out", to, assets)


def test_every_misfit_is_listed_up_to_ten(tmp_path: Path) -> None:
    original = save_tiny("olmo2", tmp_path / "original")
    tensors = load_file(original / "model.safetensors")
    norms = {name: torch.ones(7) for name in tensors if "norm" in name}
    assert len(norms) == 13
    folder = save_dcp({**tensors, **norms, "extra": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(SeedError) as raised:
        convert(str(folder), tmp_path / "out", "hf", Conversion(assets=original))
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{folder} is not the model of {original}/config.json:" and len(lines) == 12
    assert lines[1].startswith("  - 'extra' [1] in __0_") and lines[1].endswith("is not in the model")
    assert ": shape [7] in" in lines[2] and lines[2].endswith("the model has [32]")
    assert lines[-1] == "  - … and 4 more"


@pytest.mark.parametrize("to", LAYOUTS)
def test_progress_ends_with_all_that_is_written(original: Path, to: Layout) -> None:
    seen: list[tuple[int, int]] = []
    done = convert(str(original), original.parent / to, to, CASTS, lambda *figures: seen.append(figures))
    assert [written for written, _ in seen] == sorted({written for written, _ in seen}) and len(seen) == done.tensors
    assert {total for _, total in seen} == {done.nbytes} and seen[-1][0] == done.nbytes
    assert done.nbytes == sum(2 * tensor.numel() for tensor in load_file(original / "model.safetensors").values())
