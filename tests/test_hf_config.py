"""Whatever stands in ``config.json``, the message is one line that names the file and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flame_ext.errors import ConfigError
from flame_ext.hf_config import load_hf_config
from tests.tiny_models import save_tiny


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("hidden_size", "64"),
            ("rope_parameters", {"rope_type": "yarn"}),
            ("model_type", ["llama"]),
            ("dtype", "float99"),
        ),
        *(
            ("id2label", [1]),
            ("auto_map", 3),
            ("eos_token_id", "x"),
            ("configuration_files", 3),
            ("quantization_config", 3),
        ),
        *(("layer_types", 3), ("num_hidden_layers", {}), ("id2label", {"x": "y"})),
    ],
)
def test_the_field_is_named(tmp_path: Path, field: str, value: Any) -> None:
    file = save_tiny("olmo2", tmp_path / "model") / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, field: value}))
    with pytest.raises(ConfigError) as e:
        load_hf_config(str(file.parent))
    message = str(e.value)
    assert message.startswith(f"model.hf_assets_path {str(file.parent)!r}: no usable config.json: {field} is ")
    assert "\n" not in message


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 10**6, b'{"text_config": 3, "model_type": "gemma3"}']
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ConfigError, match="no usable config.json"):
        load_hf_config(str(tmp_path))
