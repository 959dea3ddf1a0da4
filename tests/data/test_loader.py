"""The saved position: the same global batches however often, and on however many ranks, a run is resumed."""

from __future__ import annotations

import io
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_ext.data.loader import PackedDataloader
from flame_ext.errors import CheckpointError
from tests.data.test_packing import dataset

LANES, LOCAL_BATCH = 8, 1


def saved_and_read(state: dict[str, Any]) -> dict[str, Any]:
    """Writes a state to a file and reads it with ``weights_only``, as a DCP checkpoint is read."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def loaders(ranks: int, lanes: int = LANES, **kwargs: Any) -> list[PackedDataloader]:
    return [
        PackedDataloader(dataset(ranks, rank, lanes), rank, ranks, batch_size=LOCAL_BATCH, **kwargs)
        for rank in range(ranks)
    ]


def read_steps(loaders: list[PackedDataloader], steps: int) -> list[list[list[int]]]:
    """The sequences of each global batch, sorted; a sequence is its inputs and its last label."""
    iterators = [iter(loader) for loader in loaders]
    batches = []
    for _ in range(steps):
        samples = []
        for iterator in iterators:
            for inputs, labels in islice(iterator, LANES // len(loaders) // LOCAL_BATCH):
                samples += [[*i.tolist(), last.item()] for i, last in zip(inputs["input"], labels[:, -1], strict=True)]
        batches.append(sorted(samples))
    return batches


def position(loaders: list[PackedDataloader]) -> dict[str, Any]:
    """The states of all ranks, merged and written to a file."""
    parts = [loader.state_dict() for loader in loaders]
    assert sum(map(len, parts)) == len({name for part in parts for name in part}), "each name from one rank"
    return saved_and_read({name: value for part in parts for name, value in part.items()})


def resume(loaders: list[PackedDataloader], saved: dict[str, Any]) -> None:
    for of_rank in loaders:
        of_rank.load_state_dict({name: saved[name] for name in of_rank.state_dict()})  # DCP reads what is asked for


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 3)), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_any_number_of_ranks_goes_on_with_the_unbroken_sequence(runs: list[tuple[int, int]]) -> None:
    unbroken = read_steps(loaders(1), sum(steps for _, steps in runs))
    batches, saved = [], None
    for ranks, steps in runs:
        these = loaders(ranks)
        if saved is not None:
            resume(these, saved)
        batches += read_steps(these, steps)
        saved = position(these)
    assert batches == unbroken


@pytest.mark.parametrize("options", [{"persistent_workers": True}, {"prefetch_factor": 4}, {"num_workers": 4}])
def test_what_a_worker_has_read_ahead_is_not_lost(options: dict[str, Any]) -> None:
    unbroken = read_steps(loaders(1), 5)
    options = {"num_workers": 1, **options}
    with_worker = loaders(1, **options)
    assert read_steps(with_worker, 2) == unbroken[:2]
    saved = position(with_worker)
    assert read_steps(with_worker, 1) == unbroken[2:3], "another iteration goes on"
    resumed = loaders(2, **options)
    resume(resumed, saved)
    assert read_steps(resumed, 3) == unbroken[2:]


def test_a_position_in_the_middle_of_a_step_is_not_saved() -> None:
    (alone,) = loaders(1)
    list(islice(alone, 3))
    with pytest.raises(CheckpointError, match="only be saved after whole steps; the next lane is 3"):
        alone.state_dict()
    list(islice(alone, LANES - 3))
    assert len(alone.state_dict()) == LANES


def test_a_loader_does_not_draw_from_the_default_generator() -> None:
    before = torch.get_rng_state()
    read_steps(loaders(1), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("lanes", [4, 16])
def test_another_global_batch_is_refused(lanes: int) -> None:
    (saved,), (other,) = loaders(1), loaders(1, lanes=lanes)
    saved.require_layout(saved_and_read(loaders(2)[1].layout))
    with pytest.raises(CheckpointError, match=f"of 8 lanes, this run has {lanes}: set .*global_batch_size = 8"):
        other.require_layout(saved.layout)
    assert not set(other.state_dict()) & set(saved.state_dict()), "nor is it mistaken for its own"
    with pytest.raises(CheckpointError, match="no layout of its data position"):
        other.require_layout(None)
    with pytest.raises(CheckpointError, match="8 lanes, 12 in source 0, this run has 8 lanes, 13 in source 0"):
        saved.require_layout({"lanes": 8, "in source 0": 12})
