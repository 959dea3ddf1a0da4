"""Every kind of source, on any number of ranks and workers, gives the documents in its files as the tokenizer encodes them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from transformers import AutoTokenizer

from flame_ext.config.sections import DataSource, FlameJobConfig
from flame_ext.data import documents, files, sources
from flame_ext.data.build import build_dataloader
from flame_ext.data.loader import PackedDataloader
from flame_ext.data.packing import PADDING
from flame_ext.data.tokenizer import build_tokenizer
from flame_ext.errors import ConfigError
from flame_ext.train import parse
from tests.data.test_loader import position, resume
from tests.ranks import DEBUG_TOML, TINY_OLMO

TEXTS = [f"document {i}: " + "word " * ((7 * i) % 13) for i in range(50)]
LANES, SEQ_LEN = 4, 48
EOS = 0

Maker = Callable[[Path], DataSource]


def tokens_of(text: str) -> list[int]:
    return [*AutoTokenizer.from_pretrained(TINY_OLMO)(text)["input_ids"], EOS]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    return sorted(tuple(tokens_of(text)) for text in TEXTS)


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, field: text}).encode() + b"\n" for i, text in enumerate(texts))


def jsonl(folder: Path) -> DataSource:
    for part in range(5):
        (folder / f"{part}.jsonl").write_bytes(json_lines(TEXTS[part::5]))
    return DataSource(str(folder))


def jsonl_gz(folder: Path) -> DataSource:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS, "body")))
    return DataSource(str(folder / "*.gz"), text_field="body")


def jsonl_zst(folder: Path) -> DataSource:
    import pyarrow

    with pyarrow.output_stream(folder / "a.jsonl.zst", compression="zstd") as stream:
        stream.write(json_lines(TEXTS))
    return DataSource(str(folder / "a.jsonl.zst"))


def parquet(folder: Path) -> DataSource:
    for part in range(2):
        Dataset.from_dict({"text": TEXTS[part::2], "url": ["x"] * 25}).to_parquet(folder / f"{part}.parquet")
    return DataSource(str(folder))


def arrow(folder: Path) -> DataSource:
    DatasetDict({"some": Dataset.from_dict({"text": TEXTS})}).save_to_disk(folder / "saved")
    return DataSource(str(folder / "saved"), split="some")


def arrow_file(folder: Path) -> DataSource:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return DataSource(str(folder / "saved" / "*.arrow"))


def txt(folder: Path) -> DataSource:
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    return DataSource(str(folder))


def hub(folder: Path) -> DataSource:
    """A name that the datasets library resolves, as for a dataset on the Hub, with files on this disk."""
    (folder / "data").mkdir()
    Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return DataSource("parquet", data_files=[str(folder / "data" / "*.parquet")])


def input_ids(folder: Path) -> DataSource:
    Dataset.from_dict({"input_ids": [tokens_of(text) for text in TEXTS]}).to_parquet(folder / "tokens.parquet")
    return DataSource(str(folder / "tokens.parquet"))


def flat_tokens(folder: Path) -> DataSource:
    """Files like OLMo's: no header, uint16."""
    for part in range(2):
        tokens = [token for text in TEXTS[part::2] for token in tokens_of(text)]
        np.array(tokens, dtype=np.uint16).tofile(folder / f"{part}.npy")
    return DataSource(str(folder / "*.npy"), tokens_dtype="uint16")


def flat(folder: Path, written: str, read: Any) -> DataSource:
    """A file of tokens, written with one type and read with another."""
    np.arange(1, 201).astype(written).tofile(folder / "0.npy")
    return DataSource(str(folder / "*.npy"), tokens_dtype=read)


MAKERS: list[Maker] = [jsonl, jsonl_gz, jsonl_zst, parquet, arrow, arrow_file, txt, hub, input_ids, flat_tokens]


def job(*sources: DataSource, **training: Any) -> FlameJobConfig:
    config = parse([f"--job.config_file={DEBUG_TOML}", f"--training.seq_len={SEQ_LEN}", "--training.local_batch_size=1",
                    f"--training.global_batch_size={LANES}"])  # fmt: skip
    config.data.sources = list(sources)
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


