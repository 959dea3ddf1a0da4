"""The summary F_t of what follows position t: the target of the prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flame_ext.objective.masks import anticausal_mask


class FutureEncoder(nn.Module):
    """Future summaries by an anti-causal, gradient-free forward of the backbone itself.

    The backbone runs a second time with a mask that lets position t attend to later positions only; its last hidden
    states are the summaries. Token t itself enters F_t through its own residual stream, which is why predictions are
    compared with F_{t+shift}, shift >= 1. No parameters of its own.

    Args:
        future_k: how many following positions a summary may attend to, 0 = all.
    """

    def __init__(self, future_k: int = 0) -> None:
        super().__init__()
        self.future_k = future_k

    @torch.no_grad()  # not inference_mode: FSDP's unsharded parameters are used again by the student's forward
    def forward(self, backbone: Callable[..., Tensor], input_ids: Tensor, doc_ids: Tensor | None) -> Tensor:
        """
        Args:
            backbone: ``backbone(input_ids, attention_mask=(B or 1, 1, T, T) bool, output="hidden_states")`` gives
                (B, T, D). Under FSDP it has to be the root module.
            input_ids: (B, T).
            doc_ids: (B, T) if summaries stop at the end of their document, else None.

        Returns:
            (B, T, D) without gradient. A position without a future holds only its own token; mask it out.
        """
        mask = anticausal_mask(input_ids.shape[1], self.future_k, doc_ids, device=input_ids.device)
        return backbone(input_ids, attention_mask=mask, output="hidden_states")

    def extra_repr(self) -> str:
        return f"future_k={self.future_k}"
