"""The log of fake tensors, by sizes that can be added up by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flame_ext.planning.memory_log import MemoryLog


def _log() -> MemoryLog:
    def part_of(tensor: Tensor, files: list[str]) -> str:
        return "here" if any(file.endswith("test_memory_log.py") for file in files) else "elsewhere"

    return MemoryLog(FakeTensorMode(allow_non_fake_inputs=True), part_of)


def test_the_peak_is_the_moment_with_most_bytes_by_part() -> None:
    log = _log()
    with log.logging():
        stays = torch.empty(10)
        large = torch.empty(100)
        view = large.view(10, 10)
        large = None
        assert log.peak().size == 440  # a view keeps its storage, and is none of its own
        view = None
        torch.empty(50)
        log.add(stays, "moments")
    assert log.peak().size == 440 and log.peak().parts == {"here": 400, "moments": 40}
    assert log.peak(lambda part: part != "here").size == 40
    assert view is None and large is None


def test_storages_that_are_resized_in_place() -> None:
    log = _log()
    with log.logging():
        gathered = torch.empty(100)
        gathered.untyped_storage().resize_(0)
        other = torch.empty(60)
        gathered.untyped_storage().resize_(400)
    assert log.peak().size == 400 + 240 and len(other) == 60


def test_a_kernel_has_its_results_alone() -> None:
    log = _log()

    def sum_of_large(values: Tensor) -> Tensor:
        return (values.expand(1000, -1) * 2.0).sum(0)

    with log.logging():
        values = torch.empty(10)
        result = log.as_kernel(sum_of_large)(values)
    assert log.peak().size == 80 and result.shape == (10,)
    with log.logging():
        sum_of_large(values)
    assert log.peak().size > 40_000


def test_numbers_of_the_host_are_real_and_those_of_fake_tensors_are_one() -> None:
    log, generator = _log(), torch.Generator().manual_seed(1)
    expected = torch.randint(5, 50, (), generator=torch.Generator().manual_seed(1)).item()
    with log.logging():
        assert int(torch.randint(5, 50, (), generator=generator)) == expected
        assert torch.tensor([3, 4]).tolist() == [3, 4]
        assert torch.empty(()).item() == 1.0 and bool(torch.empty((), dtype=torch.bool))