def loaders(config: FlameJobConfig, ranks: int, workers: int) -> list[PackedDataloader]:
    config.training.dataloader.num_workers = workers
    tokenizer = build_tokenizer(config)
    return [build_dataloader(ranks, rank, tokenizer, config) for rank in range(ranks)]


def read(these: list[PackedDataloader], steps: int) -> list[torch.Tensor]:
    """The global batches, lane by lane: (L, 2, T + 1) of tokens (-100 at the end) and document numbers."""
    parts = []
    for loader in these:
        micro = LANES // len(these)
        batches = list(islice(iter(loader), steps * micro))
        assert len(batches) == steps * micro
        tokens = torch.cat([torch.cat([inputs["input"], labels[:, -1:]], 1) for inputs, labels in batches])
        labels = torch.cat([labels for _, labels in batches])
        assert torch.equal(tokens[:, 1:-1], labels[:, :-1].clamp_min(0)), "labels are the next tokens"
        tokens[:, 1:] = labels
        ids = torch.cat([inputs["doc_ids"] for inputs, _ in batches])
        tokens[:, 0].masked_fill_(ids[:, 0] >= PADDING, -100)
        parts.append(torch.stack([tokens, torch.cat([ids, ids[:, -1:]], 1)], 1).unflatten(0, (steps, micro)))
    return list(torch.stack(parts, dim=2).flatten(1, 2))  # lane = micro-batch times ranks plus rank


def documents_in(batches: list[torch.Tensor]) -> list[tuple[int, ...]]:
    """The documents in the lanes, which end with EOS."""
    found: list[tuple[int, ...]] = []
    for lane in range(LANES):
        current: list[int] = []
        for token in torch.cat([batch[lane, 0] for batch in batches]).tolist():
            if token >= 0:
                current.append(token)
            if token == EOS:
                found.append(tuple(current))
                current = []
        assert not current
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_an_epoch_has_every_document_once_on_any_ranks_and_workers(
    maker: Maker, streaming: bool, tmp_path: Path, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BLOCK", 8)  # several in a file
    monkeypatch.setattr(documents, "BLOCKS_KEPT", 2)
    source = maker(tmp_path)
    source.streaming = streaming
    config = job(source, epochs=1)
    (alone,) = loaders(config, 1, 0)
    steps = config.training.steps
    reference = read([alone], steps)
    if maker is flat_tokens:  # pieces of sequences, which begin and end anywhere
        tokens = sorted(t for batch in reference for t in batch[:, 0].flatten().tolist() if t >= 0)
        assert tokens == sorted(token for document in expected for token in document)
    else:
        assert documents_in(reference) == expected
    for ranks in (1, 2, 4):
        for workers in (0, LANES // ranks if ranks > 1 else 2):
            if (ranks, workers) != (1, 0):
                found = read(loaders(job(source, epochs=1), ranks, workers), steps)
                assert all(map(torch.equal, found, reference)), (ranks, workers)
    assert documents_order(reference) != list(range(50)), "shuffled"


def documents_order(batches: list[torch.Tensor]) -> list[int]:
    return torch.cat([batch[0, 0] for batch in batches]).tolist()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[DataSource]:
    """A mixture of mapped and streamed sources."""
    folders = [tmp_path_factory.mktemp("source") for _ in range(3)]
    sources = [jsonl(folders[0]), parquet(folders[1]), input_ids(folders[2])]
    sources[0].streaming, sources[0].weight = True, 2.0
    return sources


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 4)), min_size=2, max_size=4))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_breaks_anywhere_change_nothing(three: list[DataSource], runs: list[tuple[int, bool, int]]) -> None:
    """Reads a mixture; the position is written to a file, as DCP does."""
    unbroken = read(loaders(job(*three), 1, 0), sum(steps for *_, steps in runs) + 1)
    batches: list[torch.Tensor] = []
    saved: dict[str, Any] | None = None
    for ranks, workers, steps in [*runs, (1, False, 1)]:
        these = loaders(job(*three), ranks, 1 if workers else 0)
        if saved is not None:
            resume(these, saved)
        batches += read(these, steps) if steps else []
        saved = position(these)
    assert len(batches) == len(unbroken) and all(map(torch.equal, batches, unbroken))


