"""What a rehearsal says of memory, against the resident set of the same job on a CPU."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest

from flame_ext.planning.plan import rehearsed
from tests.benchmarks.jobs import PLAIN, Job, Shape, build, our_options, save_backbone
from tests.benchmarks.steps import DEVICE_OPTIONS, LINEAR, NO_FUTURE
from tests.planning.ready_models import save_config_of
from tests.ranks import REPOSITORY, run_ranks

WIDE = Shape(layers=4, hidden=512, intermediate=2048, heads=8, vocabulary=8192, batch=4, seq_len=512)
MANY_TOKENS = Shape(layers=2, hidden=256, intermediate=688, heads=4, vocabulary=50304, batch=4, seq_len=512)
LONG = Shape(layers=4, hidden=512, intermediate=2048, heads=8, vocabulary=4096, batch=2, seq_len=1024)
HEADS = ("--action_layer.enable", "--action_layer.top_k=4", "--future_predictor.head_type=linear")
JOBS = {
    "cross-entropy": (WIDE, tuple(PLAIN)),
    "heads, many tokens": (MANY_TOKENS, HEADS),
    "full checkpointing, accumulation": (
        LONG,
        (*PLAIN, "--activation_checkpoint.mode=full", "--training.global_batch_size=4"),
    ),
}


ON_GPU = (*DEVICE_OPTIONS, "--seed.verify=none")
H100 = Shape(layers=16, hidden=2048, intermediate=8192, heads=16, vocabulary=50304, batch=16, seq_len=2048)
ROWS = {  # of docs/results/h100-later.json
    "cross-entropy": tuple(PLAIN),
    "documents": (*PLAIN, "--data.document_attention"),
    "future": (LINEAR,),
    "future and documents": (LINEAR, "--data.document_attention"),
    "action": (LINEAR, "--action_layer.enable", "--action_layer.top_k=8"),
    "heads": (
        *NO_FUTURE,
        *(f"--{head}.enable" for head in ("mtp", "token_order", "future_bag", "next_latent")),
    ),
}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _measured(shape: Shape, backbone: str, text: str, folder: str, options: tuple[str, ...]) -> int:
    """The peak of the resident set over two steps, less what was there before the first, but with the weights."""
    threshold, trim = -3, -1  # of mallopt: the kernel has at once what is freed
    for option in (threshold, trim):
        ctypes.CDLL(None).mallopt(option, 1 << 20)
    trainer = build(Job("ours", options), shape, backbone, text, folder)
    weights = sum(parameter.nbytes for part in trainer.model_parts for parameter in part.parameters())
    before = _status("VmRSS") - weights
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    batches = trainer.batch_generator(trainer.dataloader)
    for trainer.step in (1, 2):
        trainer.train_step(batches)
    return _status("VmHWM") - before


@pytest.mark.matrix
@pytest.mark.parametrize("name", JOBS)
def test_the_peak_of_two_steps_is_that_of_the_process(name: str, tmp_path: Path) -> None:
    shape, options = JOBS[name]
    backbone = save_backbone(tmp_path / "backbone", shape)
    arguments: Any = (shape, str(backbone), "", str(tmp_path / "run"), options)
    (measured,) = (rank.value for rank in run_ranks(_measured, 1, *arguments, timeout=300, folder=tmp_path / "ranks"))
    found = rehearsed([*our_options(str(backbone), shape, str(tmp_path)), "--seed.verify=none", *options], on_gpu=False)
    print(f"{name}: rehearsed {found.peak / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert found.peak == pytest.approx(measured, rel=0.15)


def _peaks(found: Any) -> dict[str, float]:
    """The row of each job in GiB, wherever it is in the results."""
    if isinstance(found, list):
        return {row: peak for item in found for row, peak in _peaks(item).items()}
    if not isinstance(found, dict):
        return {}
    if "row" in found and found.get("peak_gib"):
        return {found["row"]: found["peak_gib"]}
    return _peaks(list(found.values()))


@pytest.mark.matrix
@pytest.mark.parametrize("row", ROWS)
def test_the_peak_is_a_little_above_what_an_h100_had(row: str, tmp_path: Path) -> None:
    measured = _peaks(json.loads((REPOSITORY / "docs" / "results" / "h100-later.json").read_text()))[row]
    folder = save_config_of(H100.config(), tmp_path / "backbone")
    found = rehearsed([*our_options(str(folder), H100, str(tmp_path)), *ON_GPU, *ROWS[row]])
    assert 1.0 <= found.peak / 2**30 / measured < 1.1
