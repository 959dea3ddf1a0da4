"""The pieces of new tokens, against what the old tokenizer makes of their text in the middle of another one."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flame_ext.seeding.vocabulary import _pieces

MERGES = [("H", "a"), ("Ha", "u"), ("Hau", "s"), ("d", "e")]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrapped(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def bpe(characters: list[str], merges: list[tuple[str, str]], tokens: list[str], **options: object) -> models.BPE:
    vocabulary = list(dict.fromkeys([*characters, *(a + b for a, b in merges), *tokens]))
    return models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=merges, **options)


def sentencepiece(kind: str, tokens: list[str], bytes_too: bool = True) -> PreTrainedTokenizerFast:
    """As Llama's and Mistral's tokenizers: "▁" for a space, one before each text, and bytes for what has no piece."""
    characters = ["<unk>", *(BYTES if bytes_too else []), *"▁Hausdefrb.x"]
    merges = [*MERGES, ("▁", "Haus"), ("▁", "de")]
    backend = Tokenizer(bpe(characters, merges, tokens, unk_token="<unk>", byte_fallback=bytes_too, fuse_unk=True))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return wrapped(backend, unk_token="<unk>")


def byte_level(kind: str, tokens: list[str]) -> PreTrainedTokenizerFast:
    """As GPT-2's and OLMo's tokenizers: a character for each byte."""
    merges = [*MERGES, ("Ġ", "Haus")]
    backend = Tokenizer(bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), merges, tokens))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def inside_of_a_text(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """The ids of a text after a full stop, with which nothing merges."""
    before = tokenizer(".", add_special_tokens=False)["input_ids"]
    after = tokenizer(f".{text}", add_special_tokens=False)["input_ids"]
    assert after[: len(before)] == before
    return tuple(after[len(before) :])


# Of a token, its spelling in either kind of vocabulary, and its text.
SPELLED = [
    ("▁Häuser", "ĠHÃ¤user", " Häuser"),
    ("Hausfer", "Hausfer", "Hausfer"),
    ("▁über", "ĠÃ¼ber", " über"),
    ("▁日", "ĠæĹ¥", " 日"),
]


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never"])
def test_pieces_of_sentencepiece(kind: str) -> None:
    old, new = sentencepiece(kind, []), sentencepiece(kind, [spelled for spelled, _, _ in SPELLED])
    check(old, new, {spelled: text for spelled, _, text in SPELLED})


@pytest.mark.parametrize("kind", ["plain", "prefix"])
def test_pieces_of_bytes(kind: str) -> None:
    old, new = byte_level(kind, []), byte_level(kind, [spelled for _, spelled, _ in SPELLED])
    check(old, new, {spelled: text for _, spelled, text in SPELLED})


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never", "plain", "prefix"])
@pytest.mark.parametrize("normalized", [False, True])
def test_pieces_of_added_tokens(kind: str, normalized: bool) -> None:
    """No space is put before them, as is before a text; one that they have is one."""
    build = byte_level if kind in ("plain", "prefix") else sentencepiece
    words = ["Häuser", " Häuser", " Hausx", "de Haus"]
    new = build(kind, [])
    new.add_tokens([AddedToken(word, normalized=normalized) for word in words])
    check(build(kind, []), new, {word: word for word in words})


def test_padding_and_truncation_that_a_file_sets_are_no_pieces() -> None:
    old, new = sentencepiece("first", []), sentencepiece("first", [])
    old.backend_tokenizer.enable_padding(length=16)
    old.backend_tokenizer.enable_truncation(2)
    new.add_tokens([AddedToken("Häuser", normalized=False)])
    check(old, new, {"Häuser": "Häuser"})


def check(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, texts: dict[str, str]) -> None:
    rows = len(old.get_vocab())
    found = _pieces(new, old, range(rows, len(new.get_vocab())), rows)
    expected = {new.get_vocab()[token]: inside_of_a_text(old, text) for token, text in texts.items()}
    assert found == expected
    assert all(old.unk_token_id not in pieces and len(pieces) > 1 for pieces in found.values())


def test_a_byte_that_the_old_tokenizer_does_not_know_is_no_text() -> None:
    old = sentencepiece("never", [], bytes_too=False)
    vocabulary = old.get_vocab() | {token: 1000 + number for number, token in enumerate(BYTES)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    new = wrapped(backend, unk_token="<unk>")
    assert _pieces(new, old, range(1000, 1256), len(old.get_vocab())) == {}


def test_a_byte_of_a_unigram_model_is_no_text() -> None:
    """As of T5's and XGLM's tokenizers, which do not say whether they have bytes."""
    scores = [("<unk>", 0.0), *((character, -9.0) for character in "▁Haus<0xC3>")]
    old = wrapped(Tokenizer(models.Unigram(scores, 0, False)), unk_token="<unk>")
    grown = [*scores, ("Haus", -1.0), ("<0xC3>", -9.0)]
    new = wrapped(Tokenizer(models.Unigram(grown, 0, True)), unk_token="<unk>")
    rows = len(scores)
    assert _pieces(new, old, range(rows, rows + 2), rows) == {rows: tuple(old.convert_tokens_to_ids(list("Haus")))}
