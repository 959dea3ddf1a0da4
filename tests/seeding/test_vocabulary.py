"""A vocabulary that grows at step 0, against transformers' own resizing, means in NumPy, and the source's logits."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from flame_ext.config.sections import FlameJobConfig, Seed
from flame_ext.errors import ConfigError, SeedError
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.preflight.parse import parse
from flame_ext.seeding import new_rows
from flame_ext.seeding.new_rows import fill_new_rows
from flame_ext.seeding.proof.parity import require_silent_padding
from flame_ext.seeding.read import read_weights
from flame_ext.seeding.seed import match
from flame_ext.seeding.target import seed_target
from flame_ext.seeding.vocabulary import Growth, _require_no_other_table, of_source
from tests.ranks import DEBUG_TOML
from tests.tiny_models import CONFIGS, save_tiny

OLD = 264  # rows of the tiny models; their tokenizer has 258 ids
# With these, 266 ids: six take the rows that the source holds as padding, and two are new.
WORDS = ["import", " return", "self.", "for ", "naïve", "def f", "<reserved>", "ab"]
PAD = 4


def grown_folder(source: Path, folder: Path, words: list[str] = WORDS) -> Path:
    """What a user makes: the model's ``config.json``, and its tokenizer with more tokens."""
    folder.mkdir(parents=True)
    shutil.copyfile(source / "config.json", folder / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=word.startswith("<")) for word in words])
    tokenizer.save_pretrained(folder)
    return folder


