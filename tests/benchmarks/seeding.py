"""Seeding an OLMo-1B-shaped model on CPU, against other ways to get the same bytes into float32 tensors, in the same run.

    python -m tests.benchmarks.seeding [--runs 5] [--layers 16] [--ranks 1] [--folder DIR] [--json FILE]

Makes a random checkpoint of 1.18 B parameters (bfloat16, sharded, 2.4 GB; kept if ``--folder`` is given), and smaller ones of a half
and a quarter of its layers; ``--layers`` and ``--ranks`` take one of them. Then, on one, two and four processes under torchrun, in
every run, which is printed as it ends:

* the trainer is built; rank 0 alone, with all cores, copies every tensor into a fresh float32 one with safetensors and
  nothing else ("plain copy"), and does the same through DCP's ``HuggingFaceStorageReader``; then the trainer seeds itself,
  and the time is the one in ``seed_report.json``. The comparison of all ranks' weights by digest is timed apart.
* memory: a run of the command itself with ``--seed.dry_run``; the largest rank, and all processes together, at
  their peak (proportional set size, so that shared pages and the mapped files count once).

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
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, OlmoConfig, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from tests.benchmarks.common import REPOSITORY, TINY_OLMO, Table, quartiles, ratios, spread, verdict

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


def make_checkpoint(folder: Path, config: PreTrainedConfig = OLMO_1B) -> None:
    """Random weights under the architecture's own names, a byte-level tokenizer, and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = revert_weight_conversion(model, dict(model.named_parameters()))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    names = list(shapes)
    weight_map = {}
    for number in range(FILES):
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        tensors = {}
        for name in names[number * len(names) // FILES : (number + 1) * len(names) // FILES]:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            tensors[name] = tensor.fill_(1) if tensor.ndim == 1 else tensor.normal_(std=0.02)  # those of norms
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
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
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
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
    """In a rank: the other copies, then the seeding of a trainer that is already built, without the forwards after it."""
    import torch.distributed as dist

    from flame_ext.seeding import seed
    from flame_ext.seeding.proof.parity import Verification
    from flame_ext.seeding.proof.replicas import compare_replicas
    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer

    # They are not in the time that is measured, and take minutes on a CPU.
    seed.verify = lambda mode, *_: Verification(mode, loss=float("nan"))
    seed.prove_attention = lambda probe: []
    trainer = FutureTrainer(parse(arguments(folder, dump_folder)))
    if dist.get_rank() == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(psutil.cpu_count())
        for name, copy in (("reader", storage_reader_copy), ("plain", plain_copy)):
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
    dist.barrier()
    dist.destroy_process_group()  # its threads, if they are still there, abort the process at its end


def launch(processes: int, *command: str, watch: bool = True) -> Peak:
    """Run under torchrun; returns the memory of its ranks, which takes a core to watch."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*torchrun, *command], cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
        peak = Peak()
        if watch:
            _watch_memory(process, peak)
        process.wait()
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command} failed:\n{log.read()[-3000:]}")
    return peak


@dataclass
class Peak:
    """Proportional set sizes in bytes: shared pages and mapped files count once."""

    total: int = 0
    """Of all processes at one time."""
    rank: dict[int, int] = field(default_factory=dict)
    """Process id to its own peak."""

    @property
    def largest_rank(self) -> int:
        return max(self.rank.values(), default=0)


def _watch_memory(process: subprocess.Popen, peak: Peak) -> None:
    while process.poll() is None:
        total = 0
        try:
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                size = one.memory_full_info().pss
                total += size
                if one.pid != process.pid:
                    peak.rank[one.pid] = max(peak.rank.get(one.pid, 0), size)
        except psutil.Error:
            continue
        peak.total = max(peak.total, total)
        time.sleep(0.05)


@dataclass(frozen=True)
class Case:
    """What is seeded on how many ranks."""

    label: str
    config: PreTrainedConfig
    processes: int


def with_layers(layers: int, **changes: int) -> OlmoConfig:
    """OLMo-1B with another number of layers."""
    return OlmoConfig(**{**OLMO_1B.to_dict(), "num_hidden_layers": layers, **changes})


def cases(quick: bool, layers: int | None = None, ranks: int | None = None) -> list[Case]:
    """OLMo-1B, and a half and a quarter of its layers, on 1, 2 and 4 ranks; of one size, and on one number of ranks, if given."""
    if quick:
        tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
        model = with_layers(2, **tiny, vocab_size=512)
        return [Case("tiny", model, processes) for processes in ([ranks] if ranks else (1, 2))]
    models = {f"OLMo-1B, {n} layers": with_layers(n) for n in ([layers] if layers else (16, 8, 4))}
    return [Case(label, config, n) for label, config in models.items() for n in ([ranks] if ranks else (1, 2, 4))]


def seed_case(case: Case, folder: Path, runs: int) -> dict[str, Any]:
    """Seconds of each run and way, parameters, and the peak of memory of a dry run of the command itself."""
    row: dict[str, Any] = {name: [] for name in ("plain", "reader", "seeding", "digest")}
    for run in range(1, runs + 1):
        with tempfile.TemporaryDirectory() as dump_folder:
            launch(case.processes, "-m", "tests.benchmarks.seeding", "--rank-of", str(folder), dump_folder, watch=False)
            for name in ("plain", "reader", "digest"):
                row[name].append(float((Path(dump_folder) / name).read_text()))
            report = json.loads((Path(dump_folder) / "seed_report.json").read_text())
            row["seeding"].append(report["seconds"])
        last = {name: f"{times[-1]:.2f}" for name, times in row.items()}
        print(f"{case.label}, {case.processes} ranks, run {run} of {runs}, s: {last}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as dump_folder:
        peak = launch(case.processes, "-m", "flame_ext.train", *arguments(folder, dump_folder))
        row["written"] = sum(f.stat().st_size for f in Path(dump_folder).rglob("*") if f.is_file())
    row |= {"case": case.label, "processes": case.processes, "peak_gib": peak.total / 2**30}
    return row | {
        "rank_peak_gib": peak.largest_rank / 2**30,
        "source_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def offline_runs(folder: Path, runs: int) -> list[dict[str, Any]]:
    """Seconds of each part of the offline way, and the bytes that it leaves."""
    found = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            command = [sys.executable, "-m", "tests.benchmarks.seeding", "--offline-of", str(folder), scratch]
            output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
    return found


def tables(found: list[dict[str, Any]], offline: list[dict[str, Any]]) -> list[Table]:
    """The table ``seeding``; ``offline`` is that of the first case's checkpoint."""
    columns = ["model", "GB read", "ranks", "plain copy, s", "HuggingFaceStorageReader, s", "seeding, s"]
    columns += ["seeding / plain copy", "digests, s", "peak of a rank, GiB", "of all, GiB"]
    cells, notes = [], []
    for row in found:
        ratio = spread(ratios(row["seeding"], row["plain"]))
        times = [spread(row[name]) for name in ("plain", "reader", "seeding")]
        memory = [f"{row[name]:.2f}" for name in ("rank_peak_gib", "peak_gib")]
        size = f"{row['source_bytes'] / 1e9:.2f}"
        compared = [f"{ratio}x" if len(row["plain"]) == 1 else ratio, spread(row["digest"])]
        cells.append([row["case"], size, str(row["processes"]), *times, *compared, *memory])
    for row in found:
        ratio = quartiles(ratios(row["seeding"], row["plain"]))[1]
        notes.append(verdict(f"Seeding to the plain copy, {row['case']}, {row['processes']} ranks", ratio, 1.1))
    if offline:
        first = found[0]
        total = [sum(run["seconds"]) for run in offline]
        parts = [quartiles([run["seconds"][i] for run in offline])[1] for i in range(3)]
        faster = quartiles(total)[1] / quartiles(first["seeding"])[1]
        notes += [
            f"The offline way, in one process: {spread(total)} s (from_pretrained {parts[0]:.1f}, dcp.save {parts[1]:.1f}, "
            f"dcp.load {parts[2]:.1f}), {offline[0]['bytes']:,} bytes written; seeding wrote {first['written']:,} (its report).",
            verdict(f"The offline way to seeding, {first['processes']} ranks", faster, 20, at_most=False),
        ]
    return [Table("seeding", columns, cells, notes, {"rows": found, "offline": offline})]


def measure(
    quick: bool = False,
    runs: int | None = None,
    kept: Path | None = None,
    layers: int | None = None,
    ranks: int | None = None,
) -> list[Table]:
    """The table ``seeding``.

    Args:
        quick: a tiny model.
        runs: of each row; five unless it says so.
        kept: folder for the first case's checkpoint, which stays there, or lies there already.
        layers: of OLMo-1B's shape; None = 16, 8 and 4.
        ranks: None = 1, 2 and 4. The offline way is left out where one number is given.
    """
    runs = runs or (1 if quick else 5)
    found, offline, folders = [], [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases(quick, layers, ranks):
            folder = folders.setdefault(case.label, Path(temporary) / case.label.replace(" ", "_"))
            if kept is not None and not found:
                folder = folders[case.label] = kept
            if not (folder / "config.json").exists():
                make_checkpoint(folder, case.config)
            plain_copy(folder)  # fills the page cache
            found.append(seed_case(case, folder, runs))
            if not (offline or ranks):
                offline = offline_runs(folder, runs)
    return tables(found, offline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, help="one size alone")
    parser.add_argument("--ranks", type=int, help="one number of ranks alone")
    parser.add_argument("--folder", type=Path, help="where the OLMo-1B checkpoint is made, or lies already; kept")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--offline-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        return rank_main(Path(args.rank_of[0]), args.rank_of[1])
    if args.offline_of:
        return offline_main(*map(Path, args.offline_of))
    (table,) = measure(runs=args.runs, kept=args.folder, layers=args.layers, ranks=args.ranks)
    print(f"torch {torch.__version__}, CPU, {psutil.cpu_count()} cores\n\n{table.markdown()}")
    if args.json:
        args.json.write_text(json.dumps(table.figures, indent=2))


if __name__ == "__main__":
    main()
