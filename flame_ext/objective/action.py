"""Which next token leads where the text went: rewards for candidate tokens, and the losses that follow from them.

A candidate a at position t is scored by the cosine of F_t, the summary of what followed in the text, with the summary
that the action layer predicts for "a comes next". Candidate 0 is the token that really came next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ActionOutput(NamedTuple):
    """Sums over the valid positions; all () float32."""

    policy_loss_sum: Tensor
    """-sum_a r_a log p(a | t), differentiable with respect to the log-probabilities."""
    choice_loss_sum: Tensor
    """-log softmax(score / tau) of the true token among the candidates, differentiable with respect to the scores."""
    reward_sum: Tensor
    """Reward of the true token, in 0..1."""
    rank_sum: Tensor
    """Rank of the true token among the candidates by score, 1 = first."""
    cosine_sum: Tensor
    """Score of the true token."""


def candidate_mask(token_ids: Tensor) -> Tensor:
    """Each candidate once: the true token counts in its own place, not again among the likeliest.

    Args:
        token_ids: (N, 1 + K) int64, the true token first, then K different ones.

    Returns:
        (N, 1 + K) bool, true in column 0.
    """
    mask = token_ids != token_ids[:, :1]
    mask[:, 0] = True
    return mask


def action_losses(scores: Tensor, log_probs: Tensor, candidates: Tensor, valid: Tensor, tau: float) -> ActionOutput:
    """The policy loss, with rewards softmax(score / tau) as constants, and the loss that teaches the scores.

    The policy's gradient on the logits is p - r: it takes the distribution towards the rewards, with nothing to sample.

    Args:
        scores: (N, 1 + K) float32 cosines, the true token's first.
        log_probs: (N, 1 + K) float32, of the same tokens under the model.
        candidates: (N, 1 + K) bool, true in column 0.
        valid: (N,) bool, positions that have a future and a next token.
        tau: > 0, temperature of the rewards.
    """
    preferences = torch.log_softmax((scores / tau).masked_fill(~candidates, float("-inf")), dim=-1)
    rewards = preferences.detach().exp()
    # A masked candidate has reward 0 and may have any log-probability; an infinite one would make 0 * inf.
    policy = -(rewards * log_probs.masked_fill(~candidates, 0.0)).sum(dim=-1)
    true_score = scores[:, :1].detach()
    better = ((scores.detach() > true_score) & candidates).sum(dim=-1)

    def total(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0.0).sum()

    return ActionOutput(
        policy_loss_sum=total(policy),
        choice_loss_sum=total(-preferences[:, 0]),
        reward_sum=total(rewards[:, 0]),
        rank_sum=total(1.0 + better.float()),
        cosine_sum=total(true_score.squeeze(1)),
    )
