"""Damages every kind of file that a run or a command reads, and looks at what comes of it.

``python -m tests.faults.fuzzing N [SEED]`` (``make fuzz N=100000``) makes N mutations, the same ones for one seed, and ends with exit
code 1 and a line for each finding: an exception that is no UserError, more than 10 s or 1 GiB, or a file outside the folder opened.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import torch
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from flame_ext.checkpoint.card import card_of_step
from flame_ext.checkpoint.steps import complete_step, describe_files, find_steps, start, written_files
from flame_ext.errors import UserError
from flame_ext.hf_config import load_hf_config
from flame_ext.preflight.parse import parse
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.safe_files import require_contained
from flame_ext.seeding.sources.source import read_tensor
from flame_ext.tools.conversion import Conversion, convert
from flame_ext.tools.describe import describe
from flame_ext.tools.inspect import as_json
from tests.ranks import DEBUG_TOML
from tests.sources import save_dcp
from tests.tiny_models import save_tiny

MAX_SECONDS, MAX_BYTES = 10, 2**30

# What stands where something else is expected.
VALUES: list[Any] = [
    None, True, 0, -1, 3, 2**31, 2**63, 10**9, 10**30, 1e308, float("nan"), "", "x", "float99", "../x", "/etc/passwd", "\0", "\ud800",
    "é" * 300, [], [1], [None], ["a"], [[]], {}, {"a": 1}, {"content": 3}, [{}], {"factor": "x"}, {"x": {"y": []}},
]  # fmt: skip


# Fields that a configuration may have, and this one has not.
FIELDS = [
    "auto_map", "bos_token_id", "compression_config", "configuration_files", "dtype", "head_dim", "id2label", "label2id", "layer_types",
    "num_labels", "problem_type", "quantization_config", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "text_config",
    "tie_word_embeddings", "torch_dtype", "added_tokens_decoder", "add_bos_token", "extra_special_tokens", "chat_template",
    "tokenizer_class", "model_max_length", "max_length", "num_beams", "config", "world_size", "model_only", "heads",
]  # fmt: skip


@dataclass
class Input:
    """A kind of file, and what reads it."""

    file: Path
    read: Callable[[], object]
    is_text: bool = True
    original: bytes = b""

    def __post_init__(self) -> None:
        self.original = self.file.read_bytes()


@dataclass
class Findings:
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    """One to four bytes changed, put in, taken out, or a part repeated or cut off."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(data) + 1), rng.random()
        if kind < 0.4 and at < len(data):
            data[at] = rng.choice(
                [rng.randrange(256), data[at] ^ 1 << rng.randrange(8), ord(rng.choice('0129",:[]{}'))]
            )
        elif kind < 0.6:
            data[at:at] = rng.randbytes(rng.randint(1, 3))
        elif kind < 0.8:
            del data[at : at + rng.randint(1, 3)]
        elif kind < 0.95:
            data[at:at] = data[at : at + rng.randint(1, 60)] * rng.choice([1, 2, 500])
        else:
            del data[at:]
    return bytes(data)


