"""Seeding an OLMo-1B-shaped model on CPU, against other ways to get the same bytes into float32 tensors, in the same run.

    python tests/benchmarks/seeding.py [--runs 3] [--folder DIR] [--json FILE]

Makes a random checkpoint of 1.18 B parameters (bfloat16, sharded, 2.4 GB; kept if ``--folder`` is given). Then, on one and
on two processes under torchrun, in every run:

* the trainer is built; rank 0 alone, with all cores, copies every tensor into a fresh float32 one with safetensors and
  nothing else ("plain copy"), and does the same through DCP's ``HuggingFaceStorageReader``; then the trainer seeds itself,
  and the time is the one in ``seed_report.json``. The comparison of all ranks' weights by digest is timed apart.
* memory: a run of the command itself with ``--seed.dry_run``; all processes together (proportional set size, so that
  shared pages and the mapped files count once) at their peak.

And in one process, the way of an offline conversion: ``from_pretrained``, ``dcp.save``, and ``dcp.load`` into the trainer's
tensors, with the bytes that it leaves on disk.

All of them write to fresh memory, which is most of what they cost. Before each, the same process touches as much and gives
it back: a virtual machine that gets its memory from its host only now would be measured instead.

Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, OlmoConfig

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_OLMO = REPOSITORY / "tests" / "assets" / "tiny_olmo"

# https://huggingface.co/allenai/OLMo-1B-hf/blob/main/config.json
OLMO_1B = OlmoConfig(
    vocab_size=50304,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=16,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    eos_token_id=50279,
    pad_token_id=1,
)
FILES = 4


def make_checkpoint(folder: Path) -> None:
    """Random weights under the architecture's own names, a byte-level tokenizer, and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OLMO_1B)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = list(shapes)
    weight_map = {}
    for number in range(FILES):
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        tensors = {}
        for name in names[number * len(names) // FILES : (number + 1) * len(names) // FILES]:
            tensors[name] = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02)
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    OLMO_1B.architectures = ["OlmoForCausalLM"]
    OLMO_1B.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_OLMO / name, folder / name)


def touch_memory(folder: Path) -> None:
    """Write to as much fresh memory as a float32 copy of the checkpoint needs, and give it back."""
    gib = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2**30 + 1
    [torch.ones(2**28) for _ in range(gib)]


def plain_copy(folder: Path) -> float:
    """Seconds to copy every tensor into a fresh float32 one, as anybody would write it."""
    begin = time.perf_counter()
    copies = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (a safe_open is no mapping)
                values = reader.get_tensor(name)
                copies[name] = torch.empty(values.shape, dtype=torch.float32).copy_(values)
    return time.perf_counter() - begin


def storage_reader_copy(folder: Path) -> float:
    """Seconds for the same through DCP's reader of Hugging Face folders."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OLMO_1B)
    begin = time.perf_counter()
    state = {name: torch.empty(p.shape, dtype=torch.float32) for name, p in model.named_parameters()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return time.perf_counter() - begin


def offline_main(folder: Path, scratch: Path) -> None:
    """The old way, in a process of its own; prints seconds of each part and the bytes on disk as JSON."""
    checkpoint = scratch / "dcp"
    touch_memory(folder)
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    converted = time.perf_counter()
    state = {name: p.detach() for name, p in model.named_parameters()}
    dcp.save({"model": state}, storage_writer=dcp.FileSystemWriter(checkpoint, thread_count=8), no_dist=True)
    saved = time.perf_counter()
    shapes = {name: p.shape for name, p in state.items()}
    del model, state  # the trainer that loads is another process
    gc.collect()
    touch_memory(folder)
    loading = time.perf_counter()
    fresh = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    dcp.load({"model": fresh}, checkpoint_id=checkpoint, no_dist=True)
    seconds = [converted - begin, saved - converted, time.perf_counter() - loading]
    print(json.dumps({"seconds": seconds, "bytes": sum(f.stat().st_size for f in checkpoint.iterdir())}))


def arguments(folder: Path, dump_folder: str) -> list[str]:
    """A dry run of the debug job on the checkpoint in ``folder``."""
    return [
        *("--job.config_file", str(REPOSITORY / "configs" / "debug.toml"), "--job.dump_folder", dump_folder),
        *("--model.hf_assets_path", str(folder), "--checkpoint.initial_load_path", str(folder)),
        *("--seed.verify", "finite", "--seed.dry_run", "--metrics.no-enable-tensorboard"),
    ]


def rank_main(folder: Path, dump_folder: str) -> None:
    """In a rank: the plain copy, then the seeding of a trainer that is already built."""
    import torch.distributed as dist

    from flame_ext.seeding.replicas import compare_replicas
    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer

    trainer = FutureTrainer(parse(arguments(folder, dump_folder)))
    if dist.get_rank() == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(psutil.cpu_count())
        for name, copy in (("plain", plain_copy), ("reader", storage_reader_copy)):
            touch_memory(folder)
            (Path(dump_folder) / name).write_text(str(copy(folder)))
        touch_memory(folder)
        torch.set_num_threads(threads)
    dist.barrier()
    trainer.train()
    begin = time.perf_counter()
    compare_replicas(trainer.checkpointer.states["model"].state_dict())
    if dist.get_rank() == 0:
        (Path(dump_folder) / "digest").write_text(str(time.perf_counter() - begin))
    trainer.close()


def launch(processes: int, *command: str) -> int:
    """Run under torchrun; returns the bytes of all processes together at their peak."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*torchrun, *command], cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
        peak = [0]
        watcher = threading.Thread(target=_watch_memory, args=(process, peak))
        watcher.start()
        process.wait()
        watcher.join()
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command} failed:\n{log.read()[-3000:]}")
    return peak[0]


