"""The tokens before and after a document, and whether a tokenizer belongs to the model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from flame_ext.config.sections import FlameJobConfig
from flame_ext.data.tokenizer import around_a_document, build_tokenizer, require_of_model
from flame_ext.errors import ConfigError
from tests.ranks import TINY_OLMO


def tokenizer_in(folder: Path, **changes: Any):
    """The tiny OLMo's tokenizer with other entries in tokenizer_config.json; None removes one."""
    AutoTokenizer.from_pretrained(TINY_OLMO).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    entries = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))
    config = FlameJobConfig()
    config.model.hf_assets_path = str(folder)
    return build_tokenizer(config)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, [], ["<eos>"]),
        ({"bos_token": "a"}, ["a"], ["<eos>"]),
        ({"bos_token": "a", "add_bos_token": False}, [], ["<eos>"]),
        ({"bos_token": "a", "add_eos_token": False}, ["a"], ["<eos>"]),
        ({"bos_token": "<eos>"}, [], ["<eos>"]),
        ({"bos_token": "<eos>", "add_bos_token": True}, ["<eos>"], ["<eos>"]),
        ({"eos_token": None}, [], []),
    ],
)
def test_what_stands_around_a_document(tmp_path: Path, changes: dict, before: list, after: list) -> None:
    eos = AutoTokenizer.from_pretrained(TINY_OLMO).eos_token
    changes = {key: eos if value == "<eos>" else value for key, value in changes.items()}
    tokenizer = tokenizer_in(tmp_path, **changes)
    ids = {"a": tokenizer.token_to_id("a"), "<eos>": tokenizer.token_to_id(eos)}
    assert around_a_document(tokenizer) == ([ids[token] for token in before], [ids[token] for token in after])
    assert tokenizer.eos_id == (ids["<eos>"] if after else None)


def test_what_the_tokenizer_puts_itself_is_not_put_again(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer_in(tmp_path, bos_token="a")
    inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", inner.token_to_id("a"))])
    inner.save(str(tmp_path / "tokenizer.json"))
    config = FlameJobConfig()
    config.model.hf_assets_path = str(tmp_path)
    assert around_a_document(build_tokenizer(config)) == ([], [inner.token_to_id("<|endoftext|>")])


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, config = tokenizer_in(tmp_path), AutoConfig.from_pretrained(TINY_OLMO)
    with caplog.at_level(logging.WARNING):
        require_of_model(tokenizer, config, "some/folder")
    assert not caplog.records
    config.eos_token_id = [5, 7]
    require_of_model(tokenizer, config, "some/folder")
    assert (
        "some/folder: documents end with the tokenizer's EOS, 0, and config.json has eos_token_id [5, 7]" in caplog.text
    )
    config.vocab_size = 100
    with pytest.raises(
        ConfigError, match="some/folder: the tokenizer's id 257 .* beyond the model's vocab_size 100: .*another model"
    ):
        require_of_model(tokenizer, config, "some/folder")