def test_weights_over_real_sources(three: list[DataSource]) -> None:
    steps = 200
    ids = torch.cat([batch[:, 0].flatten() for batch in read(loaders(job(*three), 1, 0), steps)])
    assert (ids >= 0).all(), "sources repeat"
    (loader,) = loaders(job(*three), 1, 0)
    read([loader], steps)
    taken = torch.tensor([lane.taken for lane in loader.dataset.lanes.values()]).sum(0)
    assert torch.allclose(taken / taken.sum(), torch.tensor([0.5, 0.25, 0.25]), rtol=0.02)


def test_epochs_of_a_source_differ(tmp_path: Path) -> None:
    for streaming in (False, True):
        folder = tmp_path / str(streaming)
        folder.mkdir()
        source = jsonl(folder)
        source.streaming = streaming
        config = job(source, epochs=2)
        both = read(loaders(config, 1, 0), config.training.steps)
        found = [tuple(d) for d in documents_in(both)]
        assert all(found.count(d) == 2 for d in found) and len(found) == 100
        # Of one file, so that the order of files is not what differs.
        one = DataSource(str(folder / "0.jsonl"), streaming=streaming)
        (loader,) = loaders(job(one, global_batch_size=1), 1, 0)
        (documents_of_one,) = loader.dataset.sources
        cursor, read_so_far = documents_of_one.start(0), []
        for _ in range(20):
            tokens, cursor = documents_of_one.read(0, cursor)
            read_so_far.append(tokens.tolist())
        first, second = read_so_far[:10], read_so_far[10:]
        assert sorted(first) == sorted(second) and first != second
        (loader,) = loaders(job(source), 1, 0)
        read([loader], 60)
        epochs = [loader.dataset.sources[0].epochs(lane.cursors[0], n) for n, lane in loader.dataset.lanes.items()]
        assert min(epochs) >= 2


def test_bos_and_eos_are_the_tokenizers(tmp_path: Path) -> None:
    """A tokenizer with BOS puts it before each document."""
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(TINY_OLMO)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(folder)
    config = json.loads((TINY_OLMO / "config.json").read_text()) | {"vocab_size": len(tokenizer)}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "a.txt").write_text("some words")
    job_config = job(DataSource(str(tmp_path / "a.txt")))
    job_config.model.hf_assets_path = str(folder)
    (batch,) = read(loaders(job_config, 1, 0), 1)
    one = [tokenizer.bos_token_id, *tokenizer("some words", add_special_tokens=False)["input_ids"], EOS]
    assert batch[0, 0, : 2 * len(one)].tolist() == one + one
    assert batch[0, 1, : 2 * len(one)].tolist() == [0] * len(one) + [1] * len(one)


def test_each_file_is_opened_once_in_an_epoch_however_many_lanes_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is opened again is read from its beginning."""
    monkeypatch.setattr(documents, "BLOCK", 8)
    monkeypatch.setattr(documents, "BLOCKS_KEPT", 2)
    monkeypatch.setattr(documents, "FILES_OPEN", 2)
    for part in range(16):
        (tmp_path / f"{part:02}.jsonl").write_bytes(json_lines(TEXTS[:40]))
    config = job(DataSource(str(tmp_path), streaming=True), global_batch_size=16, epochs=1)
    (loader,) = loaders(config, 1, 0)
    data = loader.dataset.sources[0].data
    opened: list[int] = []
    shard = type(data).shard
    monkeypatch.setattr(type(data), "shard", lambda self, **kw: opened.append(kw["index"]) or shard(self, **kw))
    list(islice(iter(loader), 16 * config.training.steps))
    assert sorted(opened) == list(range(16))


def test_bytes_tell_that_a_streamed_source_is_another_one(tmp_path: Path) -> None:
    layouts = []
    for texts in (TEXTS, TEXTS[:-1]):
        (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
        layouts.append(loaders(job(DataSource(str(tmp_path), streaming=True)), 1, 0)[0].layout)
    assert layouts[0]["in source 0"] - layouts[1]["in source 0"] == len(json_lines(TEXTS)) - len(json_lines(TEXTS[:-1]))


def test_a_registered_dataset_that_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list) -> None:
    """torchtitan's c4 is such a dataset."""
    from datasets import load_dataset

    jsonl(tmp_path)
    registered = DatasetConfig(
        "", lambda path: load_dataset("json", data_files=f"{path}/*.jsonl", split="train", streaming=True),
        lambda sample: sample["text"],
    )  # fmt: skip
    monkeypatch.setitem(DATASETS, "streamed", registered)
    config = job(dataset="streamed", dataset_path=str(tmp_path), epochs=1)
    loaders(config, 1, 0)
    steps = config.training.steps
    assert documents_in(read(loaders(config, 2, 0), steps)) == expected


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for word in ("one", "another"):
        file.write_bytes(json_lines([word]))
        (batch,) = read(loaders(job(DataSource(str(file))), 1, 0), 1)
        assert batch[0, 0, : len(word) + 1].tolist() == tokens_of(word)