def _watch_memory(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        total = 0
        try:
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                total += one.memory_full_info().pss
        except psutil.Error:
            continue
        peak[0] = max(peak[0], total)
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made, or lies already; kept")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--offline-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        return rank_main(Path(args.rank_of[0]), args.rank_of[1])
    if args.offline_of:
        return offline_main(*map(Path, args.offline_of))
    rows, offline = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "model"
        if not (folder / "config.json").exists():
            make_checkpoint(folder)
        plain_copy(folder)  # fills the page cache
        for processes in (1, 2):
            row: dict[str, list[float]] = {name: [] for name in ("plain", "reader", "seeding", "digest")}
            for _ in range(args.runs):
                with tempfile.TemporaryDirectory() as dump_folder:
                    launch(processes, __file__, "--rank-of", str(folder), dump_folder)
                    for name in ("plain", "reader", "digest"):
                        row[name].append(float((Path(dump_folder) / name).read_text()))
                    row["seeding"].append(json.loads((Path(dump_folder) / "seed_report.json").read_text())["seconds"])
            with tempfile.TemporaryDirectory() as dump_folder:
                peak = launch(processes, "-m", "flame_ext.train", *arguments(folder, dump_folder)) / 2**30
                written = sum(f.stat().st_size for f in Path(dump_folder).rglob("*") if f.is_file())
            rows.append({"processes": processes, **row, "peak_gib": peak, "written": written})
        for _ in range(args.runs):
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                command = [sys.executable, __file__, "--offline-of", str(folder), scratch]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                offline.append(json.loads(output.splitlines()[-1]))
    print_table(rows, offline, args.runs)
    if args.json:
        figures = {"torch": torch.__version__, "cores": psutil.cpu_count(), "rows": rows, "offline": offline}
        args.json.write_text(json.dumps(figures, indent=2))


def print_table(rows: list[dict], offline: list[dict], runs: int) -> None:
    def spelled(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"

    print(f"torch {torch.__version__}, CPU, {psutil.cpu_count()} cores, medians of {runs} runs (each run)\n")
    print(
        "| processes | plain copy, s | HuggingFaceStorageReader, s | seeding, s | seeding / plain copy | digests, s | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = statistics.median(s / p for s, p in zip(row["seeding"], row["plain"], strict=True))
        cells = [spelled(row[name]) for name in ("plain", "reader", "seeding")]
        print(
            f"| {row['processes']} | {' | '.join(cells)} | {ratio:.2f}x | {spelled(row['digest'])} | {row['peak_gib']:.1f} |"
        )
    total = [sum(run["seconds"]) for run in offline]
    parts = [statistics.median(run["seconds"][i] for run in offline) for i in range(3)]
    print(
        f"\nOffline: {spelled(total)} s (from_pretrained {parts[0]:.1f}, dcp.save {parts[1]:.1f}, dcp.load {parts[2]:.1f}), "
        f"{offline[0]['bytes']:,} bytes written; seeding wrote {rows[0]['written']:,} (its report)"
    )
    for row in rows:
        print(
            f"offline / seeding on {row['processes']}: {statistics.median(total) / statistics.median(row['seeding']):.1f}x"
        )


if __name__ == "__main__":
    main()
