"""Packing compared with a naive walk through the documents; the same global batches on any number of ranks; exact resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_ext.data.build import build_dataloader
from flame_ext.data.documents import Cursor, IndexedDocuments
from flame_ext.data.loader import positions_in_documents
from flame_ext.data.packing import IGNORED, PADDING, Lane, PackedDocuments
from flame_ext.data.python_stdlib import read_stdlib
from flame_ext.data.sources import register_local_sources
from flame_ext.errors import CheckpointError, ConfigError
from flame_ext.train import parse
from tests.ranks import DEBUG_TOML

DOCUMENTS = [[100 * d + i for i in range(1 + (7 * d) % 11)] for d in range(13)]


def indexed(
    documents: list[list[int]],
    num_lanes: int,
    rng_seed: int | None = 5,
    epochs: int | None = None,
    name: str = "source",
) -> IndexedDocuments:
    return IndexedDocuments(name, len(documents), lambda i: np.array(documents[i]), num_lanes, rng_seed, epochs)


def dataset(ranks: int, rank: int, num_lanes: int, rng_seed: int | None = 5, seq_len: int = 6) -> PackedDocuments:
    return PackedDocuments([indexed(DOCUMENTS, num_lanes, rng_seed)], seq_len, range(rank, num_lanes, ranks), num_lanes)


def take(data: PackedDocuments, count: int) -> list[list[int]]:
    """Whole samples: the inputs and the last label."""
    samples = []
    for (tokens, _), (lane, *numbers), _ in itertools.islice(data.sequences(), count):
        data.move(lane, numbers)
        samples.append(tokens.tolist())
    return samples


def test_a_lane_is_every_lth_document_end_to_end() -> None:
    data = dataset(ranks=1, rank=0, num_lanes=3, rng_seed=None)
    stream = [token for epoch in range(3) for d in range(1, 39, 3) for token in DOCUMENTS[(d + 39 * epoch) % 13]]
    samples = take(data, 30)[1::3]
    assert [token for sample in samples for token in sample] == stream[: 7 * 10]


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_global_batches_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    alone = take(dataset(1, 0, num_lanes=6), 60)
    spread = [take(dataset(ranks, rank, num_lanes=6), 60 // ranks) for rank in range(ranks)]
    for step in range(10):
        batch = [sample for s in spread for sample in s[step * 6 // ranks : (step + 1) * 6 // ranks]]
        assert sorted(batch) == sorted(alone[step * 6 : (step + 1) * 6])


def test_an_epoch_has_every_document_once_and_epochs_differ() -> None:
    data = dataset(1, 0, num_lanes=1)
    total = sum(map(len, DOCUMENTS))
    tokens = [token for sample in take(data, 2 * total // 7 + 1) for token in sample]
    first, second = tokens[:total], tokens[total : 2 * total]
    everything = sorted(token for document in DOCUMENTS for token in document)
    assert sorted(first) == everything and sorted(second) == everything and first != second


@given(st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_a_second_iteration_goes_on_with_the_next_token(before: int, seq_len: int) -> None:
    unbroken = take(dataset(1, 0, 4, seq_len=seq_len), before + 20)
    broken = dataset(1, 0, 4, seq_len=seq_len)
    take(broken, before)
    assert take(broken, 20) == unbroken[before:]


def test_a_position_in_other_data_is_refused() -> None:
    data = dataset(1, 0, 1, rng_seed=None)
    data.move(0, Lane(len(DOCUMENTS[4]) + 1, [4], [Cursor(4, 0)]).numbers())
    with pytest.raises(
        CheckpointError, match="token 8 of a document of source that has 7: the step was saved with other data"
    ):
        take(data, 1)


@given(
    st.lists(st.lists(st.sampled_from([1, 2, 3, 9]), max_size=12), min_size=1, max_size=12),
    st.integers(2, 9),
    st.sampled_from([None, 9]),
)
@settings(max_examples=100, deadline=None)
def test_document_numbers_against_a_walk_through_the_tokens(documents: list, seq_len: int, eos_id: int | None) -> None:
    data = PackedDocuments([indexed(documents, 1, None, epochs=1)], seq_len, range(1), 1, eos_id=eos_id)
    stream = [(d, token) for d, document in enumerate(documents) for token in document]
    length = seq_len + 1
    for number, ((tokens, doc_ids), _, ended) in enumerate(
        itertools.islice(data.sequences(), len(stream) // length + 2)
    ):
        part = stream[number * length : (number + 1) * length]
        expected, current = [], 0
        for i, (d, _) in enumerate(part):
            if i > 0 and (part[i - 1][0] != d or part[i - 1][1] == eos_id):
                current += 1
            expected.append(current)
        assert tokens.tolist() == [token for _, token in part] + [IGNORED] * (length - len(part))
        assert doc_ids[: len(part)].tolist() == expected
        after = doc_ids[len(part) :].tolist()
        assert all(n >= PADDING for n in after) and after == sorted(set(after)), "nothing follows anything there"
        assert ended == ((number + 1) * length >= len(stream))
    assert data.steps() == -(-len(stream) // length)


@given(
    st.lists(st.lists(st.sampled_from([1, 2, 3, 9]), min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(2, 9),
    st.integers(1, 3),
    st.integers(0, 6),
)
@settings(max_examples=100, deadline=None)
def test_reversed_sequences_against_a_naive_reversal(
    documents: list, seq_len: int, num_lanes: int, before: int
) -> None:
    def data(reverse: bool) -> PackedDocuments:
        source = indexed(documents, num_lanes, None, epochs=2)
        return PackedDocuments([source], seq_len, range(num_lanes), num_lanes, eos_id=9, reverse=reverse)

    forward, backward = data(reverse=False), data(reverse=True)
    before -= before % num_lanes
    take(backward, before)  # a run that is resumed goes on at a position that it has saved
    expected = itertools.islice(forward.sequences(), before, before + 8)
    for (plain, *saved), (found, *as_saved) in zip(expected, backward.sequences(), strict=False):
        real = [column for column in plain.T.tolist() if column[0] != IGNORED]
        count = len(real)
        assert found[0].tolist() == [token for token, _ in real[::-1]] + [IGNORED] * (seq_len + 1 - count)
        groups = [[token for token, number in real if number == n] for n in range(real[-1][1] + 1 if real else 0)]
        numbers = [n for n, group in enumerate(groups[::-1]) for _ in group]
        assert found[1].tolist() == numbers + plain[1, count:].tolist() and (plain[1, count:] >= PADDING).all()
        assert saved == as_saved, "the lanes are where they would be"


def test_batches_of_reversed_sequences_predict_the_token_before(tmp_path: Path) -> None:
    options = ["--training.seq_len=64", "--training.local_batch_size=2", "--data.document_attention"]
    inputs, labels = next(iter(loader(tmp_path, *options)))
    reverse, before = next(iter(loader(tmp_path, *options, "--data.reverse")))
    assert reverse["input"].equal(labels.flip(1)) and before.equal(inputs["input"].flip(1))
    assert (reverse["positions"][:, 0] == 0).all()
    begins = (reverse["positions"] == 0)[:, 1:]
    assert (reverse["input"][:, 1:][begins] == 0).all(), "a document begins with its EOS"


def test_positions_count_from_the_beginning_of_a_document() -> None:
    doc_ids = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, PADDING]])
    assert positions_in_documents(doc_ids).tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 0]]


@pytest.mark.parametrize("num_lanes", [1, 16])
def test_a_mixture_has_the_weights_that_were_asked_for(num_lanes: int) -> None:
    """Each source has its share of 20,000 documents within 2 %, also the rarest."""
    weights = [0.7, 0.2, 0.09, 0.01]
    sources = [indexed([[source]] * 999, num_lanes, name=str(source)) for source in range(4)]
    data = PackedDocuments(sources, 99, range(num_lanes), num_lanes, weights=weights, rng_seed=1)
    tokens = torch.tensor(take(data, 200)).flatten()
    assert len(tokens) == 20_000
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    assert torch.allclose(shares, torch.tensor(weights), rtol=0.02, atol=0)
    early = torch.bincount(tokens[:2000], minlength=4) / 2000
    assert torch.allclose(early, torch.tensor(weights), atol=0.02), "at any time, not in the end"
    other = PackedDocuments(sources, 99, range(num_lanes), num_lanes, weights=weights, rng_seed=2)
    assert take(other, 200) != tokens.reshape(200, 100).tolist()


def test_a_source_that_ends_is_dropped_and_the_others_go_on() -> None:
    sources = [indexed([[1]] * 5, 1, epochs=1), indexed([[2]] * 20, 1, epochs=2), indexed([[3]] * 3, 1, epochs=1)]
    data = PackedDocuments(sources, 9, range(1), 1)
    tokens = [token for sample in take(data, 6) for token in sample]
    assert [tokens.count(n) for n in (1, 2, 3, IGNORED)] == [5, 40, 3, 12]
    assert tokens[48:] == [IGNORED] * 12 and data.steps() == 0, "it stands at the end"


def loader(tmp_path: Path, *options: str):
    from flame_ext.data.tokenizer import build_tokenizer

    config = parse([f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={tmp_path}", *options])
    return build_dataloader(1, 0, build_tokenizer(config), config)


def test_documents_are_the_tokenizers_with_eos(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"body": "ab" * 40}) + "\n" + json.dumps({"body": "c" * 30}) + "\n")
    options = ["--training.dataset=json", f"--training.dataset_path={tmp_path}/data.jsonl", "--data.text_field=body"]
    options += ["--training.seq_len=64", "--training.local_batch_size=1", "--data.no-shuffle"]
    inputs, labels = next(iter(loader(tmp_path, *options)))
    from transformers import AutoTokenizer

    from tests.ranks import TINY_OLMO

    tokens = AutoTokenizer.from_pretrained(TINY_OLMO)("ab" * 40)["input_ids"] + [0]
    assert inputs["input"][0].tolist() == tokens[:64] and labels[0].tolist() == tokens[1:65]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.dataset=nowhere"], "training.dataset 'nowhere' is unknown; known: .*python_stdlib"),
        (["--training.dataset=json"], "needs training.dataset_path"),
        (["--training.dataset=c4_test"], "training.dataset: c4_test: "),
        (["--data.text_field=body"], "'body' is not in the data, which has text"),
    ],
)
def test_unusable_data_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(tmp_path, *options)


def test_the_stdlib_splits_do_not_overlap() -> None:
    register_local_sources()
    # A few package markers are the same short file in several places.
    splits = [{text for text in read_stdlib(split) if len(text) > 200} for split in ("pretrain", "train", "validation")]
    assert all(len(split) > 10 for split in splits)
    assert splits[0].isdisjoint(splits[1] | splits[2]) and splits[1].isdisjoint(splits[2])