def seeded(source: Path, folder: Path, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """The state of a grown model in this process, every element of which was NaN, and its growth."""
    config = FlameJobConfig()
    config.model.hf_assets_path = str(folder)
    config.seed = Seed(resize_vocabulary=True, **options)
    args = HFModelArgs()
    args.update_from_config(config)
    model = build_hf_causal_lm(args)
    state = {
        key: torch.full(tensor.shape, torch.nan)
        for key, tensor in model.state_dict().items()
        if key not in model.tied_keys
    }
    target = seed_target(model, state, args.load())
    found, _, _, growth = match(target, source, config.seed)
    shapes = {} if growth is None else growth.shapes
    read_weights(found, state, model.tied_keys, check_finite=True, growing=shapes)
    if growth is not None:
        fill_new_rows(found, state, model.tied_keys, growth, {}, 0.02, config.seed.rng_seed)
    return state, growth


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("phi-biases-partial-rope", tmp_path_factory.mktemp("phi") / "source", max_shard_size="20KB")


def rows_of(source: Path) -> dict[str, np.ndarray]:
    """The float64 rows of each tensor of a vocabulary, by another reader."""
    files = sorted(source.glob("*.safetensors"))
    held = {key: tensor for file in files for key, tensor in load_file(file).items()}
    return {key: tensor.double().numpy() for key, tensor in held.items() if tensor.shape[0] == OLD}


@pytest.mark.parametrize("block", [1 << 18, 32 * 16], ids=["one-block", "many-blocks"])
def test_old_rows_are_the_sources_and_new_ones_their_mean(
    phi: Path, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_rows, "_BLOCK_ELEMENTS", block)
    state, growth = seeded(phi, grown_folder(phi, tmp_path / "new"), pad_vocabulary_to_multiple_of=PAD)
    stock = AutoModelForCausalLM.from_pretrained(phi, dtype=torch.float32)
    stock.resize_token_embeddings(266, pad_to_multiple_of=PAD)
    expected = stock.state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {k: t.shape for k, t in expected.items()}
    assert state["lm_head.weight"].shape == (268, 32), "two tokens and two rows of padding"
    old = rows_of(phi)
    assert set(old) == {"lm_head.bias", "lm_head.weight", "model.embed_tokens.weight"} == set(growth.shapes)
    for key, tensor in state.items():
        kept = tensor[:OLD] if key in old else tensor
        assert torch.equal(kept, expected[key][: len(kept)]), key
    for key, rows in old.items():
        mean = torch.from_numpy(np.asarray(rows.mean(0))).float()
        assert torch.equal(state[key][OLD:], mean.expand(4, *mean.shape)), key
    record = {k: v for k, v in growth.record.items() if k != "keys"}
    assert record == {"rows_loaded": 264, "rows_initialised": 4, "of_which_padding": 2, "new_rows": "mean"}
    assert "264 rows loaded, 4 initialised in each of lm_head.bias, lm_head.weight" in str(growth)


def test_an_id_between_tokens_that_none_has_is_padding(phi: Path, tmp_path: Path) -> None:
    folder = grown_folder(phi, tmp_path / "new")
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["vocab"]["ab far away"] = 280
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    state, growth = seeded(phi, folder, new_rows="random", pad_vocabulary_to_multiple_of=PAD)
    assert growth.padding == [*range(267, 280), *range(281, 284)], "the tokens that were added moved up by one"
    assert growth.record["of_which_padding"] == 16 and "4 of new tokens" in str(growth)
    for key, rows in rows_of(phi).items():
        mean = torch.from_numpy(np.asarray(rows.mean(0))).float()
        assert torch.equal(state[key][growth.padding], mean.expand(16, *mean.shape)), key
        if state[key].ndim > 1:
            assert not (state[key][[264, 265, 266, 280]] == mean).all(dim=1).any(), key


def test_subwords_by_a_tokenizer_that_has_grown_itself_are_refused(phi: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phi, source)
    folder = grown_folder(phi, tmp_path / "new")
    shutil.copyfile(folder / "tokenizer.json", source / "tokenizer.json")
    shutil.copyfile(folder / "tokenizer_config.json", source / "tokenizer_config.json")
    with pytest.raises(
        SeedError, match="needs the tokenizer from before the growth, and the one there has 266 ids for 264"
    ):
        seeded(source, folder, new_rows="subwords")
    seeded(source, folder, new_rows="mean")


def test_a_model_with_another_table_of_tokens_does_not_grow() -> None:
    table, backbone = torch.nn.Embedding(OLD, 4), torch.nn.Module()
    backbone.embed_tokens_per_layer = table
    with pytest.raises(
        SeedError, match="'embed_tokens_per_layer' has 264 rows, one for each token, and does not grow to 268"
    ):
        _require_no_other_table(backbone, torch.nn.Embedding(OLD, 8).weight, 268, "assets")


def test_a_subword_row_is_the_mean_of_the_old_tokenizers_pieces(phi: Path, tmp_path: Path) -> None:
    folder = grown_folder(phi, tmp_path / "new", [*(f"filler{i}" for i in range(6)), "é2", "<special>", "aab"])
    state, growth = seeded(phi, folder, new_rows="subwords", pad_vocabulary_to_multiple_of=4)
    # The old tokenizer is one token for each byte.
    ids = AutoTokenizer.from_pretrained(phi)
    pieces = {264: ids("é2")["input_ids"], 266: ids("aab")["input_ids"]}
    assert [len(p) for p in pieces.values()] == [3, 3] and growth.record["of_which_without_pieces"] == 1
    for key, rows in rows_of(phi).items():
        expected = {number: rows[taken].mean(0) for number, taken in pieces.items()}
        expected |= {265: rows.mean(0), 267: rows.mean(0)}  # special, padding
        for number, row in expected.items():
            assert torch.equal(state[key][number], torch.from_numpy(np.asarray(row)).float()), (key, number)


def test_a_merged_token_is_spelled_as_the_old_tokenizer_spells_it(phi: Path, tmp_path: Path) -> None:
    """A token of the tokenizer itself, not an added one: a space and a part of a character, which no decoded text has."""
    folder = grown_folder(phi, tmp_path / "new", [])
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["vocab"] |= {f"x{i}": 258 + i for i in range(6)} | {"ĠÃ": OLD}
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    _, growth = seeded(phi, folder, new_rows="subwords")
    vocabulary = AutoTokenizer.from_pretrained(phi).get_vocab()
    assert dict(growth.pieces) == {OLD: (vocabulary["Ġ"], vocabulary["Ã"])}


def test_random_rows_have_the_models_deviation_and_padding_is_the_mean(phi: Path, tmp_path: Path) -> None:
    folder = grown_folder(phi, tmp_path / "new", [f"word{i}" for i in range(406)])
    state, growth = seeded(phi, folder, new_rows="random", pad_vocabulary_to_multiple_of=512)
    other, _ = seeded(phi, folder, new_rows="random", pad_vocabulary_to_multiple_of=512, rng_seed=1)
    assert growth.tokens == 664 and growth.rows == 1024
    for key, rows in rows_of(phi).items():
        mean = torch.from_numpy(np.asarray(rows.mean(0))).float()
        assert torch.equal(state[key][664:], mean.expand(360, *mean.shape))
        if key == "lm_head.bias":
            assert torch.equal(state[key][OLD:664], mean.expand(400))
        else:
            drawn = state[key][OLD:664]
            assert drawn.std().item() == pytest.approx(0.02, rel=0.03) and abs(drawn.mean().item()) < 1e-3
            assert drawn.unique().numel() > 0.95 * drawn.numel() and not torch.equal(drawn, other[key][OLD:664])


def test_nothing_grows_where_the_tokenizer_fits(phi: Path, tmp_path: Path) -> None:
    """As OLMo's: 50,304 rows for 50,280 ids."""
    state, growth = seeded(phi, grown_folder(phi, tmp_path / "new", WORDS[:6]))
    assert growth is None and state["lm_head.weight"].shape == (OLD, 32)
    _, growth = seeded(phi, grown_folder(phi, tmp_path / "padded", []), pad_vocabulary_to_multiple_of=128)
    assert growth is not None and (growth.loaded, growth.tokens, growth.rows) == (OLD, OLD, 384)


def as_config(folder: Path, vocab_size: int) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": vocab_size}))


def larger_config(folder: Path, _source: Path) -> None:
    as_config(folder, 300)


def moved_ids(folder: Path, _source: Path) -> None:
    fields = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(fields))


