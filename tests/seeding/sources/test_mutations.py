"""Random damage to headers and indices: a clean error or exactly the weights, never a crash, a hang or runaway memory."""

from __future__ import annotations

import random
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.accounting import account
from flame_ext.seeding.read import read_weights
from flame_ext.seeding.sources.open import open_source
from tests.ranks import run_ranks
from tests.sources import save_dcp
from tests.tiny_models import save_tiny

MUTATIONS = 500


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """One to four bytes changed, put in, or taken out."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        kind = rng.random()
        if kind < 0.6:
            data[at] = rng.choice(
                [rng.randrange(256), data[at] ^ (1 << rng.randrange(8)), ord(rng.choice('0129",:[]{}'))]
            )
        elif kind < 0.8:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 3)))
        else:
            del data[at : at + rng.randint(1, 3)]
    return bytes(data)


def mutate(file: Path, original: bytes, rng: random.Random) -> None:
    """Damage a JSON or pickle file anywhere, a safetensors file in its length field or header."""
    if file.suffix != ".safetensors":
        file.write_bytes(damaged(original, rng))
        return
    end = 8 + int.from_bytes(original[:8], "little")
    file.write_bytes(damaged(original[:end], rng) + original[end:])


def seed_mutated(folder: str, expected: dict[str, Tensor], rng_seed: int) -> Counter[str]:
    """In a rank of its own, with a limit on memory: what came of each mutation."""
    limit = 24 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rng, root, outcomes = random.Random(rng_seed), Path(folder), Counter()
    targets = sorted([*root.glob("*.safetensors"), *root.glob("*.index.json"), *root.glob(".metadata")])
    originals = {file: file.read_bytes() for file in targets}
    model = {key: tensor.float() for key, tensor in expected.items()}
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS):
        file = rng.choice(targets)
        mutate(file, originals[file], rng)
        state = {key: torch.full(tensor.shape, float("nan")) for key, tensor in expected.items()}
        try:
            source = open_source(root).for_model(expected.__contains__)
            account(model, {}, [], [], source, [], [])
            read_weights(source, state, {}, check_finite=True)
        except SeedError as e:
            outcomes["refused" if str(root) in str(e) else f"without the file: {e}"] += 1
        else:
            outcomes["exact" if all(torch.equal(state[k], t.float()) for k, t in expected.items()) else "wrong"] += 1
        file.write_bytes(originals[file])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) * 1024
    assert grown < 256 * 2**20, f"{grown} bytes"
    return outcomes


@pytest.mark.parametrize("layout", ["hf-safetensors", "dcp"])
def test_random_damage(tmp_path: Path, layout: str) -> None:
    folder = save_tiny("olmo-untied", tmp_path / "source", torch.bfloat16, max_shard_size="30KB")
    expected = {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}
    if layout == "dcp":
        shutil.rmtree(folder)
        save_dcp({"model": expected}, folder)
    (rank,) = run_ranks(seed_mutated, 1, str(folder), expected, 11, folder=tmp_path / "ranks", timeout=200)
    assert rank.exit_code == 0, rank.output[-3000:]
    assert set(rank.value) <= {"refused", "exact"} and rank.value.total() == MUTATIONS, rank.value
    assert rank.value["refused"] > MUTATIONS / 2
