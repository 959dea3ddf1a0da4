"""Packing against a naive walk through the documents; the same global batches on any number of ranks; exact resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_ext.data.packing import PackedDocuments, build_dataloader
from flame_ext.data.python_stdlib import read_stdlib
from flame_ext.data.sources import load_local, register_local_sources, text_of
from flame_ext.errors import CheckpointError, ConfigError
from flame_ext.train import parse
from tests.ranks import DEBUG_TOML

DOCUMENTS = [[100 * d + i for i in range(1 + (7 * d) % 11)] for d in range(13)]


def dataset(ranks: int, rank: int, num_lanes: int, rng_seed: int | None = 5, seq_len: int = 6) -> PackedDocuments:
    lanes = range(rank, num_lanes, ranks)
    return PackedDocuments(len(DOCUMENTS), lambda i: DOCUMENTS[i], seq_len, lanes, num_lanes, rng_seed)


def take(data: PackedDocuments, count: int) -> list[list[int]]:
    """Whole samples: the inputs and the last label."""
    samples = []
    for inputs, labels, (lane, document, offset) in itertools.islice(iter(data), count):
        data.move(int(lane), int(document), int(offset))
        assert torch.equal(inputs["input"][1:], labels[:-1])
        samples.append([*inputs["input"].tolist(), labels[-1].item()])
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
    data.move(0, 4, len(DOCUMENTS[4]) + 1)
    with pytest.raises(CheckpointError, match="token 8 of a document that has 7: the step was saved with other data"):
        take(data, 1)


def test_local_files_of_each_format(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = ["one\ntwo\n", "three"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "data.parquet")
    assert load_local("text", str(tmp_path))["text"] == texts
    assert load_local("text", str(tmp_path / "*.txt"))["text"] == texts
    assert load_local("json", str(tmp_path / "data.jsonl"))["body"] == texts
    assert load_local("parquet", str(tmp_path))["text"] == texts
    with pytest.raises(ConfigError, match="no file matches"):
        load_local("json", str(tmp_path / "nothing*"))
    with pytest.raises(ConfigError, match="needs training.dataset_path"):
        load_local("json", "")
    with pytest.raises(ConfigError, match="'text' is not in the data, which has body"):
        text_of({"body": "x"})


def loader(tmp_path: Path, *options: str):
    from torchtitan.components.tokenizer import build_hf_tokenizer

    config = parse([f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={tmp_path}", *options])
    return build_dataloader(1, 0, build_hf_tokenizer(config), config)


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
        (["--training.dataset=c4_test"], "training.dataset 'c4_test' .*: "),
        (["--data.text_field=body"], "data.text_field 'body' is not in the data, which has text"),
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
