"""The head that predicts the future summary from the causal hidden state."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from flame_ext.heads.gated_mlp import GatedMLP
from flame_ext.model.initialisation import ParameterInit, linear_inits


class FuturePredictor(nn.Module):
    """LayerNorm, dropout, a linear map or an MLP of twice the hidden size, L2 normalisation in float32.

    Args:
        hidden_size: D of the backbone.
        head_type: "linear", "mlp" (GELU) or "gated" (SwiGLU).
        dropout: on the normalised input.
    """

    def __init__(
        self, hidden_size: int, head_type: Literal["linear", "mlp", "gated"] = "linear", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.proj: nn.Module
        if head_type == "linear":
            self.proj = nn.Linear(hidden_size, hidden_size)
        elif head_type == "mlp":
            self.proj = nn.Sequential(
                nn.Linear(hidden_size, 2 * hidden_size), nn.GELU(), nn.Linear(2 * hidden_size, hidden_size)
            )
        elif head_type == "gated":
            self.proj = GatedMLP(hidden_size, 2 * hidden_size)
        else:
            raise ValueError(f"head_type must be one of 'linear', 'mlp', 'gated', got {head_type!r}")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) hidden states to (B, T, D) float32 predictions of unit length."""
        return F.normalize(self.proj(self.dropout(self.norm(hidden_states))).float(), dim=-1)

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """Norm at identity, biases at zero, linear maps LeCun-uniform (gain 1)."""
        return linear_inits(self)
