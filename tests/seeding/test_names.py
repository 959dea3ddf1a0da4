"""Keys under the model's names: by ``seed.key_map``, and as ``from_pretrained`` renames those of the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from flame_ext.errors import SeedError
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.seeding.conversion import in_files
from flame_ext.seeding.names import KeyNames, in_model_names, parse_key_map, rename, renamed
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.traced import TracedTensor
from tests.sources import save_dcp
from tests.tiny_models import CONFIGS, MIXTURES, save_tiny


def test_the_first_rule_that_fits_renames() -> None:
    rules = parse_key_map(["a.b.=x.", "a.=y.", "x.=z."])
    assert [rename(key, rules) for key in ("a.b.c", "a.c", "b.a.c")] == ["x.c", "y.c", "b.a.c"], (
        "once, at the beginning"
    )
    assert rename("model.a.c", rules) == "model.a.c"
    assert rename("model.a.c", rules, nesting="model.") == "model.y.c"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["a."], "is not 'old=new'"),
        (["a.="], "is not 'old=new'"),
        (["a.=a."], "two different beginnings"),
        (["a.=b.", "a.=c."], "two rules rename 'a.'"),
        (["first.=second."], "makes 'second.weight' of both"),
        (["third.=fourth."], "no key begins with 'third.'"),
    ],
)
def test_what_can_not_be_meant_is_refused(tmp_path: Path, rules: list[str], message: str) -> None:
    source = open_source(save_dcp({"first.weight": torch.ones(2), "second.weight": torch.ones(2)}, tmp_path / "flat"))
    with pytest.raises(SeedError, match=message):
        renamed(source, parse_key_map(rules))


def names_of(config) -> KeyNames:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    transforms = tuple(get_model_conversion_mapping(model))
    return KeyNames(shapes, transforms, model.base_model_prefix)


def test_renamed_keys_are_found(tmp_path: Path) -> None:
    folder = save_tiny("gpt-neox-renamed-keys", tmp_path / "neox")
    assert "embed_out.weight" in load_file(folder / "model.safetensors"), "as files of this architecture have it"
    source = in_model_names(open_source(folder), names_of(AutoConfig.from_pretrained(folder)))
    assert source.entries["lm_head.weight"].key == "embed_out.weight" and "embed_out.weight" not in source.entries


def test_exported_keys_are_those_of_files(tmp_path: Path) -> None:
    folder = save_tiny("gpt-neox-renamed-keys", tmp_path / "neox")
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(folder)))
    written = set(load_file(folder / "model.safetensors"))
    names = [*model.state_dict(), "future_predictor.norm.weight"]
    stored = in_files(model, {name: TracedTensor.whole((), torch.float32, name) for name in names})
    assert set(stored) == written | {"future_predictor.norm.weight"}
    assert stored["embed_out.weight"].parts[0].of == "lm_head.weight"


@pytest.mark.parametrize("layout", ["hf", "flat", "nested"])
def test_files_of_the_base_model_alone_lack_its_prefix(tmp_path: Path, layout: str) -> None:
    """As GPT-2's on the Hub: "h.0.…" where the model has "transformer.h.0.…"."""
    folder = save_tiny("gpt2-learned-positions", tmp_path / "gpt2")
    config = AutoConfig.from_pretrained(folder)
    tensors = {k.removeprefix("transformer."): t for k, t in load_file(folder / "model.safetensors").items()}
    assert "h.0.attn.c_attn.weight" in tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if layout != "hf":
        folder = save_dcp({"model": tensors} if layout == "nested" else tensors, tmp_path / "dcp")
    names = names_of(config)
    source = in_model_names(open_source(folder), names)
    assert set(source.entries) | {"lm_head.weight"} == set(names.model_keys)


def test_two_keys_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("gpt-neox-renamed-keys", tmp_path / "neox")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["embed_out.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(
        SeedError, match="'embed_out.weight' and 'lm_head.weight' are both 'lm_head.weight' of the model"
    ):
        in_model_names(open_source(folder), names_of(AutoConfig.from_pretrained(folder)))


@pytest.mark.parametrize("name", CONFIGS | MIXTURES)
def test_every_key_of_a_file_is_the_models(tmp_path: Path, name: str) -> None:
    folder = save_tiny(name, tmp_path / name)
    names = names_of(AutoConfig.from_pretrained(folder))
    assert set(in_model_names(open_source(folder), names).entries) <= set(names.model_keys)
