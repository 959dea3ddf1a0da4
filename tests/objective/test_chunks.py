"""Sums over chunks that are computed again in the backward."""

from __future__ import annotations

import pytest
import torch

from flame_ext.objective.chunks import sum_over_chunks


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_a_gradient_in_bfloat16_is_that_of_all_rows(size: int) -> None:
    """A sum of 4096 parts of one sign would stop at a small part of it: from 2^8 on, adding 1 changes nothing."""
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.rand(4096, 8, generator=generator).bfloat16(), torch.ones(8, 3, dtype=torch.bfloat16)
    leaves = [states.requires_grad_(), weight.requires_grad_()]
    found = sum_over_chunks(lambda rows: (rows @ weight).float().sum(0), size, states)
    found.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    (exact[0] @ exact[1]).sum().backward()
    for tensor, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), other.grad, rtol=0.02, atol=0.0)


def test_a_chunk_is_not_smaller_than_asked_for_and_the_last_one_may_be() -> None:
    rows: list[int] = []

    def of_chunk(states: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        rows.append(len(states))
        return (states * numbers).sum()

    states, numbers = torch.ones(10, requires_grad=True), torch.arange(10)
    assert sum_over_chunks(of_chunk, 4, states, numbers) == 45
    assert rows == [4, 4, 2]
