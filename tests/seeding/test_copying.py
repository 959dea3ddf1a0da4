"""Copies by several threads: every element arrives, sums tell what is not finite, errors surface, and buffers are not reused too early."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch

from flame_ext.seeding import copying
from flame_ext.seeding.copying import Copies


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_TASK_BYTES", 256)
    monkeypatch.setattr(copying, "_CACHED_BYTES", 64)


VALUES = {
    "rows": torch.randn(64, 48, dtype=torch.bfloat16),
    "columns": torch.randn(64, 96, dtype=torch.bfloat16)[:, 5:53],
    "transposed": torch.randn(48, 64).T,
    "one row": torch.randn(1, 1000),
    "scalar": torch.tensor(3.0),
    "integers": torch.arange(2**40, 2**40 + 999),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_every_element_arrives_and_is_summed_once(dtype: torch.dtype | None) -> None:
    places = {name: torch.zeros(values.shape, dtype=dtype or values.dtype) for name, values in VALUES.items()}
    wide = torch.zeros(64, 200)
    with Copies(3) as copies:
        begun = {name: copies.start(values, places[name], summed=True) for name, values in VALUES.items()}
        unsummed = copies.start(VALUES["rows"], wide[:, 7:55], summed=False)
        copies.finish()
    for name, values in VALUES.items():
        assert torch.equal(places[name], values.to(places[name].dtype)), name
        total = sum(one.double().item() for future in begun[name] for one in future.result())
        assert total == pytest.approx(places[name].double().sum().item(), rel=0.02, abs=2), name
    assert torch.equal(wide[:, 7:55], VALUES["rows"].float()) and wide[:, :7].sum() == 0 == wide[:, 55:].sum()
    assert [future.result() for future in unsummed] == [[]] * len(unsummed)


def test_what_a_thread_raises_is_raised_and_torch_keeps_its_threads() -> None:
    def damaged() -> torch.Tensor:
        raise OSError("the disk is gone")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Copies(2) as copies:
            copies.fill(damaged, torch.zeros(4))
            for _ in range(20):  # more than may be under way: a failed one makes room
                copies.start(VALUES["rows"], torch.zeros(64, 48), summed=True)
            with pytest.raises(OSError, match="the disk is gone"):
                copies.finish()
        assert torch.get_num_threads() == 3
        found: list[int] = []
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found == [3], "a thread of later has what the process had"
    finally:
        torch.set_num_threads(before)


def test_no_more_is_under_way_than_two_blocks_a_thread() -> None:
    begun, may_end = [], threading.Event()

    def make() -> torch.Tensor:
        assert may_end.wait(10)
        return torch.ones(4)

    with Copies(2) as copies:
        beginner = threading.Thread(target=lambda: begun.extend(copies.fill(make, torch.zeros(4)) for _ in range(10)))
        beginner.start()
        beginner.join(0.2)
        assert len(copies._started) == 4 and beginner.is_alive()
        may_end.set()
        beginner.join(10)
        copies.finish()
    assert len(begun) == 10


class Log:
    """In the place of ``torch.cuda``: what is asked of streams and events, in its order; events are numbered."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.events = 0

    def Event(self) -> Any:
        number, log, self.events = self.events, self, self.events + 1

        class Event:
            def synchronize(self) -> None:
                log.calls.append(("wait", number))

            def record(self) -> None:
                log.calls.append(("record", number))

        return Event()

    def set_device(self, device: torch.device) -> None:
        self.calls.append(("device", 0))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


def test_a_pinned_buffer_is_filled_only_when_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to a device, with a CPU in its place."""
    log, pinned, empty = Log(), [], torch.empty

    def without_pins(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "get_device_module", lambda device: log)
    monkeypatch.setattr(torch, "empty", without_pins)
    lane = copying._Lane(torch.device("cpu"))
    for values in VALUES.values():
        place = torch.zeros(values.shape, dtype=torch.promote_types(values.dtype, torch.float32))
        sums = lane.copied(values, place, summed=True)
        assert torch.equal(place, values.to(place.dtype)) and len(sums) >= values.nbytes / 256
    assert pinned == [True, True], "two buffers, for all"
    assert log.calls[0] == ("device", 0)
    uses = [call for call in log.calls if call[0] != "device"]
    assert uses[::2] == [("wait", number) for _, number in uses[1::2]] and {what for what, _ in uses[1::2]} == {
        "record"
    }
    assert all(a != b for (_, a), (_, b) in pairwise(uses[1::2])), "in turns"
