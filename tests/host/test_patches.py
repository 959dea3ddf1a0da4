"""What torchtitan cannot do on a CPU by itself, and what torch does wrong there."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchtitan.config import Profiling
from torchtitan.tools.profiling import maybe_enable_profiling

from flame_ext.host.patches import make_gloo_groups_with_one_thread, profiling_any_device
from tests.ranks import run_ranks


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


def groups_of_gloo() -> tuple[list[Any], list[list[float]]]:
    """In a rank: threads and timeouts of groups, and what a group that has many collectives to do at once makes of them."""
    make_gloo_groups_with_one_thread()
    make_gloo_groups_with_one_thread()  # as a second run of a process does
    cpu = torch.device("cpu")
    dist.init_process_group("gloo", timeout=timedelta(seconds=50))
    groups = [dist.group.WORLD, dist.new_group(timeout=timedelta(seconds=40))]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo,lo"  # two devices, for which torch would take four threads
    groups.append(dist.new_group(backend="gloo"))
    options = [group._get_backend(cpu).options for group in groups]
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=30), groups[2])
    own: Any = dist.ProcessGroupGloo._Options()
    own._devices, own._threads = [dist.ProcessGroupGloo.create_default_device()], 3
    store = dist.PrefixStore("own", dist.distributed_c10d._get_default_store())
    options.append(dist.ProcessGroupGloo(store, dist.get_rank(), 2, own).options)
    gather, wait = torch.ops._c10d_functional.all_gather_into_tensor, torch.ops._c10d_functional.wait_tensor
    sent = [torch.full((1,), float(dist.get_rank() + 2 * number)) for number in range(50)]
    under_way = [gather(part, 2, groups[1].group_name) for part in sent]
    found = [(len(o._devices), o._threads, o._timeout.total_seconds()) for o in options]
    return found, [wait(part).tolist() for part in under_way]


def test_groups_of_gloo_have_one_thread_and_nothing_else_changes(tmp_path: Path) -> None:
    for rank in run_ranks(groups_of_gloo, 2, folder=tmp_path):
        assert rank.exit_code == 0, rank.output
        assert rank.value[0] == [(1, 1, 50), (1, 1, 40), (2, 1, 30), (1, 3, 1800)]
        assert rank.value[1] == [[2.0 * number, 2.0 * number + 1] for number in range(50)]
