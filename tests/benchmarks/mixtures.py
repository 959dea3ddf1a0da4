"""Mixtures of experts: what seeding and a step of them cost: ``python -m tests.benchmarks --only mixtures``.

* ``mixture-seeding``: seconds from the first header to the last weight, beside a dense model of as many bytes, in turns, on one
  and two ranks of a trainer that is built.
* ``mixture-read``: the memory that the read takes beside a rank's shards. The shards are there and touched before; a thread then
  samples the rank's anonymous memory (``RssAnon``) while headers and weights are read. Pages of the mapped files, which the kernel
  drops when it needs them, do not count.
* ``mixture-steps``: a step beside torchtitan's own ``qwen3`` of the shape of two layers of its ``debugmodel_moe``, from the same
  weights on the same text, in turns.
* ``mixture-balance``: a step of four micro-batches without the routers' auxiliary loss and with either of its means.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Table, quartiles, ratios, spread, verdict
from tests.benchmarks.jobs import PLAIN, Job, MixtureShape, column, in_turns, save_backbone, write_text
from tests.benchmarks.steps import ratio_to

DENSE, MIXTURE = "dense", "mixture"

NATIVE, OURS, EAGER = (
    "torchtitan's `qwen3`, a loop over experts",
    "Hugging Face Qwen3-MoE, cross-entropy",
    'the same, `moe.experts_implementation = "eager"`',
)
WITHOUT, MICRO_BATCH, STEP = "no auxiliary loss", '`balance_over = "micro_batch"`', '`balance_over = "step"`'
NO_LOSS = "--moe.aux_loss_coef=0"
# torchtitan's debugmodel_moe with two of its eight layers, so that three jobs fit.
DEBUG = MixtureShape(2, 256, 768, 16, 2048, batch=4, seq_len=256, kv_heads=8, head_dim=128, experts=64, chosen=8)
QUICK = MixtureShape(2, 64, 96, 4, 512, batch=4, seq_len=128, kv_heads=2, head_dim=16, experts=8, chosen=2)
MICRO_BATCHES = 4


def measure(quick: bool = False) -> list[Table]:
    """The tables ``mixture-seeding``, ``mixture-read``, ``mixture-steps`` and ``mixture-balance``."""
    return [seeding_table(quick), read_table(quick), steps_table(quick), balance_table(quick)]


# -- steps ------------------------------------------------------------------------------------------------------------


def timed(
    shape: MixtureShape, rows: dict[str, Job], steps: int, warm_up: int, options: tuple[str, ...] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Each row's steps in turns, all from the same weights on the same text."""
    with tempfile.TemporaryDirectory() as scratch:
        backbone, text = save_backbone(Path(scratch) / "backbone", shape), write_text(Path(scratch) / "text")
        loads = ("--checkpoint.enable", "--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={backbone}")
        jobs = {}
        for number, (name, job) in enumerate(rows.items()):
            given = loads if job.kind == "host" else tuple(PLAIN)
            arguments = shape, str(backbone), str(text), str(Path(scratch) / f"run{number}")
            jobs[name] = (Job(job.kind, (*given, *job.options, *options)), *arguments)
        return in_turns(jobs, steps, warm_up)


def steps_table(quick: bool) -> Table:
    """A step of cross-entropy alone, ours and torchtitan's."""
    shape, steps = (QUICK, 3) if quick else (DEBUG, 12)
    eager = Job("ours", (NO_LOSS, "--moe.experts_implementation=eager"))
    found = timed(shape, {NATIVE: Job("host"), OURS: Job("ours", (NO_LOSS,)), EAGER: eager}, steps, 1 if quick else 2)
    rows = [
        [name, spread(column(taken, "wall"), 3), *(f"{ratio_to(found, name, NATIVE, u):.2f}x" for u in ("wall", "cpu"))]
        for name, taken in found.items()
    ]
    notes = [
        f"{shape}, float32, {steps} steps in turns, from the same weights.",
        f"Speed of ours to the native model: {1 / ratio_to(found, OURS, NATIVE, 'wall'):.2f}x.",
    ]
    return Table("mixture-steps", ["", "s a step", "to native", "CPU time, to native"], rows, notes, found)


