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
from flame_ext.model.parameters import parameters_of
from flame_ext.objective.chunks import chunk_elements, sum_over_chunks


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

    def forward(self, hidden_states: Tensor, embeddings: Tensor, counted: Tensor | None = None) -> Tensor:
        """(…, D) states and (…, D) embeddings of the tokens after them to (…, D) predictions of the states of these tokens.

        With ``counted`` to the sums of the loss instead, of S steps from each of N positions on; it is (N, S) bool: whether the
        state s = 1 .. S rows further on is a target. Then there are (N, D) states, and embeddings of their own tokens. Returns
        (2,) float32: the distances, a mean over D for each target, and the cosines of the first step.
        """
        if counted is None:
            return self._next(hidden_states, embeddings)
        count, steps = counted.shape

        def later(values: Tensor) -> list[Tensor]:
            padded = F.pad(values.detach(), (0, 0, 0, steps))
            return [padded[step : step + count] for step in range(1, steps + 1)]

        def of_chunk(state: Tensor, counted: Tensor, *ahead: Tensor) -> Tensor:
            distances, cosines = [], []
            for inside, embedding, target in zip(counted.unbind(1), ahead[:steps], ahead[steps:], strict=True):
                state = self._next(state, embedding)
                with torch.autocast(state.device.type, enabled=False):
                    found, target = state.float(), target.float()
                    distances.append(F.smooth_l1_loss(found, target, reduction="none").mean(-1) * inside)
                    cosines.append(F.cosine_similarity(found.detach(), target, dim=-1) * inside)
            return torch.stack([torch.stack(distances).sum(), cosines[0].sum()])

        rows = max(1, chunk_elements(hidden_states.device) // (steps * self.up_proj.out_features))
        return sum_over_chunks(of_chunk, rows, hidden_states, counted, *later(embeddings), *later(hidden_states))

    def _next(self, hidden_states: Tensor, embeddings: Tensor) -> Tensor:
        both = torch.cat([self.state_norm(hidden_states), self.token_norm(embeddings)], dim=-1)
        return hidden_states + self.down_proj(F.gelu(self.up_proj(both)))


def next_latent_loss(head: NextLatent, batch: HeadBatch) -> dict[str, Tensor]:
    """The SmoothL1 distance of h_{t+s} and its prediction (Teoh et al. 2025, https://arxiv.org/abs/2511.05963), s = 1 .. S.

    It is the mean over the D elements and the S steps, as far as t + s is in the document of t, with h_{t+s} constant to it. The
    embeddings stay the language model's. Values are sums over this micro-batch's positions, over the labelled tokens of the step.
    """
    assert batch.embed is not None
    steps, states, input_ids = batch.config.next_latent.steps, batch.hidden_states, batch.input_ids
    counted, (tokens, _, parts, _) = batch.upcoming(steps) >= 0, batch.sequences
    if parts.is_split:  # behind each chunk come the rows that follow it, which are targets only
        later = parts.following(states.detach(), steps)[:, :, -steps:]
        counted, states = (values.unflatten(1, (parts.chunks, -1)) for values in (counted, states))
        states, counted = torch.cat([states, later], dim=2), F.pad(counted, (0, 0, 0, steps))
        input_ids = parts.shard_ahead(tokens, steps, 0)
    with torch.no_grad():
        embeddings = batch.embed(input_ids.flatten(0, -2)).to(states.dtype)
    flat = states.flatten(0, -2), embeddings.flatten(0, -2), counted.flatten(0, -2)
    distance, cosine = head(*flat).unbind()
    return {
        "loss_next_latent": distance / (steps * batch.tokens_in_step),
        "next_latent_cosine": cosine / batch.tokens_in_step,
    }


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
    multiplications=lambda head, _backbone, config: config.next_latent.steps * parameters_of(head),
    uses_embedding=True,
    takes_parts=True,
    uses_logits=False,
    check=_check,
    shown=("next_latent_cosine",),
    card_metrics=("loss_next_latent",),
    card_options=("loss_weight", "steps"),
)
