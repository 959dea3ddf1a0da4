"""Mixtures of experts: what transformers stacks while it loads is described, slice by slice, and taken apart on the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import core_model_loading as loading

from flame_ext.errors import SeedError
from flame_ext.seeding.accounting import account
from flame_ext.seeding.conversion import in_files
from flame_ext.seeding.names import in_model_names
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.source import Source, read_tensor, rearranged, traced
from flame_ext.seeding.sources.traced import TracedTensor
from flame_ext.tools.architecture import Architecture, load_architecture
from flame_ext.tools.conversion import Conversion, convert
from tests.sources import save_dcp
from tests.tiny_models import MIXTURES, save_tiny


def opened(folder: Path, assets: Path | None = None) -> tuple[Source, Architecture]:
    architecture = load_architecture(assets or folder)
    return in_model_names(open_source(folder), architecture.names), architecture


def stock(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("name", MIXTURES)
def test_tensors_are_those_of_from_pretrained_and_files_those_of_the_source(tmp_path: Path, name: str) -> None:
    folder = save_tiny(name, tmp_path / name, max_shard_size="50KB")
    source, architecture = opened(folder)
    expected = stock(folder)
    assert set(source.entries) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(read_tensor(source, key), tensor), key
    written = in_files(architecture.model, {key: traced(entry) for key, entry in source.entries.items()})
    back = replace(source, entries={key: rearranged(tensor) for key, tensor in written.items()})
    files = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert set(back.entries) == set(files)
    for key, tensor in files.items():
        assert torch.equal(read_tensor(back, key), tensor), key


@pytest.mark.parametrize("spelt", ["as the model", "as files"])
@pytest.mark.parametrize("nested", [False, True])
def test_dcp_in_either_spelling_is_the_model(tmp_path: Path, spelt: str, nested: bool) -> None:
    folder = save_tiny("mixtral", tmp_path / "mixtral")
    expected = stock(folder)
    tensors = expected if spelt == "as the model" else load_file(folder / "model.safetensors")
    source, _ = opened(save_dcp({"model": tensors} if nested else tensors, tmp_path / "dcp"), folder)
    assert set(source.entries) == set(expected)
    assert all(torch.equal(read_tensor(source, key), tensor) for key, tensor in expected.items())


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([EXPERT], rf"'model.layers.1.mlp.experts.gate_up_proj' .* missing \(1\): '{EXPERT}'"),
        (
            ["model.layers.1.mlp.experts.7.down_proj.weight"],
            r"down_proj' .* missing \(1\): '.*experts.7.down_proj.weight'",
        ),
        (
            [EXPERT.replace("3", str(n)) for n in range(8)],
            r"missing \(8\): 'model.layers.1.mlp.experts.0.up_proj.weight', ",
        ),
    ],
)
def test_a_missing_expert_is_named(tmp_path: Path, gone: list[str], message: str) -> None:
    folder = save_tiny("olmoe", tmp_path / "olmoe")
    tensors = load_file(folder / "model.safetensors")
    save_file({key: t for key, t in tensors.items() if key not in gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SeedError, match=message):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1].clone(), r"is float32 \[23, 32\], the most of its kind are float32 \[24, 32\]"),
        (lambda t: t[:0].clone(), r"is float32 \[0, 32\], the most"),
        (lambda t: t.to(torch.uint8), r"is uint8 \[24, 32\], the most of its kind are float32"),
    ],
)
def test_an_expert_of_another_kind_is_named_with_its_file(tmp_path: Path, change, message: str) -> None:
    folder = save_tiny("olmoe", tmp_path / "olmoe")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, EXPERT: change(tensors[EXPERT])}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SeedError, match=f"'{EXPERT}' in model.safetensors {message}"):
        opened(folder)


def test_experts_of_two_dtypes_that_can_be_cast_are_read(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "olmoe")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, EXPERT: tensors[EXPERT].bfloat16()}, folder / "model.safetensors", {"format": "pt"})
    source, _ = opened(folder)
    for key, tensor in stock(folder).items():
        assert torch.equal(read_tensor(source, key), tensor), key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (EXPERT.removeprefix("model."), "some are the same part of 'model.layers.1.mlp.experts.gate_up_proj'"),
        (EXPERT.replace("3", "8"), "'model.layers.1.mlp.experts.gate_up_proj' of the model is made of 8 of these"),
        ("model.layers.1.mlp.experts.gate_up_proj", "are both 'model.layers.1.mlp.experts.gate_up_proj'"),
    ],
)
def test_an_expert_too_many_is_refused(tmp_path: Path, key: str, message: str) -> None:
    folder = save_tiny("olmoe", tmp_path / "olmoe")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, key: tensors[EXPERT].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SeedError, match=message):
        opened(folder)


def test_two_spellings_that_would_change_the_order_of_experts_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "olmoe")
    tensors = load_file(folder / "model.safetensors")
    last = {key for key in tensors if ".experts.7." in key}
    tensors = {key.removeprefix("model.") if key in last else key: tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SeedError, match="two spellings put them out of order"):
        opened(folder)


class Doubled(loading.ConversionOps):
    def convert(self, input_dict, source_patterns, target_patterns, **_):
        return {target_patterns[0]: next(iter(input_dict.values()))[0] * 2}


class Shortened(loading.ConversionOps):
    def convert(self, input_dict, source_patterns, target_patterns, **_):
        return {target_patterns[0]: next(iter(input_dict.values()))[0][:-1]}


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (Doubled(), r"\(Doubled\), which cannot be followed .*aten.mul"),
        (Shortened(), r"\(Shortened\), which cannot be followed .*'.*half_q_proj.weight' are left out"),
        (loading.Transpose(0, 2), r"\(Transpose\), and they do not fit together"),
    ],
)
def test_an_operation_that_cannot_be_followed_is_refused_by_its_name(
    tmp_path: Path, operation: loading.ConversionOps, message: str
) -> None:
    folder = save_tiny("olmo-untied", tmp_path / "olmo")
    tensors = load_file(folder / "model.safetensors")
    tensors = {key.replace("q_proj", "half_q_proj"): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    names = load_architecture(folder).names
    converter = loading.WeightConverter("half_q_proj.weight", "q_proj.weight", [operation])
    with pytest.raises(SeedError, match=rf"'.*half_q_proj.weight' in model.safetensors .*{message}"):
        in_model_names(open_source(folder), replace(names, transforms=(converter,)))


@pytest.mark.skipif(not hasattr(loading, "Split"), reason="this transformers has no such operation")
def test_a_tensor_that_is_split_has_to_have_the_length_of_its_parts(tmp_path: Path) -> None:
    folder = save_tiny("olmo-untied", tmp_path / "olmo")
    tensors = load_file(folder / "model.safetensors")
    names = load_architecture(folder).names
    parts = [f"{name}_proj.weight" for name in "qkv"]
    for layer in range(3):
        held = [tensors.pop(f"model.layers.{layer}.self_attn.{part}") for part in parts]
        tensors[f"model.layers.{layer}.self_attn.qkv.weight"] = torch.cat([*held, held[0][:1]])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    converter = loading.WeightConverter("qkv.weight", parts, [loading.Split(0)])
    with pytest.raises(SeedError, match=r"\(Split\).* an axis of length 97 is split into \[32, 32, 32\]"):
        in_model_names(open_source(folder), replace(names, transforms=(converter,)))


def test_heads_are_stored_as_they_are(tmp_path: Path) -> None:
    architecture = load_architecture(save_tiny("olmoe", tmp_path / "olmoe"))
    architecture.model.heads["future_encoder"] = None
    name = "future_encoder.mlp.experts.gate_up_proj"
    assert list(in_files(architecture.model, {name: TracedTensor.whole((2, 4, 3), torch.float32, name)})) == [name]


def test_keys_of_layers_that_the_model_has_not_are_ignored_as_from_pretrained_ignores_them(tmp_path: Path) -> None:
    folder = save_tiny("deepseek-v3", tmp_path / "deepseek")
    tensors = load_file(folder / "model.safetensors")
    beyond = {k.replace(".layers.2.", ".layers.61."): t.clone() for k, t in tensors.items() if ".layers.2." in k}
    save_file({**tensors, **beyond}, folder / "model.safetensors", {"format": "pt"})
    source, _ = opened(folder)
    assert set(source.ignored) == set(beyond) and len(beyond) > 20


def test_quantised_experts_are_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = save_tiny("gpt-oss", tmp_path / "gpt-oss")
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        del tensors[key]
        tensors |= {f"{key}_{part}": torch.zeros(4, 48, 1, dtype=torch.uint8) for part in ("blocks", "scales")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        SeedError, match=r"8 of these tensors are uint8: the weights are quantised; dequantise them first"
    ):
        convert(str(folder), tmp_path / "dcp", "dcp", Conversion())
    source, architecture = opened(folder)
    model = architecture.model
    needed = dict(model.state_dict()), model.tied_keys, model.computed_buffers, model.parameter_inits
    with pytest.raises(SeedError, match=r"8 of these tensors are uint8: .*Mxfp4Config\(dequantize=True\)"):
        account(*needed, source, [], [])
