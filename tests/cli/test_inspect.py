"""``flame-ext inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flame_ext.cli.main import main
from tests.ranks import TINY_OLMO


def test_inspect_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(TINY_OLMO), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"] == "hf-safetensors" and len(facts["keys"]) == 29
    assert facts["keys"]["model.embed_tokens.weight"] == {
        "shape": [264, 128], "dtype": "bfloat16", "bytes": 264 * 128 * 2, "file": "model.safetensors",
    }  # fmt: skip
    assert facts["bytes"] == sum(key["bytes"] for key in facts["keys"].values())
    assert main(["inspect", str(TINY_OLMO)]) == 0
    table = capsys.readouterr().out
    assert all(key in table for key in facts["keys"]) and "264x128" in table


def test_inspect_refuses_what_it_can_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "does not exist" in captured.err and not captured.out
