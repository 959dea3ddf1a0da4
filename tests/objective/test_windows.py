"""The doubling against a loop over positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_ext.objective.windows import reduce_following

KINDS = [(torch.add, 0.0), (torch.maximum, float("-inf"))]


def naive(values: Tensor, doc_ids: Tensor, future_k: int, combine: Callable, empty: float) -> Tensor:
    result = torch.full_like(values, empty)
    batch, length, _ = values.shape
    for b in range(batch):
        for t in range(length):
            last = length - 1 if future_k == 0 else min(length - 1, t + future_k)
            for j in range(t + 1, last + 1):
                if doc_ids[b, j] == doc_ids[b, t]:
                    result[b, t] = combine(result[b, t], values[b, j])
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Integers as values, so that sums are exact in any order; documents as numbers that never fall."""
    length = draw(st.integers(1, 12))
    future_k = draw(st.integers(0, length + 2))
    starts = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=3))
    doc_ids = torch.tensor(starts).long().cumsum(dim=1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(-50, 50, (len(starts), length, 3), generator=generator).float(), doc_ids, future_k


@pytest.mark.parametrize(("combine", "empty"), KINDS)
@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_is_its_definition(combine: Callable, empty: float, case: tuple[Tensor, Tensor, int]) -> None:
    values, doc_ids, future_k = case
    before = values.clone()
    assert torch.equal(
        reduce_following(values, doc_ids, future_k, combine, empty), naive(values, doc_ids, future_k, combine, empty)
    )
    assert torch.equal(values, before)


@pytest.mark.parametrize(("combine", "empty"), KINDS)
def test_every_window_of_one_document(combine: Callable, empty: float) -> None:
    values, doc_ids = torch.arange(34.0).view(1, 17, 2).sin().mul(64).round(), torch.zeros(1, 17, dtype=torch.long)
    for future_k in range(20):
        result = reduce_following(values, doc_ids, future_k, combine, empty)
        assert torch.equal(result, naive(values, doc_ids, future_k, combine, empty)), future_k