def no_tokenizer(_folder: Path, source: Path) -> None:
    (source / "tokenizer.json").unlink()


def smaller(folder: Path, source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(300)
    model.save_pretrained(source)


@pytest.mark.parametrize(
    ("change", "words", "options", "message"),
    [
        (
            larger_config,
            [],
            {},
            "264 in the source, of 300 in the model.* longer tokenizer only.* 258 ids: set vocab_size = 264",
        ),
        (moved_ids, WORDS, {}, r"other ids for 2 of the source's 258 tokens \('a' is .*add_tokens"),
        (no_tokenizer, WORDS, {"new_rows": "subwords"}, "needs the source's own tokenizer.*or take 'mean'"),
        (smaller, WORDS, {}, "a vocabulary of 300 in the source, of 266 in the model. Set vocab_size = 300"),
        (lambda *_: None, WORDS, {"resize_vocabulary": False}, "of 264 in the source.*seed.resize_vocabulary = true"),
    ],
)
def test_what_cannot_be_right_is_refused(
    tmp_path: Path, change: Callable[[Path, Path], None], words: list[str], options: dict[str, Any], message: str
) -> None:
    source = save_tiny("olmo2", tmp_path / "source")
    folder = grown_folder(source, tmp_path / "new", words)
    change(folder, source)
    if options.get("resize_vocabulary") is False:
        as_config(folder, 266)
    with pytest.raises(SeedError, match=f"(?s){message}"):
        run_match(source, folder, Seed(**({"resize_vocabulary": True} | options)))


def run_match(source: Path, folder: Path, options: Seed) -> None:
    config = FlameJobConfig()
    config.model.hf_assets_path, config.seed = str(folder), options
    args = HFModelArgs()
    args.update_from_config(config)
    model = build_hf_causal_lm(args)
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in model.tied_keys}
    match(seed_target(model, state, args.load()), source, options)


def test_a_vocabulary_that_tensor_parallelism_cannot_split_is_padded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = save_tiny("olmo2", tmp_path / "source")
    folder = grown_folder(source, tmp_path / "new", WORDS[:7])  # 265 ids
    job = [f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={folder}", "--seed.resize_vocabulary"]
    job += [
        f"--checkpoint.initial_load_path={source}",
        "--parallelism.tensor_parallel_degree=2",
        "--training.seq_len=64",
    ]
    with pytest.raises(ConfigError, match=r"\(265\) is not divisible.*seed.pad_vocabulary_to_multiple_of = 2"):
        parse(job)
    assert parse([*job, "--seed.pad_vocabulary_to_multiple_of=2"]).seed.resize_vocabulary


@pytest.mark.parametrize("option", ["new_rows=random", "pad_vocabulary_to_multiple_of=64"])
def test_options_without_effect_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"seed.{option.partition('=')[0]} = .* without seed.resize_vocabulary"):
        parse([f"--job.config_file={DEBUG_TOML}", f"--seed.{option}"])


def test_a_predicted_row_of_padding_is_refused() -> None:
    logits = torch.zeros(1, 3, 8)
    logits[..., 2] = 1.0
    require_silent_padding(logits, [4, 6, 7], 1e-5, Path("source"))
    for number in (4, 7):
        logits[0, 1] = 0.0
        logits[0, 1, number] = 1.1
        require_silent_padding(logits, [], 1e-5, Path("source"))
        with pytest.raises(SeedError, match="predicts rows of its vocabulary that have no token"):
            require_silent_padding(logits, [4, 6, 7], 1e-5, Path("source"))
    require_silent_padding(logits.fill_(torch.nan), [7], 1e-5, Path("source"))  # which the loss tells


def test_the_reference_is_of_the_sources_size_even_if_the_new_padding_token_is_not() -> None:
    config, growth = copy.deepcopy(CONFIGS["gemma3-multimodal"]), Growth(OLD, 266, 268, {}, "mean")
    config.get_text_config().vocab_size, config.get_text_config().pad_token_id = 268, 265
    text = of_source(config, growth).get_text_config()
    assert (text.vocab_size, text.pad_token_id) == (OLD, None) and config.get_text_config().vocab_size == 268