def test_unreadable_lines_are_skipped_and_counted_if_asked(tmp_path: Path, expected: list, caplog: Any) -> None:
    lines = json_lines(TEXTS).splitlines(keepends=True)
    lines[3:3] = [b"{not json\n", b'{"id": 1}\n', b"[1]\n", b"\n"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    config = job(DataSource(str(tmp_path), skip_unreadable=True, streaming=True), epochs=1)
    assert documents_in(read(loaders(config, 1, 0), config.training.steps)) == expected
    assert "a.jsonl: skipped 3 unreadable lines" in caplog.text


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: DataSource(str(f / "nowhere" / "*.jsonl")), "no file matches; files of documents end in .jsonl"),
        (lambda f: DataSource(str(f)), "no file matches"),
        (lambda f: DataSource(write(f, "a.jsonl", b"")), "no documents in it"),
        (lambda f: DataSource(write(f, "a.jsonl", json_lines(["x"], "body"))), "a.jsonl, line 1: no field 'text' .*has body, id"),
        (lambda f: DataSource(write(f, "a.jsonl", b'{"text": "x"}\n{"text": \n')), "a.jsonl, line 2: not JSON"),
        (lambda f: DataSource(write(f, "a.jsonl", b'{"input_ids": [1, 264]}\n')), "token id 264 is not in .*vocabulary of 264"),
        (lambda f: DataSource(write(f, "a.jsonl", b'{"text": "x"}\n{"input_ids": [1]}\n')), "line 2: no field 'text' .*has input_ids"),
        (lambda f: DataSource(write(f, "a.jsonl", b'{"input_ids": [1]}\n{"text": "x"}\n')), "a.jsonl, line 2: no field 'input_ids'"),
        (lambda f: DataSource(write(f, "a.jsonl", b'{"text": 7}\n')), "neither text nor a list of token ids: 7"),
        (lambda f: DataSource(write(f, "a.jsonl", b'{"input_ids": [1.5]}\n')), "neither text nor a list of token ids"),
        (lambda f: DataSource(write(f, "a.jsonl", b'{"input_ids": [[1], [2, 3]]}\n')), "neither text nor a list of token ids"),
        (lambda f: DataSource(write(f, "a.jsonl.gz", gzip.compress(json_lines(["x"]))[:-9])), "a.jsonl.gz, after line .*cut off"),
        (lambda f: DataSource(write(f, "a.jsonl.zst", b"no")), "a.jsonl.zst, after line 0: .*cut off or damaged"),
        (lambda f: [write(f, "a.jsonl", b"{}"), write(f, "b.txt", b"x"), DataSource(str(f))][-1],
         r"files of several kinds \(1 of json, 1 of text\); name those that are meant with a glob"),
        (lambda f: [write(f, "a.npy", b"12"), DataSource(str(f))][-1], "name them with a glob that ends in .npy"),
        (lambda f: [arrow(f), DataSource(str(f / "saved"))][-1], "no split 'train', which has some"),
        (lambda f: DataSource(write(f, "a.txt", b"\xff\xfe")), "a.txt: not UTF-8"),
        (lambda f: DataSource(write(f, "a.npy", b"123"), tokens_dtype="uint16"), "its size is no multiple of uint16"),
        (lambda f: DataSource(write(f, "a.npy", b"1234")), "a.npy: without NumPy's header; set tokens_dtype"),
        (lambda f: flat(f, "uint32", "uint16"), r"0.npy: read as uint16 \(tokens_dtype\), every second number is 0"),
        (lambda f: flat(f, "int64", "uint16"), r"0.npy: read as uint16 \(tokens_dtype\), every second number is 0"),
        (lambda f: flat(f, "int64", "int32"), r"0.npy: read as int32 \(tokens_dtype\), every second number is 0"),
        (lambda f: flat(f, ">u4", "uint16"), r"0.npy: read as uint16 \(tokens_dtype\), every second number is 0"),
        (lambda f: flat(f, "uint16", "uint32"), r"0.npy: read as uint32 \(tokens_dtype\), it has the token id \d+, .*narrower"),
        (lambda f: DataSource(write(f, "a.txt", b"x"), split="test"), "a.txt: split = 'test' has no effect on local files"),
        (lambda f: DataSource(write(f, "a.txt", b"x"), tokens_dtype="uint16"), "tokens_dtype = 'uint16' has no effect on local"),
        (lambda f: DataSource("c4", name="de"), "c4: name = 'de' has no effect on a registered dataset; leave it out"),
        (lambda f: DataSource("c4", text_field="body"), "c4: text_field = 'body' has no effect on a registered dataset"),
        (lambda f: [(f / "b.jsonl").symlink_to(f / "gone"), DataSource(str(f))][-1], "b.jsonl: a link to .*gone, where no file is"),
        (lambda f: [write(f, "a.txt", b"x"), DataSource(str(f / "copus"))][-1], "no file matches"),
        (lambda f: DataSource("copus.jsonl"), "'copus.jsonl': no file matches"),
        (lambda f: DataSource("./corpus"), "'./corpus': no file matches"),
        (lambda f: DataSource("corpus/en/wiki"), "'corpus/en/wiki': no file matches"),
        (lambda f: DataSource("tests/corpus"), "'tests/corpus': no file matches"),
        (lambda f: DataSource(write(f, "a.npy", b"")), "no tokens in it"),
        (lambda f: DataSource(write(f, "a.parquet", b"PAR1 no")), "a.parquet"),
        (lambda f: DataSource("some-org/some-dataset"), "some-org/some-dataset"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_said_in_one_line(tmp_path: Path, make: Maker, message: str, streaming: bool) -> None:
    source = make(tmp_path)
    source.streaming = streaming
    with pytest.raises(ConfigError, match=message) as raised:
        read(loaders(job(source), 1, 0), 2)
    assert str(raised.value).startswith("data.sources[0]: ") and "\n" not in str(raised.value)


def test_numbers_that_cannot_hold_the_vocabulary_are_refused(tmp_path: Path) -> None:
    source = flat(tmp_path, "uint16", "uint16")
    with pytest.raises(ConfigError, match="0.npy: uint16 .* cannot hold the ids of the model's vocabulary of 70000"):
        files.flat_tokens(source, 1, 9, 70000, None, 1)
    assert files.flat_tokens(source, 1, 9, 2**16, None, 1).size == 23


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_may_differ_in_columns_that_are_not_read(
    tmp_path: Path, kind: str, streaming: bool, expected: list
) -> None:
    for part, other in enumerate(({"url": ["x"] * 25}, {"url": [[1]] * 25, "more": [None] * 25})):
        data = Dataset.from_dict({**other, "text": TEXTS[part::2]})
        getattr(data, {"jsonl": "to_json", "parquet": "to_parquet"}[kind])(tmp_path / f"{part}.{kind}")
    config = job(DataSource(str(tmp_path), streaming=streaming), epochs=1)
    assert documents_in(read(loaders(config, 1, 0), config.training.steps)) == expected


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_padding_is_not_read_and_other_labels_are_refused(
    tmp_path: Path, kind: str, streaming: bool, expected: list
) -> None:
    def source(rows: list[dict]) -> FlameJobConfig:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.{kind}"
        getattr(Dataset.from_list(rows), {"jsonl": "to_json", "parquet": "to_parquet"}[kind])(file)
        return job(DataSource(str(file), streaming=streaming), epochs=1)

    rows = []
    for text in TEXTS:
        ids = tokens_of(text)
        padding = 100 - len(ids)
        mask = [1] * len(ids) + [0] * padding
        rows.append({"input_ids": ids + [7] * padding, "attention_mask": mask, "labels": ids + [-100] * padding})
    config = source(rows)
    assert documents_in(read(loaders(config, 1, 0), config.training.steps)) == expected
    rows[0]["labels"][3] += 1
    with pytest.raises(ConfigError, match="(row|line) 1: column 'labels' has [0-9]+ at token 4"):
        loaders(source(rows), 1, 0)


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("bad", [None, "half an emoji \ud83d", 7], ids=["null", "surrogate", "number"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_bad_row_is_named_or_skipped_and_counted(
    tmp_path: Path, kind: str, bad: Any, streaming: bool, expected: list, caplog: Any
) -> None:
    texts = [*TEXTS[:41], bad, *TEXTS[41:]]
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
        place, skipped = "a.jsonl, line 42: ", "a.jsonl: skipped 1 unreadable lines"
    elif bad is None:
        Dataset.from_dict({"text": texts[:20]}).to_parquet(tmp_path / "a.parquet")
        Dataset.from_dict({"text": texts[20:]}).to_parquet(tmp_path / "b.parquet")
        place = "b.parquet, row 22: "
        skipped = f"{place}skipped"
    else:
        return  # Parquet holds neither
    config = job(DataSource(str(tmp_path), streaming=streaming), epochs=1)
    with pytest.raises(ConfigError, match=place):
        loaders(config, 1, 0)
    config = job(DataSource(str(tmp_path), streaming=streaming, skip_unreadable=True), epochs=1)
    assert documents_in(read(loaders(config, 1, 0), config.training.steps)) == expected
    assert skipped in caplog.text


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_columns_that_nothing_reads_may_be_of_any_type(tmp_path: Path, streaming: bool, expected: list) -> None:
    pairs = pyarrow.array([[("a", 1)]] * len(TEXTS), type=pyarrow.map_(pyarrow.string(), pyarrow.int32()))
    names = pyarrow.array([b"0" * 16] * len(TEXTS), type=pyarrow.uuid())
    pyarrow.parquet.write_table(pyarrow.table({"m": pairs, "u": names, "text": TEXTS}), tmp_path / "a.parquet")
    config = job(DataSource(str(tmp_path), streaming=streaming), epochs=1)
    assert documents_in(read(loaders(config, 1, 0), config.training.steps)) == expected


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_the_line_of_an_id_beyond_the_vocabulary_is_named(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1]}\n')
    (tmp_path / "b.jsonl").write_text('{"input_ids": [1]}\n\n{"input_ids": [99999]}\n')
    with pytest.raises(ConfigError, match="b.jsonl, line 3: token id 99999 is not in the model's vocabulary"):
        read(loaders(job(DataSource(str(tmp_path), streaming=streaming)), 1, 0), 2)


def test_a_dataset_of_the_hub_beside_a_folder_of_its_owners_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(path: str, **_options: Any) -> Dataset:
        asked.append(path)
        return Dataset.from_dict({"text": TEXTS})

    config = job(DataSource("hf://allenai/c4", name="en"))
    config.model.hf_assets_path = str(TINY_OLMO)
    monkeypatch.chdir(tmp_path)
    Path("allenai").mkdir()
    monkeypatch.setattr(sources, "load_dataset", load)
    loaders(config, 1, 0)
    config.data.sources = [DataSource("allenai/c4")]
    with pytest.raises(ConfigError, match="'allenai/c4': no file matches; .*; a dataset on the Hub is hf://allenai/c4"):
        loaders(config, 1, 0)
    assert asked == ["allenai/c4"]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_found_later_is_said_in_one_line_too(tmp_path: Path, workers: int) -> None:
    file = write(tmp_path, "a.jsonl", json_lines(["x" * 100] * 2000) + b"[1]\n")
    with pytest.raises(ConfigError, match="a.jsonl, line 2001: not JSON with a field") as raised:
        read(loaders(job(DataSource(file, streaming=True)), 1, workers), 2000)
    assert "\n" not in str(raised.value)
