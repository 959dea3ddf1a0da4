"""``[next_latent]``: the head that predicts the next hidden state from this one and the next token, and its loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.spec import Head, HeadBatch, HeadSpec, WeightedHeadSection


@dataclass
class NextLatentSection(WeightedHeadSection):
    """The head that predicts the next hidden state from this one and the next token (next-latent prediction, NextLat)."""

    steps: int = 1
    """How many positions ahead: the head is applied to its own prediction and the token after it, so many times in all."""

    ffn_hidden_size: int | None = None
    """Inner width of the head; by default twice the hidden size."""


class NextLatent(Head):
    """h_t and the embedding of x_{t+1} to a prediction of h_{t+1}: h_t + MLP([LayerNorm(h_t), LayerNorm(e_{t+1})]), with GELU."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.state_norm = nn.LayerNorm(hidden_size)
        self.token_norm = nn.LayerNorm(hidden_size)
        self.up_proj = nn.Linear(2 * hidden_size, ffn_hidden_size)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, embeddings: Tensor) -> Tensor:
        """(…, T, D) hidden states and (S, …, T, D) embeddings of the tokens 1 .. S further on to (S, …, T, D) predictions."""
        predictions = []
        for embedding in embeddings:
            both = torch.cat([self.state_norm(hidden_states), self.token_norm(embedding)], dim=-1)
            hidden_states = hidden_states + self.down_proj(F.gelu(self.up_proj(both)))
            predictions.append(hidden_states)
        return torch.stack(predictions)


def next_latent_loss(head: NextLatent, batch: HeadBatch) -> dict[str, Tensor]:
    """The SmoothL1 distance of h_{t+s} and its prediction (Teoh et al. 2025, https://arxiv.org/abs/2511.05963), s = 1 .. S.

    It is the mean over the D elements and the S steps, as far as t + s is in the document of t, with h_{t+s} constant to it. The
    embeddings stay the language model's. Values are sums over this micro-batch's positions, over the labelled tokens of the step.
    """
    assert batch.embed is not None
    steps, length = min(batch.config.next_latent.steps, batch.input_ids.shape[1] - 1), batch.input_ids.shape[1]
    ahead = torch.arange(1, steps + 1, device=batch.input_ids.device)[:, None] + torch.arange(
        length, device=batch.input_ids.device
    )
    inside, ahead = ahead < length, ahead.clamp_max(length - 1)  # (S, T)

    def later(values: Tensor) -> Tensor:
        return values[:, ahead].movedim(1, 0)  # (B, T, …) to (S, B, T, …): what is s positions further on

    with torch.no_grad():
        embeddings, targets = batch.embed(later(batch.input_ids)), later(batch.hidden_states).float()
    predictions = head(batch.hidden_states, embeddings.to(batch.hidden_states.dtype)).float()
    with torch.autocast(predictions.device.type, enabled=False):
        counted = (inside[:, None] & (later(batch.doc_ids) == batch.doc_ids)).float()
        distances = F.smooth_l1_loss(predictions, targets, reduction="none").mean(-1) * counted
        cosines = F.cosine_similarity(predictions.detach(), targets, dim=-1)[0] * counted[0]
    sums = {"loss_next_latent": distances.sum() / batch.config.next_latent.steps, "next_latent_cosine": cosines.sum()}
    return {name: value / batch.tokens_in_step for name, value in sums.items()}


def _arguments(section: NextLatentSection, backbone: Any) -> dict[str, Any]:
    hidden_size = backbone.config.get_text_config().hidden_size
    return {"hidden_size": hidden_size, "ffn_hidden_size": section.ffn_hidden_size or 2 * hidden_size}


def _check(config: FlameJobConfig) -> Iterator[str]:
    section = config.next_latent
    yield from at_least("next_latent", section, {"steps": (1, "the next state")})
    if section.ffn_hidden_size is not None and section.ffn_hidden_size < 1:
        yield f"next_latent.ffn_hidden_size must be >= 1, got {section.ffn_hidden_size}; leave it out for twice the hidden size"


HEAD = HeadSpec(
    section=NextLatentSection,
    build=NextLatent,
    arguments=_arguments,
    loss=next_latent_loss,
    uses_embedding=True,
    uses_logits=False,
    check=_check,
    shown=("next_latent_cosine",),
    card_metrics=("loss_next_latent",),
    card_options=("loss_weight", "steps"),
)