def balance_table(quick: bool) -> Table:
    """A step with accumulation: the loss over a step needs a forward more, which only counts."""
    shape, steps = (QUICK, 3) if quick else (DEBUG, 8)
    over = {n: Job("ours", (f"--moe.balance_over={o}",)) for n, o in ((MICRO_BATCH, "micro_batch"), (STEP, "step"))}
    options = (f"--training.global_batch_size={MICRO_BATCHES * shape.batch}",)
    found = timed(shape, {WITHOUT: Job("ours", (NO_LOSS,)), **over}, steps, 1 if quick else 2, options)
    rows = [
        [
            name,
            spread(column(taken, "wall"), 3),
            *(f"{ratio_to(found, name, b, 'wall'):.2f}x" for b in (WITHOUT, MICRO_BATCH)),
        ]
        for name, taken in found.items()
    ]
    notes = [f"{shape}, {MICRO_BATCHES} a step, float32, {steps} steps in turns."]
    return Table("mixture-balance", ["", "s a step", "to no auxiliary loss", "to micro-batches"], rows, notes, found)


# -- seeding ----------------------------------------------------------------------------------------------------------


def models(quick: bool) -> dict[str, Any]:
    """Two configurations of as many bytes; of the mixture nearly all are in 1,536 matrices of experts, which the model stacks."""
    from transformers import OlmoeConfig

    from tests.benchmarks.seeding import OLMO_1B, with_layers

    if quick:
        tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
        few = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 0}
        mixture = OlmoeConfig(**tiny, **few, vocab_size=512)
        return {DENSE: with_layers(2, **tiny, vocab_size=512), MIXTURE: mixture}
    mixture = OlmoeConfig(
        **{"vocab_size": 50304, "hidden_size": 1024, "intermediate_size": 640, "num_hidden_layers": 16},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 32, "num_experts_per_tok": 4},
        **{"eos_token_id": 50279, "pad_token_id": 1},
    )
    return {DENSE: OLMO_1B, MIXTURE: mixture}


def seeding_table(quick: bool) -> Table:
    """Seconds of either model's read, in turns, on one and two ranks."""
    from tests.benchmarks.seeding import make_checkpoint, plain_copy

    runs = 1 if quick else 3
    found: dict[str, dict[int, list[float]]] = {DENSE: {}, MIXTURE: {}}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in found}
        for name, config in models(quick).items():
            make_checkpoint(folders[name], config)
            plain_copy(folders[name])  # fills the page cache
        size = {
            name: sum(file.stat().st_size for file in folder.glob("*.safetensors")) for name, folder in folders.items()
        }
        for processes in (1, 2):
            for _ in range(runs):
                for name, folder in folders.items():
                    seconds = max(rank["seconds"] for rank in in_ranks(processes, "time", folder))
                    found[name].setdefault(processes, []).append(seconds)
    rows, notes = [], []
    for processes in (1, 2):
        compared = [r * size[DENSE] / size[MIXTURE] for r in ratios(found[MIXTURE][processes], found[DENSE][processes])]
        ratio = quartiles(compared)[1]
        for name in found:
            cells = [name, f"{size[name] / 1e9:.2f}", str(processes), spread(found[name][processes])]
            rows.append([*cells, f"{ratio:.2f}x" if name == MIXTURE else "-"])
        notes.append(verdict(f"The mixture to the dense model, a byte, ranks: {processes}", ratio, 1.3))
    columns = ["model", "GB read", "ranks", "seeding, s", "to dense, a byte"]
    return Table("mixture-seeding", columns, rows, [" ".join(notes)], found)


