"""The small files of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3Config, Phi3Config, PreTrainedConfig

from flame_ext.checkpoint.assets import CARRIED_FILES, code_stays, read_assets, with_former_names
from flame_ext.errors import SeedError
from flame_ext.tools.conversion import Conversion, convert
from tests.tiny_models import CONFIGS, save_tiny

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
PHI3_LONG = Phi3Config(
    hidden_size=32, num_attention_heads=4, max_position_embeddings=256, original_max_position_embeddings=32, pad_token_id=None,
    rope_parameters={"rope_type": "longrope", "rope_theta": 1e5, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
)  # fmt: skip
PART = {"rope_theta": 10000.0, "rope_scaling": None}


@pytest.mark.parametrize(
    ("config", "former"),
    [
        (CONFIGS["olmo2"], {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}),
        (CONFIGS["llama-scaled-rope"], {"rope_theta": 10000.0, "rope_scaling": LLAMA3}),
        (CONFIGS["gpt-neox-renamed-keys"], {"rotary_emb_base": 10000.0, "rotary_pct": 0.25, "rope_scaling": None}),
        (CONFIGS["phi-biases-partial-rope"], {**PART, "partial_rotary_factor": 0.5}),
        (CONFIGS["gemma3-rope-per-layer"], {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}),
        (PHI3_LONG, {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}),
        (CONFIGS["gpt2-learned-positions"], {"torch_dtype": "bfloat16", "rope_theta": ..., "rope_scaling": ...}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_configuration_has_the_names_of_transformers_4(config: PreTrainedConfig, former: dict[str, Any]) -> None:
    """The expected values are those that transformers 4.57 was seen to compute the same logits with."""
    fields = json.loads(config.to_json_string()) | {"dtype": "bfloat16"}
    written = with_former_names(fields, config)
    assert {name: written.get(name, ...) for name in former} == former
    assert {name: written[name] for name in fields} == fields, "nothing else changes"


def test_every_tiny_model_and_a_nested_one_keep_their_meaning(tmp_path: Path) -> None:
    nested = Gemma3Config(text_config=CONFIGS["gemma3-rope-per-layer"].to_dict())
    for name, config in {**CONFIGS, "nested": nested}.items():
        config.save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        before = AutoConfig.from_pretrained(file.parent).to_dict()
        written = with_former_names(json.loads(file.read_text()), config)
        file.write_text(json.dumps(written))
        after = AutoConfig.from_pretrained(file.parent).to_dict()
        assert {key: after[key] for key in before} == before
    assert written["text_config"]["rope_local_base_freq"] == 10000.0


AUTO_MAP = {"AutoConfig": "configuration_own.Own", "AutoTokenizer": ["tokenization_own.Own", None]}


def test_code_that_stays_behind_is_named_from_outside_or_not_at_all(tmp_path: Path) -> None:
    fields = {"a": 1, "auto_map": AUTO_MAP}
    assert code_stays(fields, tmp_path, used=False) == {"a": 1}
    assert code_stays(fields, tmp_path, used=True)["auto_map"] == {
        "AutoConfig": f"{tmp_path}--configuration_own.Own",
        "AutoTokenizer": [f"{tmp_path}--tokenization_own.Own", None],
    }
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123"
    assert code_stays(fields, snapshot, used=True)["auto_map"]["AutoConfig"] == "org/name--configuration_own.Own"
    assert code_stays({"a": 1}, tmp_path, used=True) == {"a": 1}


def test_an_export_without_the_code_that_it_does_not_need_can_be_loaded(tmp_path: Path) -> None:
    folder = save_tiny("phi3-fused-qkv", tmp_path / "source")
    for name, classes in (("config.json", {"AutoModelForCausalLM": "own.Own"}), ("tokenizer_config.json", AUTO_MAP)):
        fields = json.loads((folder / name).read_text()) | {"auto_map": classes}
        (folder / name).write_text(json.dumps(fields))
    convert(str(folder), tmp_path / "out", "hf", Conversion())
    for trusted in (False, True):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trusted)
        AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trusted)


@pytest.mark.parametrize("content", ["", '{"temperature": 0.9, "do_sample": false}', '{"pad_token_id": -1}'])
def test_what_is_only_carried_is_carried_as_it_is(tmp_path: Path, content: str) -> None:
    folder = save_tiny("olmo2", tmp_path / "source")
    for name in set(CARRIED_FILES) - {"tokenizer.json", "tokenizer_config.json"}:
        (folder / name).write_text(content)
    convert(str(folder), tmp_path / "out", "hf", Conversion())
    for name in CARRIED_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("content", ["[]", '{"max_new_tokens": -1}', '{"num_return_sequences": 4}'])
def test_a_generation_configuration_that_from_pretrained_fails_with_is_refused(tmp_path: Path, content: str) -> None:
    folder = save_tiny("olmo2", tmp_path / "source")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(
        SeedError, match=r"source/generation_config\.json: from_pretrained cannot use it \(.*\); correct or delete"
    ):
        read_assets(folder, trust_remote_code=False)
    (folder / "generation_config.json").unlink()
    read_assets(folder, trust_remote_code=False)


def test_a_file_that_cannot_be_carried_is_refused_when_it_is_read(tmp_path: Path) -> None:
    folder = save_tiny("olmo2", tmp_path / "source")
    (folder / "tokenizer_config.json").write_text('{"auto_map": ')
    with pytest.raises(SeedError, match=r"tokenizer_config\.json: its file is not valid JSON"):
        read_assets(folder, trust_remote_code=False)
    (folder / "tokenizer_config.json").unlink()
    (folder / "merges.txt").mkdir()
    with pytest.raises(SeedError, match=r"merges\.txt: is not a file"):
        read_assets(folder, trust_remote_code=False)
