"""``[future_bag]``: the head that predicts which tokens the next window holds, in whatever order, and its loss."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.spec import HeadBatch, HeadSpec, WeightedHeadSection
from flame_ext.heads.upcoming import UpcomingTokensHead, new_tokens, vocabulary_arguments
from flame_ext.model.initialisation import Constant, ParameterInit


@dataclass
class FutureBagSection(WeightedHeadSection):
    """The head that predicts which tokens the next window holds (future summary prediction with a bag of tokens)."""

    window: int = 32
    """How far ahead the bag reaches: it is of the tokens at t+2 .. t+window, since the language model predicts t+1 itself."""


def bag_loss(scores: Tensor, upcoming: Tensor) -> Tensor:
    """Computes the multi-label loss of a bag of tokens (Mahajan et al. 2025, https://arxiv.org/abs/2510.14751), not reweighted.

    The target of token v is 1 if it is among the tokens to come, else 0; the loss of a position is the binary cross-entropy of
    sigmoid(scores), summed over the vocabulary.

    Args:
        scores: (N, V) float32.
        upcoming: (N, W) tokens to come; -1 where there is none.

    Returns (2,) float32: the summed loss, and the sum over positions of the probability of a token in the bag, averaged over
    the bag. A position without a token to come counts in neither.
    """
    held = new_tokens(upcoming)
    of_tokens = scores.gather(1, upcoming.clamp_min(0)) * held
    counted = held.any(-1)
    loss = (F.softplus(scores).sum(-1) * counted).sum() - of_tokens.sum()
    probability = (of_tokens.sigmoid() * held).sum(-1) / held.sum(-1).clamp_min(1)
    return torch.stack([loss, probability.sum()])


class FutureBag(UpcomingTokensHead):
    """Scores by whether a token comes within the window."""

    loss = staticmethod(bag_loss)

    def __init__(self, hidden_size: int, vocab_size: int, window: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=True)
        self.window = window

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """As of every head, but for the bias: every token has the probability of one of W - 1 out of V."""
        probability = min(0.5, (self.window - 1) / self.proj.out_features)
        return super().parameter_inits() | {"proj.bias": Constant(math.log(probability / (1 - probability)))}


def future_bag_loss(head: FutureBag, batch: HeadBatch) -> dict[str, Tensor]:
    """The loss of this micro-batch's positions, for each place in the bag, over the labelled tokens of the step."""
    upcoming = batch.upcoming(head.window)[..., 1:]
    loss, probability = head(batch.hidden_states, upcoming, batch.compile_backend).unbind()
    return {
        "loss_future_bag": loss / ((head.window - 1) * batch.tokens_in_step),
        "future_bag_probability": probability / batch.tokens_in_step,
    }


def _arguments(section: FutureBagSection, backbone: Any) -> dict[str, Any]:
    return vocabulary_arguments(backbone) | {"window": section.window}


def _check(config: FlameJobConfig) -> Iterator[str]:
    yield from at_least("future_bag", config.future_bag, {"window": (2, "t+2 alone")})


HEAD = HeadSpec(
    section=FutureBagSection,
    build=FutureBag,
    arguments=_arguments,
    loss=future_bag_loss,
    takes_parts=True,
    uses_logits=False,
    check=_check,
    shown=("future_bag_probability",),
    card_metrics=("loss_future_bag",),
    card_options=("loss_weight", "window"),
)
