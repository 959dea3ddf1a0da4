"""What a rehearsal says of memory, against the resident set of the same job on a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from flame_ext.planning.plan import rehearsed
from tests.benchmarks.jobs import PLAIN, Job, Shape, build, our_options, save_backbone
from tests.ranks import run_ranks

WIDE = Shape(layers=4, hidden=512, intermediate=2048, heads=8, vocabulary=8192, batch=4, seq_len=512)
MANY_TOKENS = Shape(layers=2, hidden=256, intermediate=688, heads=4, vocabulary=50304, batch=4, seq_len=512)
LONG = Shape(layers=4, hidden=256, intermediate=1024, heads=4, vocabulary=1024, batch=2, seq_len=1024)
HEADS = ("--action_layer.enable", "--action_layer.top_k=4", "--future_predictor.head_type=linear")
JOBS = {
    "cross-entropy": (WIDE, tuple(PLAIN)),
    "heads, many tokens": (MANY_TOKENS, HEADS),
    "full checkpointing, accumulation": (
        LONG,
        (*PLAIN, "--activation_checkpoint.mode=full", "--training.global_batch_size=4"),
    ),
}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _measured(shape: Shape, backbone: str, text: str, folder: str, options: tuple[str, ...]) -> int:
    """The peak of the resident set over two steps, less what was there before the trainer was built."""
    import flame_ext.train  # noqa: F401

    threshold, trim = -3, -1  # of mallopt: the kernel has at once what is freed
    for option in (threshold, trim):
        ctypes.CDLL(None).mallopt(option, 1 << 20)
    before = _status("VmRSS")
    trainer = build(Job("ours", options), shape, backbone, text, folder)
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
    print(name, found.peak / 2**20, measured / 2**20)
    assert found.peak == pytest.approx(measured, rel=0.15)
