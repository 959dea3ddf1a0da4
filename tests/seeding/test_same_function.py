"""Configurations that give the same weights another meaning, field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from flame_ext.errors import SeedError
from flame_ext.seeding.accounting import require_same_function
from flame_ext.seeding.sources.open import open_source
from tests.tiny_models import save_tiny


def compare(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    folder = save_tiny(name, tmp_path / "model")
    expected = AutoConfig.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for field, value in changes.items():
        *tables, last = field.split(".")
        table = config
        for part in tables:
            table = table[part]
        table[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    require_same_function(open_source(folder), expected, trust_remote_code=False)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        (
            "olmo2",
            "rope_parameters.rope_theta",
            5e5,
            "rope_parameters.rope_theta: 500000.0 in the source, 10000.0 in the",
        ),
        (
            "llama-scaled-rope",
            "rope_parameters.factor",
            4.0,
            "rope_parameters.factor: 4.0 in the source, 8.0 in the model",
        ),
        ("olmo2", "rms_norm_eps", 1e-6, "rms_norm_eps: 1e-06 in the source, 1e-05 in the model"),
        ("olmo2", "num_attention_heads", 2, "num_attention_heads: 2 in the source, 4 in the model"),
        ("llama-scaled-rope", "num_key_value_heads", 1, "num_key_value_heads: 1 in the source, 2 in the model"),
        ("olmo2", "hidden_act", "gelu", "hidden_act: 'gelu' in the source, 'silu' in the model"),
        ("olmo2", "tie_word_embeddings", True, "tie_word_embeddings: True in the source, False in the model"),
        ("gemma2", "sliding_window", 8, "sliding_window: 8 in the source, 16 in the model"),
        ("gemma2", "final_logit_softcapping", 20.0, "final_logit_softcapping: 20.0 in the source, 30.0 in the model"),
        ("olmo3-sliding-window", "layer_types", ["full_attention"] * 3, "layer_types: ['full_attention', "),
        ("olmo2", "model_type", "olmo", "model_type: 'olmo' in the source, 'olmo2' in the model"),
    ],
)
def test_another_function_is_refused_by_field_and_values(
    tmp_path: Path, name: str, field: str, value: Any, message: str
) -> None:
    with pytest.raises(SeedError) as e:
        compare(tmp_path, name, {field: value})
    assert message in str(e.value) and "config.json describes another function" in str(e.value)


def test_what_does_not_change_the_function_may_differ(tmp_path: Path) -> None:
    changes = {"transformers_version": "4.40.0", "use_cache": False, "dtype": "float16", "attention_dropout": 0.3}
    compare(tmp_path, "olmo2", {**changes, "initializer_range": 0.1, "bos_token_id": 3, "_name_or_path": "elsewhere"})
