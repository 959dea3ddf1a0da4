"""Objects travel by a group of their own, whose ranks may wait for one another far longer than in a step."""

from __future__ import annotations

import ast
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import flame_ext
from tests.ranks import run_ranks

TAKING_GROUPS = ("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "barrier")


def work_on_the_main_rank() -> list[object]:
    """In a rank: what comes of collectives for which the main rank is later than a collective of a step may be."""
    from flame_ext.checkpoint.gathering import BoxGatherer
    from flame_ext.distributed import (
        from_main_rank,
        gathered,
        is_main_rank,
        make_groups,
        object_group,
        on_main_rank,
    )
    from flame_ext.seeding.proof.parity import Probe, verify

    dist.init_process_group("gloo")
    make_groups(timedelta(seconds=60))
    state = {"weight": torch.ones(2)}
    late = timedelta(milliseconds=200)
    dist.distributed_c10d._set_pg_timeout(late, None)  # as torchtitan does after the first step

    def wait() -> None:
        time.sleep(2 * late.total_seconds() if is_main_rank() else 0)

    on_main_rank(wait)
    wait()
    found = [from_main_rank(dist.get_rank())]
    wait()
    found.append(gathered(dist.get_rank()))
    wait()
    BoxGatherer(state, {"weight": (2,)}, torch.device("cpu"))

    def reference_logits(probe: Probe) -> torch.Tensor:
        wait()
        return probe.forward(probe.tokens)

    zeros, cpu = (lambda tokens: torch.zeros(*tokens.shape, 8)), torch.device("cpu")
    probe = Probe(
        torch.ones(1, 4, dtype=torch.int64), zeros, nullcontext, torch.float32, torch.float32, cpu, vocab_size=8
    )
    found.append(verify("parity", probe, reference_logits, Path("source")).max_abs_diff)
    group = object_group()
    found.append(group._get_backend(torch.device("cpu")).options._timeout)
    dist.destroy_process_group()
    return found


def test_ranks_wait_for_the_main_rank_beyond_the_timeout_of_a_step(tmp_path: Path) -> None:
    for rank in run_ranks(work_on_the_main_rank, 2, folder=tmp_path):
        assert rank.exit_code == 0, rank.output[-3000:]
        assert rank.value == [0, [0, 1], 0.0, timedelta(days=1)]


def test_every_collective_of_objects_names_its_group_or_is_none() -> None:
    calls = [
        (file.name, call)
        for file in Path(flame_ext.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
    ]
    objects = [(file, call) for file, call in calls if call.func.value.id == "dist" and call.func.attr in TAKING_GROUPS]
    objects += [
        (file, call) for file, call in calls if call.func.value.id == "dcp" and call.func.attr in ("load", "save")
    ]
    assert len(objects) >= 6
    without = [
        file for file, call in objects if not {"group", "process_group", "no_dist"} & {key.arg for key in call.keywords}
    ]
    assert not without
