"""The head that predicts the future summary after each candidate for the next token."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flame_ext.heads.gated_mlp import GatedMLP
from flame_ext.model.initialisation import ParameterInit, linear_inits

# Candidates that are predicted at a time: at most this many elements of the widest activation (64 MiB in float32).
_CHUNK_ELEMENTS = 1 << 24


class ActionLayer(nn.Module):
    """From the hidden state h_t and a candidate's embedding to the summary of the future in which it comes next.

    Args:
        hidden_size: D of the backbone.
        head_type: "mlp": a GELU MLP on state and embedding side by side. "tower": two residual SwiGLU towers, one for the
            state and one for the embedding, that meet in a product; the state's runs once for all candidates.
        use_rms_norm: RMSNorm on both inputs, else LayerNorm.
        ffn_hidden_size: F, width of the hidden layers.
    """

    def __init__(
        self, hidden_size: int, head_type: Literal["mlp", "tower"], use_rms_norm: bool, ffn_hidden_size: int
    ) -> None:
        super().__init__()
        if head_type not in ("mlp", "tower"):
            raise ValueError(f"head_type must be one of 'mlp', 'tower', got {head_type!r}")
        norm = nn.RMSNorm if use_rms_norm else nn.LayerNorm
        self.state_norm, self.action_norm = norm(hidden_size), norm(hidden_size)
        self.ffn_hidden_size = ffn_hidden_size
        if head_type == "mlp":
            # One linear map on both inputs side by side, in two halves, so that the state's is computed once.
            self.state_proj: nn.Module = nn.Linear(hidden_size, ffn_hidden_size)
            self.action_proj: nn.Module = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
            self.out_proj = nn.Linear(ffn_hidden_size, hidden_size)
        else:
            self.state_proj = _Tower(hidden_size, ffn_hidden_size)
            self.action_proj = _Tower(hidden_size, ffn_hidden_size)
            self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.head_type = head_type

    def forward(self, hidden_states: Tensor, embeddings: Tensor, summaries: Tensor) -> tuple[Tensor, Tensor]:
        """Score candidates in chunks; the backward computes each chunk again, so no (N, C, D) is kept.

        Args:
            hidden_states: (N, D).
            embeddings: (N, C, D) of the candidates, the true next token first.
            summaries: (N, D), of unit length, what the predictions are compared with.

        Returns:
            (N, C) float32 cosines of prediction and summary; (N, D) float32 predictions for the true token, of unit
            length.
        """
        width = embeddings.shape[1] * max(self.ffn_hidden_size, hidden_states.shape[1])
        rows = max(1, _CHUNK_ELEMENTS // width)
        chunks = zip(hidden_states.split(rows), embeddings.split(rows), summaries.split(rows), strict=True)
        parts = [
            checkpoint(self._score, *chunk, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else self._score(*chunk)
            for chunk in chunks
        ]
        scores, predictions = zip(*parts, strict=True)
        return torch.cat(scores), torch.cat(predictions)

    def predict(self, hidden_states: Tensor, embeddings: Tensor) -> Tensor:
        """(…, D) states and (…, C, D) embeddings of candidates to (…, C, D) float32 predictions of unit length."""
        state = self.state_proj(self.state_norm(hidden_states)).unsqueeze(-2)
        action = self.action_proj(self.action_norm(embeddings))
        joint = F.gelu(state + action) if self.head_type == "mlp" else F.silu(state) * action
        return F.normalize(self.out_proj(joint).float(), dim=-1)

    def _score(self, hidden_states: Tensor, embeddings: Tensor, summaries: Tensor) -> tuple[Tensor, Tensor]:
        predictions = self.predict(hidden_states, embeddings)
        with torch.autocast(predictions.device.type, enabled=False):
            scores = (predictions * summaries.float().unsqueeze(-2)).sum(dim=-1)
        return scores, predictions[..., 0, :]

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """Norms at identity, biases at zero, linear maps LeCun-uniform (gain 1)."""
        return linear_inits(self)


class _Tower(GatedMLP):
    """x + SwiGLU(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)
