"""The chunked loss and its hand-written gradient against the naive formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_ext.objective import contrastive
from flame_ext.objective.contrastive import info_nce


def naive(queries: Tensor, keys: Tensor, query_mask: Tensor, key_mask: Tensor, targets: Tensor, temperature: float):
    logits = (queries @ keys.T / temperature).masked_fill(~key_mask, float("-inf"))
    loss = F.cross_entropy(logits[query_mask], targets[query_mask], reduction="sum")
    top1 = (logits.argmax(1) == targets)[query_mask].sum()
    return loss, top1


@given(
    st.integers(1, 40),
    st.integers(0, 30),
    st.integers(1, 24),
    st.floats(0.005, 2.0),
    st.floats(0.0, 1.0),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_loss_and_gradient_are_the_naive_ones(
    n: int, extra: int, dim: int, temperature: float, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    raw = random(n, dim).requires_grad_()
    keys = F.normalize(random(n + extra, dim), dim=-1)
    targets = torch.randperm(n + extra, generator=generator)[:n]
    query_mask = torch.rand(n, generator=generator) < share
    key_mask = torch.rand(n + extra, generator=generator) < share
    key_mask[targets[query_mask]] = True
    expected, expected_top1 = naive(F.normalize(raw, dim=-1), keys, query_mask, key_mask, targets, temperature)
    (expected_grad,) = torch.autograd.grad(expected, raw)

    single = raw.detach().float().requires_grad_()
    args = (query_mask, key_mask, targets, temperature)
    chunk, contrastive._CHUNK_ELEMENTS = contrastive._CHUNK_ELEMENTS, 7 * (n + extra)
    try:
        loss, top1 = info_nce(F.normalize(single, dim=-1), keys.float(), *args)
    finally:
        contrastive._CHUNK_ELEMENTS = chunk
    (grad,) = torch.autograd.grad(loss, single)
    # A logit is a cosine over the temperature, known to 1e-7 / temperature.
    slack = 1e-6 / temperature * max(1, n)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=slack)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=slack)
    assert top1.item() == pytest.approx(expected_top1.item(), abs=0)


def test_nothing_valid_gives_zero_and_no_nan() -> None:
    queries = F.normalize(torch.randn(5, 8), dim=-1).requires_grad_()
    nothing = torch.zeros(5, dtype=torch.bool)
    loss, top1 = info_nce(queries, queries.detach(), nothing, nothing, torch.arange(5), 0.1)
    loss.backward()
    assert loss.item() == 0 and top1.item() == 0 and torch.equal(queries.grad, torch.zeros(5, 8))


def test_a_single_pair_has_no_loss() -> None:
    queries = F.normalize(torch.randn(5, 8), dim=-1).requires_grad_()
    one = torch.arange(5) == 3
    loss, top1 = info_nce(queries, F.normalize(torch.randn(5, 8), dim=-1), one, one, torch.arange(5), 0.1)
    assert loss.item() == pytest.approx(0, abs=1e-6) and top1.item() == 1


def test_keys_get_no_gradient() -> None:
    queries, keys = (F.normalize(torch.randn(4, 8), dim=-1).requires_grad_() for _ in range(2))
    every = torch.ones(4, dtype=torch.bool)
    info_nce(queries, keys, every, every, torch.arange(4), 0.1).loss_sum.backward()
    assert keys.grad is None and queries.grad is not None
