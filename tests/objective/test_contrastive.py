"""The tiled loss, its hand-written gradients and its statistics against the naive formula in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_ext.objective import contrastive
from flame_ext.objective.contrastive import ContrastiveOutput, info_nce


class Batch(NamedTuple):
    queries: Tensor
    keys: Tensor
    query_mask: Tensor
    key_mask: Tensor
    targets: Tensor


def random_batch(n: int, m: int, dim: int, share: float, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Unit vectors, every query with a key of its own; some queries near their keys, so that some are found."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randperm(m, generator=generator)[:n]
    keys = torch.randn(m, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    queries = keys[targets] * torch.rand(n, 1, generator=generator, dtype=torch.float64) + noise
    query_mask = torch.rand(n, generator=generator) < share
    key_mask = torch.rand(m, generator=generator) < share
    key_mask[targets[query_mask]] = True
    unit = (F.normalize(vectors, dim=-1).to(dtype) for vectors in (queries, keys))
    return Batch(*unit, query_mask, key_mask, targets)


def naive(batch: Batch, temperature: float) -> ContrastiveOutput:
    """The definition, with all pairs in memory, in the dtype of the batch."""
    queries, keys, query_mask, key_mask, targets = batch
    cosines = queries @ keys.T
    logits = (cosines / temperature).masked_fill(~key_mask, float("-inf"))
    loss = F.cross_entropy(logits[query_mask], targets[query_mask], reduction="sum")
    hits = (logits.argmax(1) == targets)[query_mask].sum()
    pairs, candidates = int(query_mask.sum()), int(key_mask.sum())
    positive = negative = 0.0
    for n in query_mask.nonzero().flatten().tolist():
        others = key_mask.clone()
        others[targets[n]] = False
        positive += cosines[n, targets[n]].item()
        negative += cosines[n, others].mean().item() if others.any() else 0.0
    information = pairs * math.log(max(1, candidates)) - loss.item()
    numbers = (hits.item(), positive, negative, pairs * candidates, information)
    return ContrastiveOutput(loss, *(torch.tensor(number, dtype=torch.float64) for number in numbers))


def gradients(loss: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (batch.queries, batch.keys))


def with_gradients(batch: Batch, dtype: torch.dtype) -> Batch:
    """Leaves of another dtype."""
    queries, keys = (vectors.detach().to(dtype).requires_grad_() for vectors in (batch.queries, batch.keys))
    return batch._replace(queries=queries, keys=keys)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of queries and of keys, the last ones not full."""
    monkeypatch.setattr(contrastive, "_tile", lambda _device: (5, 7))


@given(
    st.integers(1, 40),
    st.integers(0, 30),
    st.integers(1, 24),
    st.floats(0.005, 2.0),
    st.floats(0.0, 1.0),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_sums_and_gradients_are_the_naive_ones(
    n: int, extra: int, dim: int, temperature: float, share: float, seed: int
) -> None:
    # What both formulas are given is the same to the last bit: float32 vectors.
    batch = random_batch(n, n + extra, dim, share, seed, torch.float32)
    reference, single = with_gradients(batch, torch.float64), with_gradients(batch, torch.float32)
    expected = naive(reference, temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "_tile", lambda _device: (5, 7))
        result = info_nce(*single, temperature)
    # A cosine of up to 24 float32 products is known to a few 1e-7, a logit to that over the temperature; the loss is the
    # sum of a difference of two of them for each query. A cosine itself is averaged over, not divided.
    slack = 1e-6 / temperature
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-5, abs=slack * n)
    assert result.information_sum.item() == pytest.approx(expected.information_sum.item(), rel=1e-5, abs=slack * n)
    assert result.positive_cosine_sum.item() == pytest.approx(expected.positive_cosine_sum.item(), abs=1e-6 * n)
    assert result.negative_cosine_sum.item() == pytest.approx(expected.negative_cosine_sum.item(), abs=2e-6 * n)
    assert result.keys_sum.item() == expected.keys_sum.item()
    if dim > 1:  # in one dimension all cosines are 1 or -1, and which is the nearest of the equal ones means nothing
        assert result.top1_sum.item() == expected.top1_sum.item()
    # A softmax weight is off by the error of its logit, times a key of length one over the temperature.
    query_grad, key_grad = gradients(result.loss_sum, single)
    expected_query_grad, expected_key_grad = gradients(expected.loss_sum, reference)
    torch.testing.assert_close(query_grad.double(), expected_query_grad, rtol=1e-4, atol=slack / temperature)
    torch.testing.assert_close(key_grad.double(), expected_key_grad, rtol=1e-4, atol=slack / temperature * n**0.5)


@pytest.mark.usefixtures("small_tiles")
def test_the_gradient_follows_the_upstream_gradient() -> None:
    batch = with_gradients(random_batch(12, 20, 8, 0.8, 0), torch.float32)
    once = gradients(info_nce(*batch, 0.1).loss_sum, batch)
    scaled = gradients(info_nce(*batch, 0.1).loss_sum * -2.5, batch)
    for one, other in zip(once, scaled, strict=True):
        assert one.abs().max() > 0.01
        torch.testing.assert_close(one * -2.5, other)


