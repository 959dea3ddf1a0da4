"""What torchtitan cannot do on a CPU by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchtitan.config import Profiling
from torchtitan.tools.profiling import maybe_enable_profiling

from flame_ext.host.patches import profiling_any_device


def test_a_profile_is_written_without_an_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    profile, options = torch.profiler.profile, Profiling(enable_profiling=True, profile_freq=4)
    with profiling_any_device(), maybe_enable_profiling(options, base_folder=str(tmp_path)) as profiler:
        for _ in range(4):
            torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step()
    (trace,) = tmp_path.rglob("rank0_trace.json")
    assert any(event.get("name") == "aten::mm" for event in json.loads(trace.read_text())["traceEvents"])
    assert torch.profiler.profile is profile
