"""Predictions of the next hidden state against loops in float64: distances, gradients, documents, several steps."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flame_ext.heads import next_latent
from flame_ext.heads.next_latent import NextLatent, next_latent_loss
from flame_ext.heads.spec import HeadBatch


def naive(
    head: NextLatent, states: Tensor, embedding: Tensor, input_ids: Tensor, doc_ids: Tensor, steps: int
) -> tuple[Tensor, float]:
    """The summed distances, and the summed cosines of the first step, position by position."""
    total, cosines = states.new_zeros(()), 0.0
    for b in range(input_ids.shape[0]):
        for t in range(input_ids.shape[1]):
            state = states[b, t]
            for step in range(1, steps + 1):
                if t + step >= input_ids.shape[1] or doc_ids[b, t + step] != doc_ids[b, t]:
                    break
                both = [head.state_norm(state), head.token_norm(embedding[input_ids[b, t + step]])]
                state = state + head.down_proj(F.gelu(head.up_proj(torch.cat(both))))
                target = states[b, t + step].detach()
                apart = (state - target).abs()
                total = total + torch.where(apart < 1, apart**2 / 2, apart - 0.5).mean() / steps
                if step == 1:
                    cosines += (state @ target / state.norm() / target.norm()).item()
    return total, cosines


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 8),
    steps=st.integers(1, 4),
    tokens=st.integers(1, 20),
    chunk=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_loss_and_gradients_are_the_naive_ones(
    batch: int, length: int, steps: int, tokens: int, chunk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    head, embedding = NextLatent(6, 10), nn.Embedding(9, 6)
    for parameter in (*head.parameters(), *embedding.parameters()):
        parameter.detach().copy_(torch.randn(parameter.shape, generator=generator))
    input_ids = torch.randint(0, 9, (batch, length), generator=generator)
    doc_ids = (torch.rand(batch, length, generator=generator) < 0.3).cumsum(1)
    states = (2 * torch.randn(batch, length, 6, generator=generator)).requires_grad_()
    options = SimpleNamespace(next_latent=SimpleNamespace(steps=steps))
    given_batch = HeadBatch(states, torch.empty(0), input_ids, input_ids, doc_ids, float(tokens), options, embedding)
    with mock.patch.object(next_latent, "chunk_elements", return_value=chunk):
        found = next_latent_loss(head, given_batch)
    found["loss_next_latent"].backward()

    exact, exact_states = NextLatent(6, 10).double(), states.detach().double().requires_grad_()
    exact.load_state_dict({key: tensor.double() for key, tensor in head.state_dict().items()})
    expected, cosines = naive(exact, exact_states, embedding.weight.detach().double(), input_ids, doc_ids, steps)
    assert found["loss_next_latent"].item() == pytest.approx(expected.item() / tokens, rel=1e-5, abs=1e-6)
    assert found["next_latent_cosine"].item() == pytest.approx(cosines / tokens, rel=1e-4, abs=1e-5)
    assert embedding.weight.grad is None, "it stays the language model's"
    if expected.requires_grad:
        (expected / tokens).backward()
    for one, other in zip((states, *head.parameters()), (exact_states, *exact.parameters()), strict=True):
        gradient = torch.zeros_like(one) if other.grad is None else other.grad.float()
        torch.testing.assert_close(one.grad, gradient, rtol=1e-4, atol=1e-5)
