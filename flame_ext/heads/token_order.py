"""``[token_order]``: the head that ranks the tokens to come by how soon they do, and its loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.spec import HeadBatch, HeadSpec, WeightedHeadSection
from flame_ext.heads.upcoming import UpcomingTokensHead, new_tokens, vocabulary_arguments

# A token at distance d has e^(1 - d) of the weight of the next one: beyond this, less than 1e-27.
_REACH = 64


@dataclass
class TokenOrderSection(WeightedHeadSection):
    """The head that ranks the tokens to come by how soon they do (token order prediction, TOP)."""

    window: int = 64
    """How many following positions are ranked. Their weight falls by e with each position, so more than 64 change nothing."""


def list_net(scores: Tensor, upcoming: Tensor) -> Tensor:
    """Computes the ListNet loss of token order prediction (Zuhri et al. 2025, https://arxiv.org/abs/2508.19228).

    The target of token v is W - d if it comes next at distance d <= W, else -inf; the loss of a position is the cross-entropy of
    softmax(scores) relative to softmax(target).

    Args:
        scores: (N, V) float32.
        upcoming: (N, W) tokens at distances 1 .. W; -1 where there is none.

    Returns (2,) float32: the summed loss, and the number of positions where the next token has the highest score. A position
    without a token to come counts in neither.
    """
    distance = torch.arange(upcoming.shape[1], device=scores.device, dtype=torch.float32)
    weights = torch.where(new_tokens(upcoming), torch.exp(-distance), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    of_tokens = scores.log_softmax(-1).gather(1, upcoming.clamp_min(0))
    hits = scores.argmax(-1) == upcoming[:, 0]
    return torch.stack([-(weights * of_tokens).sum(), hits.sum().float()])


class TokenOrder(UpcomingTokensHead):
    """Scores by how soon a token comes."""

    loss = staticmethod(list_net)


def token_order_loss(head: TokenOrder, batch: HeadBatch) -> dict[str, Tensor]:
    """The loss of this micro-batch's positions over the labelled tokens of the step, and the share of next tokens ranked first."""
    window = min(batch.config.token_order.window, _REACH)
    loss, hits = head(batch.hidden_states, batch.upcoming(window), batch.compile_backend).unbind()
    return {"loss_token_order": loss / batch.tokens_in_step, "token_order_top1": hits / batch.tokens_in_step}


def _arguments(_section: TokenOrderSection, backbone: Any) -> dict[str, Any]:
    return vocabulary_arguments(backbone)


def _check(config: FlameJobConfig) -> Iterator[str]:
    yield from at_least("token_order", config.token_order, {"window": (1, "the next token")})


HEAD = HeadSpec(
    section=TokenOrderSection,
    build=TokenOrder,
    arguments=_arguments,
    loss=token_order_loss,
    takes_parts=True,
    uses_logits=False,
    check=_check,
    shown=("token_order_top1",),
    card_metrics=("loss_token_order",),
    card_options=("loss_weight",),
)