def read_table(quick: bool) -> Table:
    """Anonymous memory at its peak on two ranks, for parameters of either dtype."""
    from transformers import OlmoeConfig

    from tests.benchmarks.seeding import make_checkpoint

    hidden, width = (256, 512) if quick else (4096, 8192)
    config = OlmoeConfig(
        **{
            "vocab_size": 512,
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": 1,
            "eos_token_id": 0,
        },
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 8, "num_experts_per_tok": 2},
    )
    expert = hidden * width * 2
    rows, figures, worst = [], {}, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch), config)
        for dtype in ("float32", "bfloat16"):
            ranks = in_ranks(2, "memory", Path(scratch), f"--training.dtype={dtype}")
            figures[dtype] = ranks
            shards, beside = max(r["shards"] for r in ranks), max(r["beside"] for r in ranks)
            worst = max(worst, beside / expert)
            cells = [f"{shards / 2**20:,.0f}", f"{beside / 2**20:,.1f}", f"{beside / expert:.2f}"]
            rows.append([dtype, *cells, str(min(r["samples"] for r in ranks))])
    met = "met" if worst <= 2 else "**missed**"
    notes = [
        f"8 experts in one layer, of 3 tensors of {expert / 2**20:g} MiB in bfloat16 each, on two ranks; anonymous memory of the "
        f"larger rank. Beside its shards {worst:.2f} source tensors, goal at most 2: {met}."
    ]
    columns = ["parameters", "own shards, MiB", "peak beside them, MiB", "in source tensors", "samples"]
    return Table("mixture-read", columns, rows, notes, figures)


# -- in the ranks of a job --------------------------------------------------------------------------------------------


def in_ranks(processes: int, what: str, folder: Path, *options: str) -> list[dict[str, float]]:
    """Read the model in ``folder`` on so many ranks; returns what each has found."""
    from tests.benchmarks.seeding import launch

    with tempfile.TemporaryDirectory() as dump_folder:
        launch(processes, "-m", "tests.benchmarks.mixtures", what, str(folder), dump_folder, *options, watch=False)
        return [json.loads((Path(dump_folder) / f"rank{rank}.json").read_text()) for rank in range(processes)]


def rank_main(what: str, folder: str, dump_folder: str, *options: str) -> None:
    """In a rank: build the trainer, and read the weights into it as its seeding does."""
    import torch.distributed as dist

    from flame_ext.seeding.read import read_weights
    from flame_ext.seeding.seed import match
    from flame_ext.seeding.target import seed_target
    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer
    from tests.benchmarks.seeding import arguments, touch_memory

    config = parse([*arguments(Path(folder), dump_folder), *PLAIN, *options])
    trainer = FutureTrainer(config)
    state = trainer.checkpointer.states["model"].state_dict()
    target = seed_target(trainer.runner.model, state, trainer.model_args.load())

    def read() -> None:
        source, _, _, _ = match(target, Path(folder), config.seed)
        read_weights(source, target.state, target.model.tied_keys, check_finite=True)

    if what == "time" and dist.get_rank() == 0:
        touch_memory(Path(folder))
    dist.barrier()
    found = timed_once(read) if what == "time" else measured_memory(read, state)
    (Path(dump_folder) / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    trainer.close()
    dist.destroy_process_group()


def timed_once(read: Callable[[], None]) -> dict[str, float]:
    begin = time.perf_counter()
    read()
    return {"seconds": time.perf_counter() - begin}


def measured_memory(read: Callable[[], None], state: dict[str, Any]) -> dict[str, float]:
    """Bytes of the shards, and what the process has beside them and itself at the peak of the read."""
    from flame_ext.seeding.sources.boxes import local_part

    shards = [local_part(tensor)[0] for tensor in state.values()]
    for shard in shards:
        shard.zero_()  # now they have their pages
    before = anonymous_bytes()
    with sampled() as samples:
        read()
    return {"shards": sum(s.nbytes for s in shards), "beside": max(samples) - before, "samples": len(samples)}


def anonymous_bytes() -> int:
    """Memory of this process that is in no file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Anonymous memory of this process, each half a millisecond of the block."""
    samples, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            samples.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
