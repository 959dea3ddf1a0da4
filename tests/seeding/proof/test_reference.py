"""The reference that the proof compares with is bit for bit what ``from_pretrained`` computes, with few weights in memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmo.modeling_olmo import OlmoModel

from flame_ext.errors import SeedError
from flame_ext.model.attention import attention_options
from flame_ext.seeding.names import Rule, in_model_names, renamed
from flame_ext.seeding.proof import reference as reference_module
from flame_ext.seeding.proof.blocks import weights_by_blocks
from flame_ext.seeding.proof.parity import Probe
from flame_ext.seeding.proof.reference import Reference
from flame_ext.seeding.sources.open import open_source
from flame_ext.tools.architecture import load_architecture
from tests.ranks import TINY_OLMO
from tests.sources import save_dcp
from tests.tiny_models import CONFIGS, MIXTURES, save_tiny

TOKENS = torch.arange(2, 66)[None]


def probe(dtype: torch.dtype = torch.float32) -> Probe:
    return Probe(TOKENS, lambda x: x, contextlib.nullcontext, dtype, dtype, torch.device("cpu"), 264)


def reference(path: Path, assets: Path, rules: list[Rule] | None = None) -> Reference:
    """As the seeding makes it."""
    source = renamed(open_source(path, allow_pickle=True), rules or [])
    source = in_model_names(source, load_architecture(assets).names)
    return Reference(source, AutoConfig.from_pretrained(assets), set(source.entries), rules=rules or [])


def stock_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    options = attention_options(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float()


QUICK = ("olmo-tied", "gemma2", "gpt-neox-tied", "mixtral", "gpt-oss")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.matrix) for name in CONFIGS | MIXTURES]
)
def test_by_blocks_the_logits_are_those_of_from_pretrained(tmp_path: Path, name: str) -> None:
    folder = save_tiny(name, tmp_path / name, max_shard_size="50KB")
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(reference(folder, folder).logits_by_blocks(probe(dtype)), stock_logits(folder, dtype)), dtype


@pytest.mark.parametrize(("name", "cudnn"), [("olmo-tied", True), ("olmo3-sliding-window", False)])
def test_it_attends_by_the_kernels_of_the_trainers_model_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cudnn: bool
) -> None:
    attend, seen = F.scaled_dot_product_attention, []

    def watched(*args: Tensor, **options: Any) -> Tensor:
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch._dynamo.eval_frame._stance.stance))
        return attend(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    torch.backends.cuda.enable_cudnn_sdp(not cudnn)
    folder = save_tiny(name, tmp_path / name)
    reference(folder, folder).logits_by_blocks(probe())
    assert seen == [(cudnn, "force_eager")] * 3


@pytest.mark.parametrize("kind", ["bin", "numbered", "dcp", "dcp-nested", "as-the-model", "renamed", "wrapped"])
def test_by_blocks_from_every_layout(tmp_path: Path, kind: str) -> None:
    assets, rules = save_tiny("mixtral", tmp_path / "hf"), []
    expected, tensors, folder = stock_logits(assets), load_file(assets / "model.safetensors"), tmp_path / kind
    if kind == "dcp-nested":
        tensors = {"model": tensors}
    elif kind == "as-the-model":
        tensors = AutoModelForCausalLM.from_pretrained(assets).state_dict()
    elif kind == "renamed":
        tensors, rules = {f"old.{key}": tensor for key, tensor in tensors.items()}, [("old.", "")]
    elif kind == "wrapped":
        tensors = {f"module.{key}": tensor for key, tensor in tensors.items()}
    if kind in ("bin", "numbered", "wrapped"):
        folder.mkdir()
        (folder / "config.json").write_bytes((assets / "config.json").read_bytes())
        names = {"bin": "pytorch_model.bin", "numbered": "model-00001-of-00001.safetensors"}
        (torch.save if kind == "bin" else save_file)(tensors, folder / names.get(kind, "model.safetensors"))
    else:
        save_dcp(tensors, folder)
    made = reference(folder, assets, rules)
    assert torch.equal(made.logits_by_blocks(probe()), expected)
    assert torch.equal(made.logits_of_whole(probe()), expected)


def test_the_weights_of_two_blocks_are_in_memory(tmp_path: Path) -> None:
    folder = save_tiny("olmo-tied", tmp_path / "olmo")
    model, state = AutoModelForCausalLM.from_pretrained(folder), load_file(folder / "model.safetensors")
    layers, read_names, most = model.model.layers, [], 0

    def held() -> set[str]:
        return {name for name, tensor in model.state_dict().items() if not tensor.is_meta}

    def read(names: Collection[str]) -> dict[str, Tensor]:
        read_names.append(sorted(names))
        return {name: state[name] for name in names}

    def count(layer: torch.nn.Module, _: object) -> None:
        nonlocal most
        most = max(most, len({name.split(".")[2] for name in held() if ".layers." in name}))
        assert not any(tensor.is_meta for tensor in layer.state_dict().values())

    with weights_by_blocks(model, set(state), read, torch.float32, torch.device("cpu")), torch.no_grad():
        assert not held()
        for layer in layers:
            layer.register_forward_pre_hook(count)
        found = model(TOKENS, use_cache=False).logits
        assert not held()
    assert torch.equal(found, stock_logits(folder)) and most <= 2
    assert read_names[0] == read_names[-1] == ["model.embed_tokens.weight"], "tied: read again as the head"
    assert len(read_names) == len(layers) + 2


def test_a_model_that_uses_the_weights_of_a_block_elsewhere_is_loaded_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forward(self: OlmoModel, *args, **kwargs):
        assert self.layers[1].mlp.up_proj.weight.sum().item() != 0.0
        return OlmoModel_forward(self, *args, **kwargs)

    OlmoModel_forward = OlmoModel.forward
    made = reference(TINY_OLMO, TINY_OLMO)
    with caplog.at_level(logging.INFO):
        expected = made.logits(probe())
    assert "loads all of the model" not in caplog.text and torch.equal(expected, stock_logits(TINY_OLMO))
    monkeypatch.setattr(OlmoModel, "forward", forward)
    with caplog.at_level(logging.INFO):
        assert torch.equal(made.logits(probe()), expected)
    assert caplog.text.count("loads all of the model, not a block at a time") == 1


def test_a_tensor_that_is_not_read_is_noticed() -> None:
    made = reference(TINY_OLMO, TINY_OLMO)
    lacking = {name: entry for name, entry in made.source.entries.items() if "layers.1.mlp.up" not in name}
    with pytest.raises(LookupError, match=r"layers.1.mlp.up_proj.weight is not in the source"):
        replace(made, source=replace(made.source, entries=lacking)).logits_by_blocks(probe())
    swapped = made.source.entries | {
        "model.layers.1.mlp.up_proj.weight": made.source.entries["model.layers.0.mlp.up_proj.weight"]
    }
    with pytest.raises(LookupError, match=r"layers.1.mlp.up_proj.weight is not made of what the source has"):
        replace(made, source=replace(made.source, entries=swapped)).logits_by_blocks(probe())


def test_what_does_not_fit_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = reference(TINY_OLMO, TINY_OLMO)
    sizes = [4 * tensor.numel() for tensor in load_file(TINY_OLMO / "model.safetensors").values()]
    monkeypatch.setattr(reference_module, "memory_left", lambda device: sum(sizes) - 1)
    made.logits(probe())
    with pytest.raises(
        SeedError, match="tiny_olmo: seed.verify = 'parity' loads all of a second model .* but this machine"
    ):
        made.logits_of_whole(probe())
    monkeypatch.setattr(reference_module, "memory_left", lambda device: max(sizes) - 1)
    with pytest.raises(SeedError, match="loads a part of a second model .* use seed.verify = 'finite'"):
        made.logits(probe())
