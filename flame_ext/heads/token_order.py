"""``[token_order]``: the head that ranks the tokens to come by how soon they do, and its loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.spec import LOSS_WEIGHT, Head, HeadBatch, HeadSpec, WeightedHeadSection
from flame_ext.objective.chunks import CHUNK_ELEMENTS, compiled, sum_over_chunks
from flame_ext.objective.windows import upcoming_tokens

# A token at distance d has e^(1 - d) of the weight of the next one: beyond this, less than 1e-27.
_REACH = 64


@dataclass
class TokenOrderSection(WeightedHeadSection):
    """The head that ranks the tokens to come by how soon they do (token order prediction, TOP)."""

    window: int = 64
    """How many following positions are ranked. Their weight falls by e with each position, so more than 64 change nothing."""


class TokenOrder(Head):
    """A second output embedding: one linear map of the hidden state after the final norm to a score for each token."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(
        self, hidden_states: Tensor, upcoming: Tensor | None = None, compile_backend: str | None = None
    ) -> Tensor:
        """(…, D) hidden states to (…, V) scores; or, with the (…, W) tokens to come, to the (2,) sums of :func:`list_net`."""
        if upcoming is None:
            return self.proj(hidden_states)
        states, tokens = hidden_states.flatten(0, -2), upcoming.flatten(0, -2)
        loss = compiled(list_net, compile_backend)

        def of_rows(rows: slice) -> Tensor:
            scores = self.proj(states[rows])
            with torch.autocast(scores.device.type, enabled=False):
                return loss(scores.float(), tokens[rows])

        return sum_over_chunks(of_rows, len(tokens), max(1, CHUNK_ELEMENTS // self.proj.out_features))


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
    again = (upcoming[:, :, None] == upcoming[:, None, :]).tril(-1).any(-1)  # (N, W): the token has come before
    distance = torch.arange(upcoming.shape[1], device=scores.device, dtype=torch.float32)
    weights = torch.where(again | (upcoming < 0), 0.0, torch.exp(-distance))
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    of_tokens = scores.log_softmax(-1).gather(1, upcoming.clamp_min(0))
    hits = scores.argmax(-1) == upcoming[:, 0]
    return torch.stack([-(weights * of_tokens).sum(), hits.sum().float()])


def token_order_loss(head: TokenOrder, batch: HeadBatch) -> dict[str, Tensor]:
    """The loss of this micro-batch's positions over the labelled tokens of the step, and the share of next tokens ranked first."""
    window = min(batch.config.token_order.window, _REACH)
    upcoming = upcoming_tokens(batch.input_ids, batch.doc_ids, window)
    loss, hits = head(batch.hidden_states, upcoming, batch.compile_backend).unbind()
    return {"loss_token_order": loss / batch.tokens_in_step, "token_order_top1": hits / batch.tokens_in_step}


def _arguments(_section: TokenOrderSection, backbone: Any) -> dict[str, Any]:
    text = backbone.config.get_text_config()
    return {"hidden_size": text.hidden_size, "vocab_size": text.vocab_size}


def _check(config: FlameJobConfig) -> Iterator[str]:
    yield from at_least("token_order", config.token_order, {"window": (1, "the next token"), "loss_weight": LOSS_WEIGHT["loss_weight"]})


HEAD = HeadSpec(
    section=TokenOrderSection,
    build=TokenOrder,
    arguments=_arguments,
    loss=token_order_loss,
    uses_logits=False,
    check=_check,
    shown=("token_order_top1",),
    card_metrics=("loss_token_order",),
    card_options=("loss_weight",),
)
