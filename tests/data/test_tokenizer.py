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

TEXT = "Some words, 12345;\nf(x);\n\ndef g():\n\treturn 'the é 😀'  # " * 3


def tokenizer_in(folder: Path, *, save: bool = True, **changes: Any):
    """The tiny OLMo's tokenizer, or the one that is there, with other entries in tokenizer_config.json; None removes one."""
    if save:
        AutoTokenizer.from_pretrained(TINY_OLMO).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if changes:
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
    config.eos_token_id, config.bos_token_id = 0, 5
    tokenizer.config["add_bos_token"], tokenizer.bos_id = True, 3
    require_of_model(tokenizer, config, "some/folder")
    assert "documents begin with the tokenizer's BOS, 3, and config.json has bos_token_id [5]" in caplog.text
    tokenizer.eos_id, config.eos_token_id = None, 0
    require_of_model(tokenizer, config, "some/folder")
    assert (
        "the tokenizer has no EOS, so documents of text follow each other without one; config.json has eos_token_id [0]"
        in caplog.text
    )


def test_ids_beyond_the_vocabulary_are_refused_where_they_occur(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, config = tokenizer_in(tmp_path), AutoConfig.from_pretrained(TINY_OLMO)
    config.vocab_size = last = 257
    token = tokenizer.id_to_token(last)
    require_of_model(tokenizer, config, "some/folder")
    assert f"some/folder: the tokenizer's id 257 ({token!r}) is beyond the model's vocab_size 257" in caplog.text
    assert (
        tokenizer.encode("some text")
        == tokenizer.ids("some text")
        == AutoTokenizer.from_pretrained(TINY_OLMO)("some text").input_ids
    )
    for encode in (tokenizer.encode, tokenizer.ids):
        with pytest.raises(ConfigError, match=f"a text has the tokenizer's id 257 .* vocab_size {last}"):
            encode("some text with í, whose second byte is that token")
    tokenizer.eos_id = 257
    with pytest.raises(ConfigError, match="the tokenizer's EOS, id 257, is beyond .*has to name eos_token"):
        require_of_model(tokenizer, config, "some/folder")


@pytest.mark.parametrize("call", [{"truncation": True, "max_length": 4}, {"padding": "max_length", "max_length": 99}])
def test_truncation_and_padding_in_the_file_are_not_applied(
    tmp_path: Path, call: dict, caplog: pytest.LogCaptureFixture
) -> None:
    before, auto = tokenizer_in(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    auto("some words", **call)
    auto.save_pretrained(tmp_path)
    after = tokenizer_in(tmp_path, save=False)
    assert (
        after.ids(TEXT)
        == after.encode(TEXT)
        == before.ids(TEXT)
        == AutoTokenizer.from_pretrained(TINY_OLMO)(TEXT).input_ids
    )
    assert f"{tmp_path}/tokenizer.json: saved with {next(iter(call))} of" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "eos"),
    [("qwen2", "Qwen2Tokenizer", "<|endoftext|>"), ("gpt2", None, None), ("llama", "GPT2Tokenizer", None)],
)
def test_a_folder_without_tokenizer_json_gives_the_ids_of_autotokenizer(
    tmp_path: Path, model_type: str, tokenizer_class: str | None, eos: str | None
) -> None:
    """``;`` and the end of a line are one token for Qwen's pattern and two for GPT-2's."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = [("1", "2"), ("t", "h"), (";", "Ċ"), (")", ";Ċ")]
    tokens = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges), "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    named = {"tokenizer_class": tokenizer_class, "eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: v for key, v in named.items() if v}))
    tokenizer, auto = tokenizer_in(tmp_path, save=False), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.ids(TEXT) == auto(TEXT).input_ids and tokenizer.eos_id == auto.eos_token_id == len(tokens) - 1
    assert auto("f(x);\n").input_ids[-1] != auto("f(x);").input_ids[-1] or model_type != "qwen2"


def byte_level(folder: Path, model_type: str, **config: Any) -> None:
    """vocab.json and merges.txt with every byte and one special token, 0."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["</s>", *sorted(ByteLevel.alphabet())]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    AutoConfig.for_model(model_type).save_pretrained(folder)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "</s>")
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **config}))


def test_what_transformers_saves_of_a_class_with_other_files_is_read(tmp_path: Path) -> None:
    byte_level(tmp_path, "gpt2", tokenizer_class="GPT2Tokenizer")
    auto = AutoTokenizer.from_pretrained(tmp_path)
    auto.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    assert "tokenizer.json" not in auto.vocab_files_names.values()
    assert tokenizer_in(tmp_path, save=False).ids(TEXT) == auto(TEXT).input_ids


