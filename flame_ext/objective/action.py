"""Losses by rewards for candidate next tokens: how well each leads to where the text went.

A candidate's score is the cosine of F_t, the summary of what followed, with the one that the action layer predicts for it.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reward = Literal["future", "label", "uniform"]
"""What rewards a candidate: its score; being the true token; or nothing, so that all are rewarded alike."""


class ActionOutput(NamedTuple):
    """() float32 sums over the valid positions; losses and entropy have gradients for the log-probabilities and the scores."""

    policy_loss_sum: Tensor  # -sum_a r_a log p(a | t), with rewards r
    entropy_sum: Tensor  # of p(a | t) among the candidates, in nats
    choice_loss_sum: Tensor  # -log softmax(score / tau) of the true token among the candidates
    reward_sum: Tensor  # rewards of the true tokens, each in 0..1
    rank_sum: Tensor  # ranks of the true tokens among the candidates by score, 1 = first
    cosine_sum: Tensor  # scores of the true tokens


def candidate_mask(token_ids: Tensor) -> Tensor:
    """Returns (N, 1 + K) bool: true for the true token in column 0, but not where it returns among the K likeliest."""
    mask = token_ids != token_ids[:, :1]
    mask[:, 0] = True
    return mask


def action_losses(
    scores: Tensor,
    log_probs: Tensor,
    candidates: Tensor,
    valid: Tensor,
    tau: float,
    gt_bias: float = 0.0,
    reward: Reward = "future",
    label_smoothing: float = 0.0,
) -> ActionOutput:
    """Computes the policy loss, with constant rewards r, and the loss that trains the scores.

    The rewards are softmax(score / tau), after ``gt_bias`` was added to the true token's score; or, by the label alone,
    1 - ``label_smoothing`` for the true token and the rest for all candidates alike; or uniform. The policy loss needs no sampling:
    its gradient on the logits of the distribution p over tokens is p - r.

    Args:
        scores: (N, 1 + K) float32 cosines, the true token's first.
        log_probs: (N, 1 + K) float32 log-probabilities of the same tokens.
        candidates: (N, 1 + K) bool, true in column 0.
        valid: (N,) bool, positions that have a future and a next token.
        tau: > 0, temperature of the rewards.
        label_smoothing: in 0..1.
    """
    preferences = torch.log_softmax((scores / tau).masked_fill(~candidates, float("-inf")), dim=-1)
    if reward == "future":
        biased = preferences.detach().clone()
        biased[:, 0] += gt_bias / tau
        rewards = (biased.log_softmax(dim=-1) if gt_bias else biased).exp()
    else:
        shared = 1.0 if reward == "uniform" else label_smoothing
        rewards = shared * candidates / candidates.sum(dim=-1, keepdim=True)
        rewards[:, 0] += 1 - shared
    # The log-probability of a masked candidate, whose reward is 0, may be infinite: avoid 0 * inf.
    policy = -(rewards * log_probs.masked_fill(~candidates, 0.0)).sum(dim=-1)
    among = log_probs.masked_fill(~candidates, float("-inf")).log_softmax(dim=-1)
    entropy = -(among.exp() * among.masked_fill(~candidates, 0.0)).sum(dim=-1)
    true_score = scores[:, :1].detach()
    better = ((scores.detach() > true_score) & candidates).sum(dim=-1)

    def total(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0.0).sum()

    return ActionOutput(
        policy_loss_sum=total(policy),
        entropy_sum=total(entropy),
        choice_loss_sum=total(-preferences[:, 0]),
        reward_sum=total(rewards[:, 0]),
        rank_sum=total(1.0 + better.float()),
        cosine_sum=total(true_score.squeeze(1)),
    )
