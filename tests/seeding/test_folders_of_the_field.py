"""Folders as other tools leave them: what ``from_pretrained`` makes of them, or what the intact folder is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flame_ext.config.sections import Seed
from flame_ext.errors import SeedError, UserError
from flame_ext.seeding.accounting import Account
from flame_ext.seeding.seed import match
from flame_ext.seeding.sources.source import Source
from flame_ext.seeding.target import seed_target
from flame_ext.tools.architecture import load_architecture
from flame_ext.tools.conversion import Conversion, convert
from tests.tiny_models import save_tiny

FILE = "model.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def mask_buffers(folder: Path) -> None:
    """GPT-2 on the Hub: without the model's prefix, with the causal mask of each layer."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(3)}
    rewrite(folder, lambda state: {key.removeprefix("transformer."): t for key, t in state.items()} | masks)


def masks_and_frequencies(folder: Path) -> None:
    """Pythia on the Hub."""
    names = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
    buffers = {f"gpt_neox.layers.{i}.{name}": torch.ones(4) for i in range(3) for name in names}
    rewrite(folder, lambda state: state | buffers)


def frequencies(folder: Path) -> None:
    rewrite(folder, lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})


def stale_index(folder: Path) -> None:
    (folder / "old.safetensors").write_bytes((folder / FILE).read_bytes())
    index = {"weight_map": dict.fromkeys(load_file(folder / FILE), "old.safetensors")}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))
    rewrite(folder, lambda state: {key: tensor * 1.5 for key, tensor in state.items()})


def listed_but_held_nowhere(folder: Path) -> None:
    (folder / FILE).rename(folder / "one.safetensors")
    names = [*load_file(folder / "one.safetensors"), "lm_head.weight"]  # tied
    (folder / f"{FILE}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")})
    )


def no_architectures(folder: Path) -> None:
    edit(folder, architectures=...)


def base_model(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).base_model.save_pretrained(folder)


def quantisation_left_over(folder: Path) -> None:
    edit(folder, compression_config={"quant_method": "compressed-tensors"})


FOLDERS: list[tuple[str, Callable[[Path], None], int]] = [
    ("gpt2-learned-positions", mask_buffers, 3),
    ("gpt-neox-renamed-keys", masks_and_frequencies, 9),
    ("llama-scaled-rope", frequencies, 1),
    ("olmo-tied", stale_index, 0),
    ("olmo-tied", listed_but_held_nowhere, 0),
    ("qwen3-qk-norm", no_architectures, 0),
    ("qwen3-qk-norm", base_model, 0),
    ("olmo2", quantisation_left_over, 0),
]


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(40, 60)[None]).logits


def matched(folder: Path, source: Path | None = None, **options: Any) -> tuple[Source, Account, list[str]]:
    """A source against the model of ``folder``, as at the seeding of a job."""
    model = load_architecture(folder).model
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.tied_keys}
    return match(seed_target(model, state, model.model_args.load()), source or folder, Seed(**options))[:3]


@pytest.mark.parametrize(("name", "change", "ignored"), FOLDERS, ids=lambda value: getattr(value, "__name__", ""))
def test_it_is_what_from_pretrained_makes_of_it(
    tmp_path: Path, name: str, change: Callable[[Path], None], ignored: int
) -> None:
    folder = save_tiny(name, tmp_path / "source")
    intact = logits(folder)
    change(folder)
    expected = logits(folder)
    assert torch.equal(expected, intact) == (change is not stale_index)
    _, keys, _ = matched(folder)
    assert len(keys.ignored) == ignored and keys.initialised == []
    for to in ("dcp", "hf"):
        convert(str(folder), tmp_path / to, to, Conversion())
    assert torch.equal(logits(tmp_path / "hf"), expected)
    convert(str(tmp_path / "dcp"), tmp_path / "back", "hf", Conversion())
    assert torch.equal(logits(tmp_path / "back"), expected), "a DCP checkpoint keeps what the way back needs"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == [type(AutoModelForCausalLM.from_pretrained(folder)).__name__]
    assert "compression_config" not in config


