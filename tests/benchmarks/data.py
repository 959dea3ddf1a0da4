"""What the data cost: ``python -m tests.benchmarks.data [--rounds 5] [--megabytes 20]`` prints a Markdown table.

Each row is tokens a second on one core, beside its peer from the same run: the datasets library with the tokenizer's own batch
call. They take turns, so that a slow minute of the machine falls on all of them. The tokenizer is a BPE of 16,000 tokens that
is trained on the Python standard library first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import flame_ext  # noqa: F401  (before torchtitan)
from tests.benchmarks.common import Table, in_fresh_process, quartiles, ratios

if TYPE_CHECKING:
    from flame_ext.data.loader import PackedDataloader

SEQ_LEN, LANES = 2048, 8
PEER = "datasets and the tokenizer's batch call"


def tokenizer_in(folder: Path) -> None:
    """Train and save one, with a model's configuration of its vocabulary."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import OlmoConfig, PreTrainedTokenizerFast

    from flame_ext.data.python_stdlib import read_stdlib

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(read_stdlib("train"), vocab_size=16_000, special_tokens=["<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<eos>").save_pretrained(folder)
    shape = {"vocab_size": 16_000, "hidden_size": 32, "num_attention_heads": 2, "eos_token_id": 0}
    OlmoConfig(**shape, architectures=["OlmoForCausalLM"]).save_pretrained(folder)


def write_text(file: Path, megabytes: int) -> None:
    """Files of the standard library as lines of JSON, cut to 8,000 characters, again and again."""
    from flame_ext.data.python_stdlib import read_stdlib

    texts = [text[i : i + 8000] for text in read_stdlib("pretrain") for i in range(0, len(text), 8000)]
    size = 0
    with file.open("w") as stream:
        while size < megabytes * 2**20:
            for number, text in enumerate(texts):
                size += stream.write(json.dumps({"id": number, "text": text}) + "\n")
                if size >= megabytes * 2**20:
                    break


def dataloader(folder: Path, path: Path, streaming: bool) -> PackedDataloader:
    """Of one source."""
    from flame_ext.config.sections import DataSource, FlameJobConfig
    from flame_ext.data.build import build_dataloader
    from flame_ext.data.tokenizer import build_tokenizer

    config = FlameJobConfig()
    config.model.hf_assets_path = str(folder)
    config.training.seq_len, config.training.local_batch_size = SEQ_LEN, LANES
    config.data.sources = [DataSource(str(path), streaming=streaming)]
    return build_dataloader(1, 0, build_tokenizer(config), config)


def ours(folder: Path, path: Path, streaming: bool) -> Iterator[int]:
    """Tokens of each batch."""
    for _, labels in dataloader(folder, path, streaming):
        yield labels.numel()


def plain(folder: Path, path: Path) -> Iterator[int]:
    """The library's own rows, in batches, and the tokenizer's batch call."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    while True:
        for batch in data.iter(batch_size=64):
            yield sum(map(len, tokenizer(batch["text"])["input_ids"]))


def rate(batches: Iterator[int], seconds: float) -> float:
    """Tokens a second, after the first batch."""
    next(batches)
    tokens, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) < begin + seconds:
        tokens += next(batches)
    del now
    return tokens / (time.perf_counter() - begin)


def memory_of(folder: Path, path: Path, streaming: bool) -> tuple[float, float, float]:
    """Memory of its own (MiB, without what is mapped) of a fresh process: after a tenth of the documents, after half, after all.

    Of each document the beginning alone is tokenised: all of it would take an hour, in the same memory.
    """
    code = f"""
from pathlib import Path
from flame_ext.data import sources
from tests.benchmarks.data import documents_of, own_memory
encode = sources._Encoder._encode
sources._Encoder._encode = lambda self, text: encode(self, text[:200])
total = sum(1 for _ in Path({str(path)!r}).open())
marks, seen = [total // 10, total // 2, total - 1], []
for count in documents_of(Path({str(folder)!r}), Path({str(path)!r}), {streaming}):
    if count == marks[len(seen)]:
        seen.append(own_memory())
        if len(seen) == len(marks):
            break
print(*seen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    first, half, last = map(float, done.stdout.split()[-3:])
    return first, half, last


def documents_of(folder: Path, path: Path, streaming: bool) -> Iterator[int]:
    """Reads documents, a lane at a time, and counts them."""
    loader = dataloader(folder, path, streaming)
    (source,) = loader.dataset.sources
    cursors = {number: lane.cursors[0] for number, lane in loader.dataset.lanes.items()}
    count = 0
    while True:
        for lane, cursor in cursors.items():
            found = source.read(lane, cursor)
            assert found is not None
            cursors[lane], count = found[1], count + 1
            yield count


def share_of_debug_step() -> float:
    """What torchtitan says that the dataloader takes of a step of the debug job, median, in percent."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        options = [f"--job.dump_folder={folder}", "--seed.verify=none", "--training.steps=40"]
        command = [sys.executable, "-m", "flame_ext.train", "--job.config_file=configs/debug.toml", *options]
        env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        subprocess.run(command, env={**env, "MASTER_PORT": "29517"}, capture_output=True, check=True)
        (events,) = Path(folder).rglob("events.out.*")
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        shares = accumulator.Scalars("time_metrics/data_loading(%)")
        return statistics.median(event.value for event in shares[2:])


def own_memory() -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def tables(rounds: int, seconds: float, megabytes: int, memory: bool) -> list[Table]:
    """The tables ``data`` and, if asked for, ``data-memory``. Binds the process to one core: call it in one of its own."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        import numpy as np
        from datasets import Dataset
        from transformers import AutoTokenizer

        tokenizer_in(folder)
        text = folder / "text.jsonl"
        write_text(text, megabytes)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        lines = (json.loads(line)["text"] for line in text.open())
        tokens = [[*tokenizer(line)["input_ids"], 0] for line in islice(lines, 2500)]
        Dataset.from_dict({"input_ids": tokens}).to_parquet(folder / "rows.parquet")
        np.save(folder / "flat.npy", np.array([token for row in tokens for token in row], dtype=np.uint16))
        rows: dict[str, Callable[[], Iterator[int]]] = {
            PEER: lambda: plain(folder, text),
            "text": lambda: ours(folder, text, streaming=False),
            "text, streamed": lambda: ours(folder, text, streaming=True),
            "rows of tokens (Parquet)": lambda: ours(folder, folder / "rows.parquet", streaming=False),
            "flat tokens (.npy)": lambda: ours(folder, folder / "flat.npy", streaming=False),
        }
        running = {name: make() for name, make in rows.items()}
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(rounds):
            for name, batches in running.items():
                rates[name].append(rate(batches, seconds))
        cells = [
            [name, f"{quartiles(values)[1] / 1e6:.2f} M", f"{quartiles(ratios(values, rates[PEER]))[1]:.2f}x"]
            for name, values in rates.items()
        ]
        notes = [
            f"{rounds} rounds of {seconds:g} s each, in turns. The dataloader takes {share_of_debug_step():.2f} % of a step of the "
            "debug job (median)."
        ]
        found = [Table("data", ["", "tokens/s on one core", "against the first row"], cells, notes, rates)]
        if memory:
            marks = {label: memory_of(folder, text, label != "text") for label in ("text", "text, streamed")}
            columns = ["memory of the process, MiB", "after a tenth", "after half", "after all"]
            cells = [[label, *(f"{value:.0f}" for value in values)] for label, values in marks.items()]
            found.append(Table("data-memory", columns, cells, [f"{megabytes:,} MB of text."], marks))
        return found


def measure(quick: bool = False) -> list[Table]:
    """The table ``data``."""
    return in_fresh_process(tables, *((1, 0.3, 2, False) if quick else (5, 4.0, 20, False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row in each round")
    parser.add_argument("--megabytes", type=int, default=20, help="of text")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also measure memory over all of the text (with 2048 megabytes: over 2 GB)",
    )
    options = parser.parse_args()
    for table in tables(options.rounds, options.seconds, options.megabytes, options.memory):
        print(table.markdown(), end="\n\n")


if __name__ == "__main__":
    main()
