"""The chunked log-probabilities: torchtitan's loss bit for bit, its gradient too, and no copy of the logits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.components.loss import cross_entropy_loss as host_loss

from flame_ext.objective import cross_entropy
from flame_ext.objective.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy_loss,
    cross_entropy_sum,
    token_log_probs,
    weighted_sum,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one not full."""
    monkeypatch.setattr(cross_entropy, "chunk_elements", lambda _device: 1000)


def random_logits(
    batch: int, length: int, vocabulary: int, dtype: torch.dtype, ignored: float = 0.3
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(batch, length, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < ignored] = IGNORE_INDEX
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [2, 13, 264, 1001])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_loss_is_the_hosts_bit_for_bit(dtype: torch.dtype, vocabulary: int, ignored: float) -> None:
    logits, labels = random_logits(3, 67, vocabulary, dtype, ignored)
    expected = host_loss(logits, labels)
    actual = cross_entropy_loss(logits, labels)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    # As the trainer has it, divided by the number of tokens; and as it is.
    for scale in (1.0, 1 / 187):
        (expected_grad,) = torch.autograd.grad(expected * scale, logits, retain_graph=True)
        (grad,) = torch.autograd.grad(actual * scale, logits, retain_graph=True)
        assert grad.dtype == dtype and torch.equal(grad, expected_grad)


def test_without_a_label_there_is_no_loss() -> None:
    logits, labels = random_logits(2, 9, 50, torch.float32, ignored=2.0)
    loss = cross_entropy_loss(logits, labels)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def check_log_probs(top_k: int, compile_backend: str | None = None) -> None:
    logits, labels = random_logits(1, 40, 100, torch.float32)
    logits, labels = logits.detach()[0].requires_grad_(), labels[0]
    result = token_log_probs(logits, labels, top_k, compile_backend)
    double = logits.detach().double().requires_grad_()
    log_probs = torch.log_softmax(double, dim=-1)
    own = labels.masked_fill(labels == IGNORE_INDEX, 0)[:, None]
    token_ids = torch.cat([own, double.topk(top_k, dim=-1).indices], dim=1)
    expected = log_probs.gather(1, token_ids)
    assert result.values.dtype == torch.float32 and not result.token_ids.requires_grad
    assert torch.equal(result.token_ids, token_ids)
    torch.testing.assert_close(result.values.double(), expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(40, 1 + top_k, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(result.values, logits, upstream)
    (expected_grad,) = torch.autograd.grad(expected, double, upstream.double())
    # Where the label is among the likeliest two gradients meet, and may cancel.
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 1, 7, 100])
def test_log_probs_and_their_gradient_are_the_naive_ones(top_k: int) -> None:
    check_log_probs(top_k)


@pytest.mark.parametrize("top_k", [0, 7])
def test_compiled_arithmetic_gives_the_same(top_k: int) -> None:
    check_log_probs(top_k, compile_backend="aot_eager")
    logits, labels = random_logits(2, 20, 100, torch.bfloat16)
    compiled, eager = cross_entropy_loss(logits, labels, "aot_eager"), cross_entropy_loss(logits, labels)
    torch.testing.assert_close(compiled, eager)
    (actual,), (expected,) = (torch.autograd.grad(loss, logits) for loss in (compiled, eager))
    torch.testing.assert_close(actual, expected)


def test_inductor_makes_no_logits_in_float32() -> None:
    logits, labels = random_logits(1, 40, 300, torch.bfloat16, 0.0)
    arguments = logits.detach()[0], labels[0][:, None], torch.ones(40, 1)
    found, (code,) = run_and_get_code(torch.compile(cross_entropy._spread, dynamic=True), *arguments)
    torch.testing.assert_close(found, cross_entropy._spread(*arguments))
    made = re.findall(r"empty_strided_cpu\(\((\w+), (\w+)\), .*?torch\.(\w+)\)", code)
    assert made and [dtype for _, columns, dtype in made if columns != "1"] == ["bfloat16"], made


def test_sum_leaves_out_ignored_labels() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    total = cross_entropy_sum(log_probs, torch.tensor([7, IGNORE_INDEX, 0]))
    total.backward()
    assert total.item() == 5 and log_probs.grad.tolist() == [-1, 0, -1]


@given(st.integers(1, 20), st.integers(2, 30), st.floats(0.0, 1.0), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_weighting_by_the_own_probability_is_the_naive_one(n: int, vocabulary: int, ignored: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocabulary, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = IGNORE_INDEX
    actual = weighted_sum(token_log_probs(logits, labels).values[:, 0], labels)
    double = logits.detach().double().requires_grad_()
    of_label = torch.log_softmax(double, dim=-1)[torch.arange(n), labels.clamp_min(0)]
    expected = -(of_label.detach().exp() * of_label * (labels != IGNORE_INDEX)).sum()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    (grad,), (wanted,) = torch.autograd.grad(actual, logits), torch.autograd.grad(expected, double)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-6)


class LargestFloat32(TorchDispatchMode):
    """The number of elements of the largest float32 tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                self.elements = max(self.elements, leaf.numel())
        return result


def test_no_float32_copy_of_the_logits() -> None:
    logits, labels = random_logits(2, 50, 100, torch.bfloat16)
    with LargestFloat32() as own:
        cross_entropy_loss(logits, labels).backward()
    with LargestFloat32() as hosts:
        host_loss(logits, labels).backward()
    assert own.elements <= 1000 and hosts.elements == logits.numel()
