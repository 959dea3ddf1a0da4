"""What heads share that give each token of the vocabulary a score by whether, or how soon, it comes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flame_ext.heads.spec import Head
from flame_ext.objective.chunks import chunk_elements, compiled, sum_over_chunks


class UpcomingTokensHead(Head):
    """A second output embedding: one linear map of the hidden state after the final norm to a score for each token.

    ``loss`` maps (N, V) float32 scores and the (N, W) tokens to come, -1 where there is none, to sums over the N positions.
    """

    loss: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, hidden_size: int, vocab_size: int, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, vocab_size, bias=bias)

    def forward(
        self, hidden_states: Tensor, upcoming: Tensor | None = None, compile_backend: str | None = None
    ) -> Tensor:
        """(…, D) hidden states to (…, V) scores; or, with the (…, W) tokens to come, to the sums of ``loss``.

        The scores exist for one chunk of positions at a time, in the forward and in the backward.
        """
        if upcoming is None:
            return self.proj(hidden_states)
        loss = compiled(type(self).loss, compile_backend)

        def of_chunk(states: Tensor, tokens: Tensor) -> Tensor:
            scores = self.proj(states)
            with torch.autocast(scores.device.type, enabled=False):
                return loss(scores.float(), tokens)

        width = max(
            self.proj.out_features, 8 * upcoming.shape[-1]
        )  # new_tokens has a few numbers for each token to come
        rows = max(1, chunk_elements(hidden_states.device) // width)
        return sum_over_chunks(of_chunk, rows, hidden_states.flatten(0, -2), upcoming.flatten(0, -2))


def vocabulary_arguments(backbone: Any) -> dict[str, Any]:
    """The sizes of an :class:`UpcomingTokensHead` beside a backbone."""
    text = backbone.config.get_text_config()
    return {"hidden_size": text.hidden_size, "vocab_size": text.vocab_size}


def new_tokens(upcoming: Tensor) -> Tensor:
    """Returns which of the (N, W) tokens to come are the first of their kind in their row; (N, W) bool."""
    ordered, places = upcoming.sort(dim=1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(first).scatter(1, places, first) & (upcoming >= 0)
