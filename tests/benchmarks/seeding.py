"""Seeding an OLMo-1B-shaped model on CPU, against a plain safetensors copy of the same bytes in the same run.

    python tests/benchmarks/seeding.py [--runs 3] [--folder DIR] [--json FILE]

Makes a random checkpoint of 1.18 B parameters (bfloat16, sharded, 2.4 GB; kept if ``--folder`` is given), then, on one
and on two processes under torchrun:

* time: the trainer is built; rank 0 alone, with all cores, copies every tensor into a fresh float32 one with safetensors
  and nothing else; then the trainer seeds itself, and the time is the one in ``seed_report.json``. Both write to fresh
  memory, which is most of what they cost. Before each, the same process touches as much and gives it back: a virtual
  machine that gets its memory from its host only now would be measured instead.
* memory: a run of the command itself with ``--seed.dry_run``; all processes together (proportional set size, so that
  shared pages and the mapped files count once) at their peak.

Prints a Markdown table.
"""

from __future__ import annotations

import argparse
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

    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer

    trainer = FutureTrainer(parse(arguments(folder, dump_folder)))
    if dist.get_rank() == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(psutil.cpu_count())
        touch_memory(folder)
        (Path(dump_folder) / "plain").write_text(str(plain_copy(folder)))
        touch_memory(folder)
        torch.set_num_threads(threads)
    dist.barrier()
    trainer.train()
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
    args = parser.parse_args()
    if args.rank_of:
        return rank_main(Path(args.rank_of[0]), args.rank_of[1])
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "config.json").exists():
            make_checkpoint(folder)
        plain_copy(folder)  # fills the page cache
        for processes in (1, 2):
            plain, seeding = [], []
            for _ in range(args.runs):
                with tempfile.TemporaryDirectory() as dump_folder:
                    launch(processes, __file__, "--rank-of", str(folder), dump_folder)
                    plain.append(float((Path(dump_folder) / "plain").read_text()))
                    seeding.append(json.loads((Path(dump_folder) / "seed_report.json").read_text())["seconds"])
            with tempfile.TemporaryDirectory() as dump_folder:
                peak = launch(processes, "-m", "flame_ext.train", *arguments(folder, dump_folder)) / 2**30
            ratio = statistics.median(s / p for s, p in zip(seeding, plain, strict=True))
            rows.append({"processes": processes, "plain": plain, "seeding": seeding, "ratio": ratio, "peak_gib": peak})
    print(f"torch {torch.__version__}, CPU, {psutil.cpu_count()} cores, medians of {args.runs} runs\n")
    print("| processes | plain copy, s | seeding, s | ratio | dry run, peak GiB in all |")
    print("|---|---|---|---|---|")
    for row in rows:
        plain, seeding = statistics.median(row["plain"]), statistics.median(row["seeding"])
        print(f"| {row['processes']} | {plain:.2f} | {seeding:.2f} | {row['ratio']:.2f}x | {row['peak_gib']:.1f} |")
    if args.json:
        figures = {"torch": torch.__version__, "cores": psutil.cpu_count(), "rows": rows}
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
