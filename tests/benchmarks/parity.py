"""What the proof of parity costs the main rank, beside the forward that every mode has: ``python -m tests.benchmarks --only parity``.

On OLMo-1B's shape in float32, from a bfloat16 folder, in a fresh process for each run: the logits of 128 tokens by the stock model
with its weights read block by block, as the proof computes them, and by ``from_pretrained`` of all of it, as it did before and does
where a model cannot run by blocks. Memory is the peak of ``RssAnon`` less what it was before, so without the pages of the mapped
files, which the kernel takes back when it needs them.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from pathlib import Path

from tests.benchmarks.common import Table, in_fresh_process, quartiles, ratios, spread, verdict
from tests.benchmarks.seeding import cases, make_checkpoint, plain_copy, touch_memory

GOAL = 0.5
WAYS = {"a block at a time": "logits_by_blocks", "from_pretrained of all": "logits_of_whole"}


def measure(quick: bool = False) -> list[Table]:
    """The table ``parity``."""
    case = cases(quick)[0]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    gib: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), case.config)
        plain_copy(Path(folder))  # fills the page cache
        for way in [*WAYS] * (1 if quick else 3):
            took, more = in_fresh_process(compute, folder, WAYS[way])
            seconds[way].append(took)
            gib[way].append(more)
    rows = [[way, spread(seconds[way]), spread(gib[way])] for way in WAYS]
    ours, before = WAYS
    notes = [
        f"{case.label}, float32, 128 tokens, one thread to compute.",
        verdict("Time, to from_pretrained", quartiles(ratios(seconds[ours], seconds[before]))[1], GOAL)
        + " "
        + verdict("Memory", quartiles(ratios(gib[ours], gib[before]))[1], GOAL),
    ]
    return [Table("parity", ["stock model", "s", "GiB more"], rows, notes, {"seconds": seconds, "gib": gib})]


def compute(folder: str, method: str) -> tuple[float, float]:
    """Seconds and GiB of memory that the reference's logits take."""
    import torch
    from transformers import AutoConfig

    from flame_ext.seeding.proof.parity import Probe
    from flame_ext.seeding.proof.reference import Reference
    from flame_ext.seeding.sources.open import open_source

    torch.set_num_threads(1)  # as torchrun has it
    source, config = open_source(folder), AutoConfig.from_pretrained(folder)
    float32, cpu = torch.float32, torch.device("cpu")
    probe = Probe(
        torch.arange(128)[None], lambda x: x, contextlib.nullcontext, float32, float32, cpu, config.vocab_size
    )
    touch_memory(Path(folder))
    sizes, done = [anonymous_gib()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            sizes.append(anonymous_gib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    getattr(Reference(source, config, set(source.entries)), method)(probe)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return seconds, max(sizes) - sizes[0]


def anonymous_gib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 2**20
