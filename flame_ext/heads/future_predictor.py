"""``[future_predictor]``: the head that predicts the future summary from the causal hidden state, and its contrastive loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.future_encoder import weight_in_step
from flame_ext.heads.spec import Head, HeadBatch, HeadSection, HeadSpec
from flame_ext.objective.contrastive import info_nce


@dataclass
class FuturePredictorSection(HeadSection):
    """The head that predicts the future summary from the causal hidden state h_t."""

    enable: bool = False
    """Whether there is a predictor. Needs `future_encoder.enable`."""

    head_type: Literal["linear", "mlp", "gated"] = "linear"
    """LayerNorm, then one linear map, or a GELU MLP, or a SiLU-gated MLP (both of twice the hidden size)."""

    loss: Literal["info_nce", "regression"] = "info_nce"
    """
    'info_nce': each prediction's own summary against all others of the step. 'regression': the squared distance of the prediction
    and its summary, both of unit length; with `future_encoder.negatives = "local"` it is the same, and no summary travels.
    """

    dropout: float = 0.0
    """Dropout on the normalised input of the head."""

    freeze_backbone: bool = False
    """Train the heads alone: a probe of what the backbone already knows about the future."""


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202) without biases: (…, D) to (…, D), F wide inside."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FuturePredictor(Head):
    """LayerNorm, dropout, a linear map or an MLP of twice the hidden size ("mlp": GELU, "gated": SwiGLU), L2 normalisation."""

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


def future_loss(head: FuturePredictor, batch: HeadBatch) -> dict[str, Tensor]:
    """InfoNCE of the prediction at t with the summary at t + shift (:func:`info_nce`), or their squared distance, 2 - 2 cos, and what is
    reported beside it.

    Each value is a sum over this micro-batch's pairs, over their number in the step.
    """
    future = batch.future
    assert future is not None
    predictions = head(future.hidden_states).flatten(0, 1)
    if batch.config.future_predictor.loss == "regression":
        distances = (predictions - future.bank.keys[future.targets].float()).square().sum(dim=-1)
        squared = torch.where(future.pairs.flatten(), distances, 0.0)
        cosines = torch.where(future.pairs.flatten(), 1.0 - 0.5 * distances, 0.0)
        sums = {"loss_future": squared.sum(), "future_cos_positive": cosines.sum()}
        return {name: value / future.pairs_in_step for name, value in sums.items()}
    out = info_nce(
        predictions,
        future.bank.keys,
        future.pairs.flatten(),
        future.bank.pair_mask,
        future.targets,
        batch.config.future_encoder.temperature,
        batch.compile_backend,
    )
    sums = {
        "loss_future": out.loss_sum,
        "future_mi_bound": out.information_sum,
        "future_top1": out.top1_sum,
        "future_keys": out.keys_sum,
        "future_cos_positive": out.positive_cosine_sum,
        "future_cos_negative": out.negative_cosine_sum,
    }
    return {name: value / future.pairs_in_step for name, value in sums.items()}


def _arguments(section: FuturePredictorSection, backbone: Any) -> dict[str, Any]:
    hidden_size = backbone.config.get_text_config().hidden_size
    return {"hidden_size": hidden_size, "head_type": section.head_type, "dropout": section.dropout}


def _weights(config: FlameJobConfig, step: int | None) -> dict[str, float]:
    return {"loss_future": weight_in_step(config, config.future_encoder, step)}


def _check(config: FlameJobConfig) -> Iterator[str]:
    predictor = config.future_predictor
    if not 0 <= predictor.dropout < 1:
        yield f"future_predictor.dropout must be in [0, 1), got {predictor.dropout}"
    if predictor.loss == "regression" and not config.future_encoder.detach_targets:
        yield (
            "future_predictor.loss = 'regression' with future_encoder.detach_targets = false: predictions and summaries would meet in a "
            "constant; leave detach_targets true, or take 'info_nce'"
        )
    if predictor.freeze_backbone and config.parallelism.pipeline_parallel_degree > 1:
        yield (
            "future_predictor.freeze_backbone does not go with parallelism.pipeline_parallel_degree > 1: only the last stage "
            "would have anything to train; use FSDP"
        )


HEAD = HeadSpec(
    section=FuturePredictorSection,
    build=FuturePredictor,
    arguments=_arguments,
    loss=future_loss,
    weights=_weights,
    needs_future=True,
    takes_parts=True,
    uses_logits=False,
    check=_check,
    shown=("future_top1",),
    card_metrics=("loss_future", "future_top1"),
)
