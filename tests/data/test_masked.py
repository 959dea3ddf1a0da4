"""Masked tokens are inputs like any other and no labels, wherever documents are cut, packed, reversed or resumed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from flame_ext.config.sections import DataSource
from flame_ext.data.documents import READ_ONLY, IndexedDocuments
from flame_ext.data.files import _json_row
from flame_ext.data.loader import PackedDataloader
from flame_ext.data.packing import PackedDocuments
from flame_ext.errors import ConfigError
from tests.data.test_loader import position, resume
from tests.data.test_sources import LANES, TEXTS, job, loaders, tokens_of
from tests.layouts import assert_same_step
from tests.layouts import steps as steps_of_layout
from tests.ranks import TINY_OLMO, train

EOS = 9
EOS_ID = 0  # of the tiny models
TOKEN = st.tuples(st.sampled_from([1, 2, 3, EOS]), st.booleans())


def packed(documents: list[list[tuple[int, bool]]], ranks: int, seq_len: int, reverse: bool) -> list[PackedDataloader]:
    """Dataloaders of documents of tokens and whether each is learned; two lanes, one epoch, in order."""
    marked = [np.array([t if learned else t + READ_ONLY for t, learned in document]) for document in documents]

    def of_rank(rank: int) -> PackedDataloader:
        source = IndexedDocuments("source", len(marked), marked.__getitem__, 2, None, 1)
        data = PackedDocuments([source], seq_len, range(rank, 2, ranks), 2, eos_id=EOS, reverse=reverse, pad=True)
        return PackedDataloader(data, rank, ranks, batch_size=1)

    return [of_rank(rank) for rank in range(ranks)]


def steps(these: list[PackedDataloader], count: int) -> list[Any]:
    """The tokens, labels and document numbers of so many global batches, lane by lane."""
    iterators, found = [iter(loader) for loader in these], []
    for _ in range(count):
        batches = [batch for iterator in iterators for batch in islice(iterator, 2 // len(these))]
        found += [(inputs["input"].tolist(), y.tolist(), inputs["doc_ids"].tolist()) for inputs, y in batches]
    return found


@given(
    st.lists(st.lists(TOKEN, min_size=1, max_size=12), min_size=2, max_size=8),
    st.integers(2, 9),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from([(1, 2), (2, 1), (2, 2)]),
)
@settings(max_examples=100, deadline=None)
def test_labels_against_a_naive_loop(
    documents: list, seq_len: int, reverse: bool, before: int, ranks: tuple[int, int]
) -> None:
    first, second = (packed(documents, count, seq_len, reverse) for count in ranks)
    found = steps(first, before)
    resume(second, position(first))
    found += steps(second, 6)
    plain = [[(token, True) for token, _ in document] for document in documents]
    unmasked = steps(packed(plain, 1, seq_len, reverse), before + 6)
    streams = [[pair for document in documents[lane::2] for pair in document] for lane in range(2)]
    for number, ((inputs,), (labels,), documents_of) in enumerate(found):
        begin, lane = number // 2 * (seq_len + 1), number % 2
        part = streams[lane][begin : begin + seq_len + 1]
        part = [*(part[::-1] if reverse else part), *[(0, False)] * (seq_len + 1 - len(part))]
        assert inputs == [token for token, _ in part[:-1]]
        assert labels == [token if learned else -100 for token, learned in part[1:]]
        assert documents_of == unmasked[number][2], "an EOS that is only read ends its document, too"


@pytest.mark.parametrize(
    ("kind", "column", "streaming", "workers"),
    [
        *(("jsonl", "labels", True, 0), ("jsonl", "completion_mask", False, 2)),
        *(("parquet", "labels", False, 0), ("parquet", "completion_mask", True, 0), ("arrow", "labels", False, 0)),
    ],
)
def test_masks_of_files(tmp_path: Path, kind: str, column: str, streaming: bool, workers: int) -> None:
    rows = []
    for text in TEXTS:
        ids = tokens_of(text)
        learned = [int(token % 3 != 1) for token in ids]
        labels = [token if of else -100 for token, of in zip(ids, learned, strict=True)]
        # With the attention, what stands at the end without a label is no padding.
        masks = {"labels": labels, "attention_mask": [1] * len(ids)} if column == "labels" else {column: learned}
        rows.append({"input_ids": ids, **masks})
    assert all(-100 in row.get("labels", [-100]) for row in rows)
    found = []
    for masked in (True, False):
        data = Dataset.from_list(rows if masked else [{"input_ids": row["input_ids"]} for row in rows])
        path = tmp_path / f"{masked}.{kind}"
        {"jsonl": data.to_json, "parquet": data.to_parquet, "arrow": data.save_to_disk}[kind](path)
        config = job(DataSource(str(path), streaming=streaming), epochs=1)
        (loader,) = loaders(config, 1, workers)
        batches = list(islice(iter(loader), config.training.steps * LANES))
        found.append(
            [torch.cat([batch["input"] for batch, _ in batches]), torch.cat([labels for _, labels in batches])]
        )
    (inputs, labels), (of_all, every) = found
    assert inputs.equal(of_all)
    assert labels.equal(torch.where(every % 3 == 1, -100, every)) and (labels != every).any() and (labels >= 0).any()


def test_the_loss_is_that_of_from_pretrained_with_the_same_labels(tmp_path: Path) -> None:
    length, rows = 25, []
    generator = np.random.default_rng(0)
    for number in range(4):
        ids = generator.integers(3, 200, length)
        prompt = (3, 5, 11, 23)[number]  # ranks have different numbers of labels
        rows.append({"input_ids": ids, "completion_mask": (np.arange(length) >= prompt).astype(int)})
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    options = ["--training.dataset=parquet", f"--training.dataset_path={tmp_path / 'rows.parquet'}"]
    options += [f"--training.seq_len={length - 1}", "--training.local_batch_size=1", "--training.global_batch_size=4"]
    options += ["--training.steps=1", "--lr_scheduler.warmup_steps=0", "--data.no-shuffle"]
    run = train(tmp_path / "run", *options, world_size=2)
    ids = torch.tensor(np.stack([row["input_ids"] for row in rows]))
    labels = torch.where(torch.tensor(np.stack([row["completion_mask"] for row in rows])) == 1, ids, -100)
    model = AutoModelForCausalLM.from_pretrained(TINY_OLMO, dtype=torch.float32)
    expected = model(ids, labels=labels).loss.item()
    assert run.metrics[0]["loss_ce"] == pytest.approx(expected, rel=1e-5)
    assert abs(model(ids, labels=ids).loss.item() - expected) > 1e-3


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["fsdp2", "cp2"])
def test_losses_of_heads_do_not_depend_on_the_layout(models: Path, tmp_path: Path, layout: str) -> None:
    generator, rows = np.random.default_rng(0), []
    for length in generator.integers(5, 60, 80):
        learned = generator.random(length) < 0.5
        rows.append({"input_ids": [*generator.integers(3, 200, length - 1), EOS_ID], "loss_mask": learned.astype(int)})
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    heads = ("mtp", "token_order", "future_bag", "next_latent", "action_layer")
    options = [*(f"--{head}.enable" for head in heads), "--mtp.depth=2", "--next_latent.steps=3"]
    jobs = {"olmo-tied+heads": [*options, f"--training.dataset_path={tmp_path / 'rows.parquet'}"]}
    data = "--training.dataset=parquet"
    (expected,) = steps_of_layout(models, tmp_path, "single", jobs, data)
    assert expected["olmo-tied+heads"]["parts"]["loss_mtp"] > 0
    for rank in steps_of_layout(models, tmp_path, layout, jobs, data):
        assert_same_step(rank["olmo-tied+heads"], expected["olmo-tied+heads"])


def labels_of(source: DataSource, rows: int = 1) -> list[int]:
    """The labels of so many first sequences of a source, in the order of its files."""
    config = job(source, seq_len=3, global_batch_size=1)
    config.data.shuffle = False
    (loader,) = loaders(config, 1, 0)
    return [label for _, labels in islice(iter(loader), rows) for label in labels.flatten().tolist()]


MASKED = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}


def test_a_mask_after_many_rows_without(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8]}] * 1500 + [MASKED]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labels_of(DataSource(str(tmp_path)), 1501)[-6:] == [6, 7, 8, -100, 7, 8]


def test_a_dataset_saved_with_tensors_has_its_masks(tmp_path: Path) -> None:
    Dataset.from_list([MASKED] * 2).with_format("torch").save_to_disk(tmp_path / "saved")
    assert labels_of(DataSource(str(tmp_path / "saved"), streaming=True)) == [-100, 7, 8]


def save(folder: Path, kind: str, rows: list[dict]) -> str:
    data, file = Dataset.from_list(rows), folder / f"a.{kind}"
    {"jsonl": data.to_json, "parquet": data.to_parquet, "arrow": data.save_to_disk}[kind](file)
    return str(file)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_with_a_mask_among_many_without_is_refused(tmp_path: Path, kind: str) -> None:
    for number in range(40):
        table = pyarrow.table({name: [MASKED[name]] for name in [*MASKED][: 1 + (number == 4)]})
        file = tmp_path / f"{number:02}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            with pyarrow.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
    message = rf"04.{kind}: columns \['input_ids', 'completion_mask'\], and .*00.{kind} has \['input_ids'\]"
    with pytest.raises(ConfigError, match=message):
        loaders(job(DataSource(str(tmp_path), streaming=True)), 1, 0)


@pytest.mark.parametrize(("kind", "streaming"), [("jsonl", False), ("parquet", True), ("arrow", False)])
def test_masks_beside_input_ids_that_text_field_names(tmp_path: Path, kind: str, streaming: bool) -> None:
    source = DataSource(save(tmp_path, kind, [MASKED] * 2), text_field="input_ids", streaming=streaming)
    assert labels_of(source) == [-100, 7, 8]


@pytest.mark.parametrize(("kind", "field"), [("jsonl", "text"), ("parquet", "text"), ("arrow", "tokens")])
def test_masks_beside_something_else_are_named(tmp_path: Path, kind: str, field: str, caplog: Any) -> None:
    row = (
        {"text": "words and words", **MASKED}
        if field == "text"
        else {"tokens": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}
    )
    assert -100 not in labels_of(DataSource(save(tmp_path, kind, [row] * 2), text_field=field))
    mask = next(name for name in row if "mask" in name)
    (said,) = (r.message for r in caplog.records if "is not followed" in r.message)
    assert f"a.{kind}: column '{field}' (text_field) is read" in said and f"'{mask}' beside it" in said


@pytest.mark.parametrize(
    ("field", "wrong"), [("input_ids", 2**62 + 5), ("input_ids", 2**63 + 5), ("input_ids", -3), ("tokens", 2**62 + 5)]
)
def test_ids_are_refused_as_they_are_in_the_file(tmp_path: Path, field: str, wrong: int) -> None:
    row = {field: [5, wrong, 7, 8], "completion_mask": [0, 0, 1, 1]}
    with pytest.raises(ConfigError, match=f"{wrong}"):
        _json_row("a.jsonl", json.dumps(row).encode(), (field, "input_ids"), 100)
    ids = pyarrow.array([row[field]], pyarrow.list_(pyarrow.int64() if wrong < 0 else pyarrow.uint64()))
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({field: ids, "completion_mask": [row["completion_mask"]]}), file)
    with pytest.raises(ConfigError, match=f"row 1: token id {wrong} is not in the model's vocabulary"):
        labels_of(DataSource(str(file), text_field=field))


def test_what_a_mask_says_of_the_first_token_holds_from_both_sides(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "completion_mask": [0, 1, 1, 1]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    config = job(DataSource(str(tmp_path)), seq_len=3, global_batch_size=1, epochs=1)
    config.data.reverse = True
    (loader,) = loaders(config, 1, 0)
    _, labels = next(iter(loader))
    assert labels.tolist() == [[3, 2, -100]]


@pytest.mark.matrix
def test_a_run_whose_tokens_are_all_masked_ends_with_an_error(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 0, 0]}] * 200
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    options = ["--training.dataset=parquet", f"--training.dataset_path={tmp_path / 'rows.parquet'}"]
    run = train(tmp_path / "run", *options, "--training.steps=20", world_size=2, check=False)
    assert run.exit_codes == [1, 1]
    assert "step 10 has no token to predict on any rank: all are masked, as in" in run.ranks[0].output
