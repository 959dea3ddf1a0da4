"""Token order prediction against loops in float64: the target, the loss, its gradient, and chunks of any size."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_ext.heads import upcoming
from flame_ext.heads.token_order import TokenOrder
from flame_ext.objective.windows import upcoming_tokens


def naive(scores: Tensor, input_ids: Tensor, doc_ids: Tensor, window: int) -> tuple[Tensor, int]:
    """The summed loss, position by position over the whole vocabulary, and the next tokens with the highest score."""
    batch, length, vocab_size = scores.shape
    total, hits = scores.new_zeros(()), 0
    for b in range(batch):
        for t in range(length):
            target = torch.full((vocab_size,), -math.inf, dtype=torch.float64)
            for distance in range(window, 0, -1):  # the nearest occurrence is written last
                at = t + distance
                if at < length and doc_ids[b, at] == doc_ids[b, t]:
                    target[input_ids[b, at]] = window - distance
            if torch.isinf(target).all():
                continue
            shares = target.softmax(0)
            total = total - (shares * scores[b, t].log_softmax(0)).sum()
            hits += int(scores[b, t].argmax() == input_ids[b, t + 1])
    return total, hits


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 12),
    vocab_size=st.integers(2, 9),
    window=st.integers(1, 14),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_loss_and_gradients_are_the_naive_ones(
    batch: int, length: int, vocab_size: int, window: int, chunk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab_size, (batch, length), generator=generator)
    doc_ids = (torch.rand(batch, length, generator=generator) < 0.3).cumsum(1)
    head = TokenOrder(6, vocab_size)
    with torch.no_grad():
        head.proj.weight.copy_(torch.randn(vocab_size, 6, generator=generator))
    states = torch.randn(batch, length, 6, generator=generator).requires_grad_()
    with mock.patch.object(upcoming, "chunk_elements", return_value=chunk):
        loss, hits = head(states, upcoming_tokens(input_ids, doc_ids, window)).unbind()
    loss.backward()

    exact_states, exact_weight = states.detach().double().requires_grad_(), head.proj.weight.detach().double()
    exact_weight.requires_grad_()
    expected, expected_hits = naive(exact_states @ exact_weight.T, input_ids, doc_ids, window)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert hits == expected_hits
    if expected.requires_grad:
        expected.backward()
    for found, exact in ((states.grad, exact_states.grad), (head.proj.weight.grad, exact_weight.grad)):
        exact = torch.zeros_like(found) if exact is None else exact.float()
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_what_is_further_than_64_positions_weighs_nothing() -> None:
    length, generator = 100, torch.Generator().manual_seed(0)
    input_ids = torch.zeros(1, length, dtype=torch.int64)  # as far away as the second distinct token can be
    input_ids[0, 70] = 1
    scores = torch.randn(1, length, 3, generator=generator).double()
    near, _ = naive(scores, input_ids, torch.zeros_like(input_ids), 64)
    far, _ = naive(scores, input_ids, torch.zeros_like(input_ids), 99)
    assert near.item() == pytest.approx(far.item(), rel=1e-15)


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    """In the forward and in the backward, which computes them again."""
    head, states = TokenOrder(4, 50), torch.randn(1, 64, 4, requires_grad=True)
    shapes: list[int] = []
    head.proj.register_forward_hook(lambda _module, _args, scores: shapes.append(scores.shape[0]))
    with mock.patch.object(upcoming, "chunk_elements", return_value=50 * 8):
        loss = head(states, upcoming_tokens(torch.arange(64)[None] % 50, torch.zeros(1, 64).long(), 4))
        assert shapes == [8] * 8
        loss[0].backward()
    assert shapes == [8] * 16
