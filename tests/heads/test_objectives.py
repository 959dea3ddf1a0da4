"""The heads of other objectives, beside the first three: one step under every layout against a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.layouts import assert_same_step, steps

HEADS = ("mtp", "token_order", "future_bag", "next_latent")
ENABLED = [*(f"--{name}.enable" for name in HEADS), "--next_latent.steps=2", "--mtp.depth=2"]
SEQUENTIAL = [*ENABLED, "--mtp.kind=sequential", "--data.document_attention"]

# Architecture and anything: job to options of its own.
JOBS: dict[str, list[str]] = {"olmo-tied+heads": ENABLED, "olmo2+heads+sequential": SEQUENTIAL}
MORE: dict[str, list[str]] = {
    "gemma2+heads": ENABLED,  # caps scores and logits, norms around 0, sliding windows
    "gpt2-learned-positions+heads+sequential": SEQUENTIAL,  # learned positions
    "qwen3-qk-norm+heads": ENABLED,
    "olmoe+heads": ENABLED,
}


def test_one_step_is_that_of_a_single_process(models: Path, single: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert {f"loss_{name}" for name in HEADS} <= single["olmo-tied+heads"]["parts"].keys()
    for rank in steps(models, tmp_path, "fsdp2", JOBS):
        for name, result in rank.items():
            assert_same_step(result, single[name])


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["fsdp2", "ddp2", "tp2", "fsdp2-tp2", "accumulated"])
def test_every_architecture_under_every_layout(models: Path, tmp_path: Path, layout: str) -> None:
    jobs = JOBS | MORE
    if "tp" in layout:  # transformers plans none of these
        jobs = {name: options for name, options in jobs.items() if not name.startswith(("gpt2", "olmoe"))}
    (expected,) = steps(models, tmp_path, "single", jobs)
    more = ["--training.local_batch_size=2"] if layout == "accumulated" else []
    for rank in steps(models, tmp_path, "single" if more else layout, jobs, *more):
        for name in jobs:
            assert_same_step(rank[name], expected[name])