@pytest.mark.usefixtures("small_tiles")
def test_a_low_temperature_is_finite_and_exact() -> None:
    batch = random_batch(30, 50, 16, 0.9, 1, torch.float32)
    reference, single = with_gradients(batch, torch.float64), with_gradients(batch, torch.float32)
    expected, result = naive(reference, 0.005), info_nce(*single, 0.005)
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    for actual, wanted in zip(gradients(result.loss_sum, single), gradients(expected.loss_sum, reference), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-6 / 0.005**2)


def test_nothing_valid_gives_zero_and_no_nan() -> None:
    queries, keys = (F.normalize(torch.randn(5, 8), dim=-1).requires_grad_() for _ in range(2))
    nothing = torch.zeros(5, dtype=torch.bool)
    result = info_nce(queries, keys, nothing, nothing, torch.arange(5), 0.1)
    result.loss_sum.backward()
    assert [value.item() for value in result] == [0.0] * 6
    assert torch.equal(queries.grad, torch.zeros(5, 8)) and torch.equal(keys.grad, torch.zeros(5, 8))


def test_a_single_pair_has_no_loss() -> None:
    queries, keys = (F.normalize(torch.randn(5, 8), dim=-1).requires_grad_() for _ in range(2))
    one = torch.arange(5) == 3
    result = info_nce(queries, keys, one, one, torch.arange(5), 0.1)
    assert result.loss_sum.item() == pytest.approx(0, abs=1e-6) and result.top1_sum.item() == 1
    assert result.positive_cosine_sum.item() == pytest.approx((queries[3] @ keys[3]).item(), abs=1e-6)
    assert result.negative_cosine_sum.item() == pytest.approx(0, abs=1e-6)
    assert result.keys_sum.item() == 1 and result.information_sum.item() == pytest.approx(0, abs=1e-6)
    for grad in torch.autograd.grad(result.loss_sum, (queries, keys)):
        torch.testing.assert_close(grad, torch.zeros(5, 8), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_identical_keys_are_chance_and_not_hits() -> None:
    """A batch of one sequence, repeated: nobody can be found."""
    # Of length one, and with products that are exact: cosines with equal keys are equal in whatever order they are summed.
    keys = torch.full((20, 4), 0.5).requires_grad_()
    signs = torch.randint(2, (20, 4), generator=torch.Generator().manual_seed(0))
    queries = (signs - 0.5).requires_grad_()
    every = torch.ones(20, dtype=torch.bool)
    result = info_nce(queries, keys, every, every, torch.arange(20), 0.1)
    assert result.loss_sum.item() == pytest.approx(20 * math.log(20), rel=1e-6)
    assert result.information_sum.item() == pytest.approx(0, abs=1e-4)
    assert result.top1_sum.item() == 0
    for grad in torch.autograd.grad(result.loss_sum, (queries, keys)):
        assert torch.isfinite(grad).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [0.02, 0.1])
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_loses_less_than_the_naive_formula(temperature: float, query_dtype: torch.dtype) -> None:
    batch = random_batch(60, 90, 32, 0.9, 2, torch.bfloat16)
    reference, naive_batch, tiled = (
        with_gradients(batch, dtype) for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)
    )
    tiled = tiled._replace(queries=tiled.queries.detach().to(query_dtype).requires_grad_())
    expected, rough = naive(reference, temperature), naive(naive_batch, temperature)
    result = info_nce(*tiled, temperature)
    loss = expected.loss_sum.item()
    error = abs(result.loss_sum.item() - loss)
    assert error <= abs(rough.loss_sum.item() - loss)
    # On a CPU products are in float32.
    assert error <= 1e-5 * loss
    for exact, coarse, actual, vectors in zip(
        gradients(expected.loss_sum, reference),
        gradients(rough.loss_sum, naive_batch),
        gradients(result.loss_sum, tiled),
        (tiled.queries, tiled.keys),
        strict=True,
    ):
        assert actual.dtype == vectors.dtype
        assert (actual.double() - exact).norm() <= (coarse.double() - exact).norm()


@pytest.mark.usefixtures("small_tiles")
def test_compiled_arithmetic_gives_the_same() -> None:
    batch = random_batch(12, 20, 8, 0.8, 3)
    eager, compiled = (with_gradients(batch, torch.float32) for _ in range(2))
    expected = info_nce(*eager, 0.1)
    result = info_nce(*compiled, 0.1, compile_backend="aot_eager")
    for actual, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    for actual, wanted in zip(gradients(result.loss_sum, compiled), gradients(expected.loss_sum, eager), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_only_what_wants_a_gradient_gets_one() -> None:
    queries, keys = (F.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    every = torch.ones(4, dtype=torch.bool)
    for query_grad, key_grad in ((True, False), (False, True)):
        asking = (queries.clone().requires_grad_(query_grad), keys.clone().requires_grad_(key_grad))
        result = info_nce(*asking, every, every, torch.arange(4), 0.1)
        result.loss_sum.backward()
        assert [vectors.grad is not None for vectors in asking] == [query_grad, key_grad]
        assert not any(value.requires_grad for value in result[1:])
    assert not info_nce(queries, keys, every, every, torch.arange(4), 0.1).loss_sum.requires_grad