def damaged_json(value: Any, rng: random.Random) -> Any:
    """One value, at any depth, is another one, is absent, or has another name."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    if isinstance(value, list):
        copy: Any = list(value)
        at: Any = rng.randrange(len(copy))
    else:
        copy, at = dict(value), rng.choice(list(value))
    kind = rng.random()
    if kind < 0.1:
        del copy[at]
    elif kind < 0.2 and isinstance(copy, dict):
        copy[rng.choice(["", "x", "../x", str(at) + "x", "\ud800", "\n"])] = copy.pop(at)
    else:
        copy[at] = damaged_json(copy[at], rng)
    return copy


def mutated(source: Input, rng: random.Random) -> bytes:
    """As often in the grammar of the file as in its bytes."""
    raw = source.original
    if source.file.suffix == ".safetensors":
        end = 8 + int.from_bytes(raw[:8], "little")
        if rng.random() < 0.5:
            return damaged_bytes(raw[:end], rng) + raw[end:]
        header = json.dumps(damaged_json(json.loads(raw[8:end]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + raw[end:]
    if source.file.suffix == ".json" and rng.random() < 0.6:
        value = json.loads(raw)
        if rng.random() < 0.2:
            value[rng.choice(FIELDS)] = rng.choice(VALUES)
        for _ in range(rng.randint(1, 2)):
            value = damaged_json(value, rng)
        return json.dumps(value).encode()
    if source.file.suffix == ".toml" and rng.random() < 0.6:
        lines = raw.decode().splitlines()
        at = rng.choice([i for i, line in enumerate(lines) if "=" in line and not line.startswith("#")])
        replacement = rng.choice(
            ["-1", "0", "1e400", "nan", '""', '"x"', "[]", "[1]", "{}", "true", "10000000000", '"../x"', "'\\u0000'"]
        )
        lines[at] = f"{lines[at].split('=')[0]}= {replacement}"
        return "\n".join(lines).encode()
    if source.file.name == ".metadata" and rng.random() < 0.7:
        return damaged_metadata(raw, rng)
    return damaged_bytes(raw, rng)


def damaged_metadata(raw: bytes, rng: random.Random) -> bytes:
    """One field of one object is another value, or an operation on a class stands before all."""
    metadata = pickle.loads(raw)
    if rng.random() < 0.2:
        trick = pickle.dumps(
            rng.choice([torch.Size, MetadataIndex, torch.float32, PurePosixPath, Metadata]), protocol=2
        )[:-1]
        state = pickle.dumps((None, {"canary": 1}), protocol=2)[2:-1]
        operation = rng.choice([pickle.BUILD, pickle.REDUCE, pickle.NEWOBJ, pickle.APPEND, pickle.SETITEM, pickle.OBJ])
        return trick + state + operation + pickle.POP + pickle.dumps(metadata, protocol=2)[2:]
    tensors = list(metadata.state_dict_metadata.values())
    places = list(metadata.storage_data.items())
    chosen = rng.choice([metadata, rng.choice(tensors), rng.choice(rng.choice(tensors).chunks), *rng.choice(places)])
    value = rng.choice(
        [
            *VALUES,
            torch.Size([2**62, 2**62]),
            torch.Size([1] * 20),
            MetadataIndex,
            PurePosixPath("/x"),
            chosen,
            torch.int8,
        ]
    )
    object.__setattr__(chosen, rng.choice([*vars(chosen), "other"]), value)
    try:
        return pickle.dumps(metadata)
    except Exception:  # a value that cannot stand there
        return damaged_bytes(raw, rng)


def inputs(root: Path) -> dict[str, Input]:
    """The ten kinds, each in a folder of its own under ``root``."""
    model = save_tiny("olmo2", root / "model", torch.bfloat16)
    generation = {"eos_token_id": 1, "do_sample": True, "temperature": 0.5, "transformers_version": "5.0.0"}
    (model / "generation_config.json").write_text(json.dumps(generation))
    sharded = save_tiny("olmo2", root / "sharded", torch.bfloat16, max_shard_size="30KB")
    dcp = save_dcp({"model": load_file(model / "model.safetensors")}, root / "dcp")
    step = root / "run" / "checkpoint" / "step-2"
    save_dcp({**load_file(model / "model.safetensors"), "train_state": {"step": 2}}, start(step))
    seed = {"source": "hf://org/model", "revision": None, "source_digest": "0" * 64, "weights_digest": "1" * 64}
    facts = {"world_size": 1, "run": "a-run", "seed": seed, "heads": None, "config": {"optimizer.lr": 0.1}}
    facts |= {"parallelism": {"tp": 1}, "versions": {"torch": "2"}, "data": {"lanes": 1}, "finished": False}
    complete_step(step, 2, facts, describe_files(step.with_name(".incomplete-step-2"), written_files(step)))
    metrics = root / "run" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": n, "loss": 1.5, "tokens_seen": 64}) + "\n" for n in range(1, 4)))
    toml = root / "run" / "job.toml"
    toml.write_text(Path(DEBUG_TOML).read_text())
    out = root / "out"

    def read_source(folder: Path) -> Callable[[], object]:
        def read() -> object:
            source = open_source(folder)
            return [read_tensor(source, name) for name in list(source.entries)[:3]]

        return read

    def inspected(folder: Path) -> Callable[[], object]:
        return lambda: json.dumps(as_json(describe(str(folder))))

    def config() -> object:
        require_contained(model)
        return load_hf_config(str(model)).to_json_string()

    def exported() -> object:
        shutil.rmtree(out, ignore_errors=True)
        return convert(str(model), out, "hf", Conversion())

    def manifest() -> object:
        find_steps(step.parent)
        return describe(str(root / "run"))

    return {
        "config": Input(model / "config.json", config),
        "config, inspected": Input(model / "config.json", inspected(model)),
        "config, converted": Input(model / "config.json", exported),
        "generation config": Input(model / "generation_config.json", exported),
        "tokenizer": Input(model / "tokenizer.json", lambda: tokenized(model)),
        "tokenizer config": Input(model / "tokenizer_config.json", lambda: tokenized(model)),
        "index": Input(sharded / "model.safetensors.index.json", read_source(sharded)),
        "header": Input(model / "model.safetensors", read_source(model)),
        "header, inspected": Input(model / "model.safetensors", inspected(model)),
        ".metadata": Input(dcp / ".metadata", read_source(dcp)),
        ".metadata, inspected": Input(dcp / ".metadata", inspected(dcp)),
        "manifest": Input(step / "manifest.json", manifest),
        "card": Input(step / "manifest.json", lambda: str(card_of_step(step)).encode()),
        "card, metrics": Input(metrics, lambda: str(card_of_step(step)).encode()),
        "TOML": Input(toml, lambda: parse([f"--job.config_file={toml}"])),
    }


def tokenized(model: Path) -> object:
    """As a run builds its tokenizer and looks at it before training."""
    from torchtitan.config import JobConfig

    from flame_ext.data.tokenizer import build_tokenizer, require_of_model

    require_contained(model)
    config: Any = JobConfig()
    config.model.hf_assets_path, config.seed = str(model), type("Seed", (), {"trust_remote_code": False})
    tokenizer = build_tokenizer(config)
    require_of_model(tokenizer, load_hf_config(str(model)), str(model))
    return tokenizer.encode("A short text.")


_watched: list[tuple[Path, set[str]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes every file that is opened outside the folder, but for those of Python and its packages."""
    if event == "open" and _watched and isinstance(arguments[0], (str, bytes)):
        root, opened = _watched[-1]
        path = os.path.realpath(os.fsdecode(arguments[0]).replace("\0", ""))
        own = (
            str(root),
            sys.prefix,
            sys.base_prefix,
            str(Path(__file__).parents[2]),
            HF_HOME,
            "/proc",
            "/sys",
            "/dev",
            "/usr",
            "/etc/mime",
        )
        if not path.startswith(own):
            opened.add(path)