@pytest.mark.parametrize("wrapped", ["_orig_mod.{}", "module._orig_mod.{}", "{}"])
def test_the_names_of_wrapping_modules_are_taken_out(tmp_path: Path, wrapped: str) -> None:
    folder = save_tiny("olmo2", tmp_path / "source")
    expected = logits(folder)

    def rename(key: str) -> str:
        return wrapped.format(key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."))

    rewrite(folder, lambda state: {rename(key): tensor for key, tensor in state.items()})
    source, keys, _ = matched(folder)
    assert len(keys.loaded) == len(source.entries) and any("wrappers" in line for line in source.passed_over)
    convert(str(folder), tmp_path / "hf", "hf", Conversion())
    assert torch.equal(logits(tmp_path / "hf"), expected)


def test_patterns_rename_the_keys_of_every_layer(tmp_path: Path) -> None:
    folder = save_tiny("olmo2", tmp_path / "source")
    old, new = "blocks.{}.attn.", "model.layers.{}.self_attn."

    def rename(key: str) -> str:
        for i in range(3):
            key = key.replace(new.format(i), old.format(i))
        return key

    rewrite(folder, lambda state: {rename(key): tensor for key, tensor in state.items()})
    with pytest.raises(SeedError, match=r"blocks\.\*\.attn"):
        matched(folder)
    _, keys, _ = matched(folder, key_map=["blocks.*.attn.=model.layers.*.self_attn."])
    assert len(keys.loaded) == len(load_file(folder / FILE))
    with pytest.raises(SeedError, match="as many"):
        matched(folder, key_map=["blocks.*.attn.=model.self_attn."])


def test_keys_that_are_left_out_of_a_conversion(tmp_path: Path) -> None:
    folder = save_tiny("olmo2", tmp_path / "source")
    expected = logits(folder)
    rewrite(folder, lambda state: state | {"score.weight": torch.ones(2)})
    with pytest.raises(SeedError, match=r"score\.weight"):
        convert(str(folder), tmp_path / "out", "hf", Conversion())
    done = convert(str(folder), tmp_path / "out", "hf", Conversion(ignore_source_keys=("score.*",)))
    assert any("score.weight" in line for line in done.passed_over)
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_the_remedy_for_an_output_embedding_that_is_not_there(tmp_path: Path) -> None:
    folder = save_tiny("olmo-tied", tmp_path / "source")
    expected = logits(folder)
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(SeedError) as e:
        matched(folder)
    assert "'lm_head.weight' [264, 32] is missing" in str(e.value)
    assert "set tie_word_embeddings = true in config.json" in str(e.value) and "new_parameters" not in str(e.value)
    edit(folder, tie_word_embeddings=True)
    convert(str(folder), tmp_path / "hf", "hf", Conversion())
    assert torch.equal(logits(tmp_path / "hf"), expected)


def test_a_value_that_no_model_can_be_built_with_is_named(tmp_path: Path) -> None:
    folder = save_tiny("olmo-tied", tmp_path / "source")
    edit(folder, pad_token_id=264)
    with pytest.raises(
        UserError, match=r"source'.*pad_token_id 264 is no row of its embedding \(vocab_size 264\); set"
    ):
        load_architecture(folder)
    edit(folder, pad_token_id=None)
    assert load_architecture(folder).model.config.pad_token_id is None


def test_a_difference_in_the_configuration_can_be_allowed(tmp_path: Path) -> None:
    base, source = save_tiny("olmo2", tmp_path / "base"), save_tiny("olmo2", tmp_path / "source")
    edit(source, unsloth_fixed=True, id2label={"0": "a"}, label2id={"a": 0}, model_max_length=9, finetuning_task="x")
    assert matched(base, source)[2] == [], "fields that no model reads"
    edit(source, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    with pytest.raises(SeedError) as e:
        matched(base, source)
    remedy = 'seed.allow_config_difference = ["rope_parameters.rope_theta"]'
    assert remedy in str(e.value) and "unsloth" not in str(e.value)
    assert matched(base, source, allow_config_difference=["rope_parameters.rope_theta"])[2] == [
        "rope_parameters.rope_theta: 1000000.0 in the source, 10000.0 in the model"
    ]
    with pytest.raises(SeedError, match="rms_norm_eps: no difference of this name"):
        matched(base, source, allow_config_difference=["rope_parameters.rope_theta", "rms_norm_eps"])
