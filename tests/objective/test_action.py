"""Rewards and losses of candidates against a loop, and which gradient goes where."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_ext.objective.action import ActionOutput, action_losses, candidate_mask


def naive(
    scores: Tensor,
    log_probs: Tensor,
    candidates: Tensor,
    valid: Tensor,
    tau: float,
    gt_bias: float = 0.0,
    reward: str = "future",
    label_smoothing: float = 0.0,
) -> list[float]:
    """The six sums, position by position, in double precision."""
    sums = [0.0] * 6
    for n in range(scores.shape[0]):
        if not valid[n]:
            continue
        columns = [c for c in range(scores.shape[1]) if candidates[n, c]]
        exps = {c: math.exp((scores[n, c].item() + gt_bias * (c == 0) - 1 - gt_bias) / tau) for c in columns}
        rewards = {c: exps[c] / sum(exps.values()) for c in columns}
        if reward == "label":
            rewards = {c: label_smoothing / len(columns) + (1 - label_smoothing) * (c == 0) for c in columns}
        elif reward == "uniform":
            rewards = {c: 1 / len(columns) for c in columns}
        sums[0] -= sum(rewards[c] * log_probs[n, c].item() for c in columns)
        mass = sum(math.exp(log_probs[n, c].item()) for c in columns)
        shares = [math.exp(log_probs[n, c].item()) / mass for c in columns]
        sums[1] -= sum(share * math.log(share) for share in shares)
        # Not by log(reward): a reward may be too small for a number.
        top = max(scores[n, c].item() for c in columns)
        shifted = sum(math.exp((scores[n, c].item() - top) / tau) for c in columns)
        sums[2] += math.log(shifted) + (top - scores[n, 0].item()) / tau
        sums[3] += rewards[0]
        sums[4] += 1 + sum(scores[n, c] > scores[n, 0] for c in columns).item()
        sums[5] += scores[n, 0].item()
    return sums


def random_case(n: int, k: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.rand(n, 1 + k, generator=generator) - 1).requires_grad_()
    log_probs = (-5 * torch.rand(n, 1 + k, generator=generator)).requires_grad_()
    candidates = torch.rand(n, 1 + k, generator=generator) < 0.7
    candidates[:, 0] = True
    return scores, log_probs, candidates, torch.rand(n, generator=generator) < share


@given(
    st.integers(1, 12), st.integers(0, 6), st.floats(0.01, 2.0), st.sampled_from([0.0, 0.6, 1.0]), st.integers(0, 2**31)
)
@settings(max_examples=150, deadline=None)
def test_sums_are_the_naive_ones(n: int, k: int, tau: float, share: float, seed: int) -> None:
    case = random_case(n, k, share, seed)
    result = action_losses(*case, tau)
    # A score over tau is known to 1e-7 / tau; the log-probabilities that it weighs are at most 5.
    slack = 1e-6 * n / tau
    for name, actual, expected in zip(ActionOutput._fields, result, naive(*case, tau), strict=True):
        assert actual.dtype == torch.float32 and actual.shape == ()
        assert actual.item() == pytest.approx(expected, rel=1e-5, abs=slack), name


@given(
    st.integers(1, 12),
    st.integers(0, 6),
    st.floats(0.05, 2.0),
    st.floats(0.0, 1.0),
    st.sampled_from(["future", "label", "uniform"]),
    st.floats(0.0, 1.0),
    st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_other_rewards_are_the_naive_ones(
    n: int, k: int, tau: float, bias: float, reward: str, smoothing: float, seed: int
) -> None:
    case = random_case(n, k, 0.8, seed)
    result = action_losses(*case, tau, bias, reward, smoothing)
    expected = naive(*case, tau, bias, reward, smoothing)
    for name, actual, wanted in zip(ActionOutput._fields, result, expected, strict=True):
        assert actual.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6 * n / tau), name


def test_the_bias_rewards_the_true_token_and_trains_no_score() -> None:
    case = random_case(9, 4, 1.0, 3)
    plain, biased = action_losses(*case, 0.5), action_losses(*case, 0.5, gt_bias=0.4)
    assert biased.reward_sum > plain.reward_sum and biased.choice_loss_sum == plain.choice_loss_sum
    (grad,) = torch.autograd.grad(biased.policy_loss_sum, case[0], allow_unused=True)
    assert grad is None


def test_the_entropy_is_the_candidates() -> None:
    scores, log_probs, candidates, valid = random_case(9, 4, 0.6, 0)
    result = action_losses(scores, log_probs, candidates, valid, 0.5)
    double = log_probs.detach().double().requires_grad_()
    among = torch.where(candidates, double.exp(), 0.0)
    among = among / among.sum(1, keepdim=True)
    entropy = -(among * torch.where(candidates, among, 1.0).log() * valid[:, None]).sum()
    (grad,) = torch.autograd.grad(result.entropy_sum, log_probs)
    (expected,) = torch.autograd.grad(entropy, double)
    torch.testing.assert_close(grad.double(), torch.where(candidates, expected, 0.0), rtol=1e-4, atol=1e-6)


@given(st.integers(1, 12), st.integers(0, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_candidates_count_once(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    likeliest = torch.stack([torch.randperm(8, generator=generator)[:k] for _ in range(n)])
    token_ids = torch.cat([torch.randint(8, (n, 1), generator=generator), likeliest], dim=1)
    mask = candidate_mask(token_ids)
    for row, allowed in zip(token_ids.tolist(), mask.tolist(), strict=True):
        assert allowed == [column == 0 or token != row[0] for column, token in enumerate(row)]
        kept = [token for token, counts in zip(row, allowed, strict=True) if counts]
        assert sorted(kept) == sorted(set(row))


def test_each_loss_has_its_own_gradient() -> None:
    scores, log_probs, candidates, valid = random_case(9, 4, 0.6, 0)
    assert valid.any() and not valid.all()
    result = action_losses(scores, log_probs, candidates, valid, 0.5)
    grads = torch.autograd.grad(result.policy_loss_sum, (scores, log_probs), retain_graph=True, allow_unused=True)
    rewards = torch.softmax((scores.detach() / 0.5).masked_fill(~candidates, float("-inf")), dim=-1)
    assert grads[0] is None
    torch.testing.assert_close(grads[1], -rewards * valid[:, None])
    grads = torch.autograd.grad(result.choice_loss_sum, (scores, log_probs), retain_graph=True, allow_unused=True)
    truth = torch.zeros_like(rewards)
    truth[:, 0] = 1
    torch.testing.assert_close(grads[0], (rewards - truth) / 0.5 * valid[:, None])
    assert grads[1] is None
    assert not any(value.requires_grad for value in (result.reward_sum, result.rank_sum, result.cosine_sum))


@pytest.mark.parametrize("every", [True, False])
def test_nothing_valid_gives_zero_and_no_nan(every: bool) -> None:
    scores, log_probs, candidates, _ = random_case(5, 3, 0.0, 1)
    candidates[:, 1:] = every
    result = action_losses(scores, log_probs, candidates, torch.zeros(5, dtype=torch.bool), 0.1)
    (result.policy_loss_sum + result.choice_loss_sum + result.entropy_sum).backward()
    assert [value.item() for value in result] == [0.0] * 6
    assert torch.equal(scores.grad, torch.zeros(5, 4)) and torch.equal(log_probs.grad, torch.zeros(5, 4))


def test_an_excluded_candidate_may_be_impossible() -> None:
    scores, log_probs, candidates, valid = random_case(5, 3, 1.0, 2)
    impossible = log_probs.detach().masked_fill(~candidates, float("-inf")).requires_grad_()
    assert torch.isinf(impossible).any()
    result = action_losses(scores, impossible, candidates, valid, 0.1)
    expected = action_losses(scores, log_probs, candidates, valid, 0.1)
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(result, expected, strict=True))
    (result.policy_loss_sum + result.choice_loss_sum + result.entropy_sum).backward()
    assert torch.isfinite(scores.grad).all() and torch.isfinite(impossible.grad).all()
    assert torch.equal(impossible.grad[~candidates], torch.zeros(int((~candidates).sum())))


def test_reward_and_rank_of_the_true_token() -> None:
    every, one = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    scores = torch.tensor([[0.5, 0.9, 0.1, 0.5]])
    result = action_losses(scores, torch.zeros(1, 4), every, one, 1.0)
    assert result.rank_sum.item() == 2 and result.cosine_sum.item() == 0.5  # an equal score is not before it
    assert result.reward_sum.item() == pytest.approx(
        math.exp(0.5) / (2 * math.exp(0.5) + math.exp(0.9) + math.exp(0.1))
    )
    every[0, 1] = False
    assert action_losses(scores, torch.zeros(1, 4), every, one, 1.0).rank_sum.item() == 1
    every[0, 1:] = False
    alone = action_losses(scores, torch.zeros(1, 4), every, one, 1.0)
    assert alone.reward_sum.item() == 1 and alone.choice_loss_sum.item() == 0