@cache
def _watch() -> None:
    sys.addaudithook(_audit)  # for as long as the process lives


@contextmanager
def opened_outside(root: Path) -> Iterator[set[str]]:
    """Yields the set of files outside ``root`` that the body opens."""
    _watched.append((root, set()))
    try:
        yield _watched[-1][1]
    finally:
        _watched.pop()


def fuzz(root: Path, mutations: int, seed: int, kinds: list[str] | None = None) -> Findings:
    """Makes ``mutations`` of the files under ``root``, one file at a time, each of which is whole again afterwards."""
    rng, findings, sources = random.Random(seed), Findings(), inputs(root)
    _watch()
    for number in range(mutations):
        name = rng.choice(kinds or list(sources))
        source = sources[name]
        data = mutated(source, random.Random(f"{seed}.{number}"))
        source.file.write_bytes(data)
        begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        problem, said = "", StringIO()
        with opened_outside(root) as outside, redirect_stdout(said), redirect_stderr(said):
            try:
                source.read()
                findings.outcomes[f"{name}: read"] += 1
            except UserError as e:
                findings.outcomes[f"{name}: refused"] += 1
                problem = "" if str(e).strip() else "an empty message"
            except BaseException as e:  # a panic of Rust is a BaseException
                if isinstance(e, KeyboardInterrupt):
                    raise
                where = traceback.extract_tb(e.__traceback__)[-1]
                problem = f"{type(e).__name__}: {str(e)[:200]} ({Path(where.filename).name}:{where.lineno})"
        source.file.write_bytes(source.original)
        seconds = time.process_time() - begin
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if outside:
            problem = f"opens {min(outside)}"
        elif seconds > MAX_SECONDS or grown > MAX_BYTES:
            problem = f"takes {seconds:.1f} s and {grown / 2**20:.0f} MiB"
        if problem:
            findings.problems.append(f"{name}, mutation {number} of seed {seed}: {problem}")
            if keep := os.environ.get("FUZZ_KEEP"):
                Path(keep).mkdir(exist_ok=True)
                (Path(keep) / f"{number}-{source.file.name}").write_bytes(data)
    return findings


def main(arguments: list[str]) -> int:
    """Runs the command."""
    mutations, seed = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 0
    kinds = arguments[2:] or None
    import logging

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        findings = fuzz(Path(folder), mutations, seed, kinds)
    for line, count in sorted(findings.outcomes.items()):
        print(f"{count:8,} {line}")
    for line in findings.problems:
        print(f"FOUND {line}")
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