def test_an_eos_before_the_text_is_no_eos_after_it(tmp_path: Path) -> None:
    """OPT's begins each text."""
    byte_level(tmp_path, "opt", tokenizer_class="GPT2Tokenizer", add_bos_token=True)
    tokenizer, auto = tokenizer_in(tmp_path, save=False), AutoTokenizer.from_pretrained(tmp_path)
    before, after = around_a_document(tokenizer)
    assert [*before, *tokenizer.ids(TEXT)] == auto(TEXT).input_ids and auto(TEXT).input_ids[0] == 0 and after == [0]


def test_a_tokenizer_that_finds_no_token_is_refused(tmp_path: Path) -> None:
    """AutoTokenizer builds Qwen's own class, of which this vocabulary has nothing, whatever tokenizer_class says."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "the": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "eos_token": "<eos>"}')
    AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("the the").input_ids == []
    with pytest.raises(
        ConfigError, match="a Qwen2Tokenizer that finds no token in any text; .*make the data's input_ids"
    ):
        tokenizer_in(tmp_path, save=False)


def test_eos_is_read_from_special_tokens_map(tmp_path: Path) -> None:
    tokenizer_in(tmp_path, eos_token=None)
    assert tokenizer_in(tmp_path, save=False).eos_id is None
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}, "bos_token": "a"}')
    tokenizer = tokenizer_in(tmp_path, save=False)
    assert around_a_document(tokenizer) == ([tokenizer.token_to_id("a")], [0])
    assert AutoTokenizer.from_pretrained(tmp_path).bos_token_id == tokenizer.bos_id


def test_a_file_that_autotokenizer_takes_apart_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-NeoX's class takes the vocabulary alone, and has a normaliser of its own."""
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Lowercase

    tokenizer_in(tmp_path, tokenizer_class="GPTNeoXTokenizer")
    assert not caplog.records
    inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.normalizer = Lowercase()
    inner.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_in(tmp_path, save=False).ids(TEXT) == AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids
    assert "AutoTokenizer builds a GPTNeoXTokenizer from it, which gives other ids than the file itself" in caplog.text
    mended = tokenizer_in(tmp_path, save=False, tokenizer_class="TokenizersBackend")
    assert mended.ids(TEXT) == AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids == inner.encode(TEXT).ids


def test_a_vocabulary_that_is_not_of_the_class_is_refused(tmp_path: Path) -> None:
    """Gemma's class needs tokens for bytes and <unk>."""
    tokenizer_in(tmp_path, tokenizer_class=None, backend=None)
    AutoConfig.for_model("gemma").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="AutoTokenizer cannot read the tokenizer .*TokenizersBackend"):
        tokenizer_in(tmp_path, save=False)
    mended = tokenizer_in(tmp_path, save=False, tokenizer_class="TokenizersBackend")
    assert mended.ids(TEXT) == AutoTokenizer.from_pretrained(TINY_OLMO)(TEXT).input_ids


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, "AutoTokenizer cannot read the tokenizer"),
        ({"tokenizer.model": "no"}, "AutoTokenizer cannot read the tokenizer .*pip install sentencepiece"),
        ({"vocab.txt": "a"}, "AutoTokenizer reads a GPTNeoXTokenizer, and none of its files is there"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["a.B", null]}, "tokenizer_class": "B"}'},
         "AutoTokenizer cannot read the tokenizer .*"),
    ],
)  # fmt: skip
def test_what_autotokenizer_cannot_read_is_said_in_one_line(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    (tmp_path / "config.json").write_bytes((TINY_OLMO / "config.json").read_bytes())
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        tokenizer_in(tmp_path, save=False)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_written_in_python(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(["<unk>", "a@@", "b@@", "a", "b", "ab"])})
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    AutoConfig.for_model("ctrl").save_pretrained(tmp_path)
    tokenizer, auto = tokenizer_in(tmp_path, save=False), AutoTokenizer.from_pretrained(tmp_path)
    assert not auto.is_fast
    assert tokenizer.ids("ab a b") == tokenizer.encode("ab a b") == auto("ab a b").input_ids == [5, 3, 4]
    assert tokenizer.get_vocab_size() == 6 and tokenizer.token_to_id("ab") == 5
