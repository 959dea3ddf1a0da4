"""The bag of the tokens to come against loops in float64: the loss, its gradient, and where it begins."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_ext.heads import upcoming
from flame_ext.heads.future_bag import FutureBag
from flame_ext.objective.windows import upcoming_tokens


def naive(scores: Tensor, input_ids: Tensor, doc_ids: Tensor, window: int) -> tuple[Tensor, float]:
    """The summed binary cross-entropies, token by token, and the sum of the mean probabilities of the bags' tokens."""
    batch, length, vocab_size = scores.shape
    total, recall = scores.new_zeros(()), 0.0
    for b in range(batch):
        for t in range(length):
            places = [at for at in range(t + 1, min(length, t + window + 1)) if doc_ids[b, at] == doc_ids[b, t]]
            bag = {int(input_ids[b, at]) for at in places}
            for token in range(vocab_size) if bag else ():
                probability = scores[b, t, token].sigmoid()
                total = total - (probability if token in bag else 1 - probability).log()
                recall += probability.item() / len(bag) if token in bag else 0.0
    return total, recall


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 9),
    vocab_size=st.integers(2, 9),
    window=st.integers(1, 10),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_loss_and_gradients_are_the_naive_ones(
    batch: int, length: int, vocab_size: int, window: int, chunk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab_size, (batch, length), generator=generator)
    doc_ids = (torch.rand(batch, length, generator=generator) < 0.3).cumsum(1)
    head = FutureBag(6, vocab_size, window)
    for parameter in head.parameters():
        parameter.detach().copy_(torch.randn(parameter.shape, generator=generator))
    states = torch.randn(batch, length, 6, generator=generator).requires_grad_()
    with mock.patch.object(upcoming, "chunk_elements", return_value=chunk):
        loss, recall = head(states, upcoming_tokens(input_ids, doc_ids, window)).unbind()
    loss.backward()

    exact = [tensor.detach().double().requires_grad_() for tensor in (states, *head.parameters())]
    expected, expected_recall = naive(exact[0] @ exact[1].T + exact[2], input_ids, doc_ids, window)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert recall.item() == pytest.approx(expected_recall, rel=1e-5)
    if expected.requires_grad:
        expected.backward()
    for found, one in zip((states, *head.parameters()), exact, strict=True):
        gradient = torch.zeros_like(found) if one.grad is None else one.grad.float()
        torch.testing.assert_close(found.grad, gradient, rtol=1e-4, atol=1e-5)


def test_every_token_begins_as_likely_as_a_window_makes_it() -> None:
    head = FutureBag(8, 100, window=4)
    assert head.parameter_inits()["proj.bias"].value == pytest.approx(math.log(0.03 / 0.97))
