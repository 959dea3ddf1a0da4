"""The ``ModelConverter`` that attaches the heads: ``model.converters = ["future_prediction"]``."""

from __future__ import annotations

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import set_default_dtype

from flame_ext.heads.future_encoder import FutureEncoder
from flame_ext.heads.future_predictor import FuturePredictor


class FuturePredictionConverter:
    """Adds ``future_encoder`` and ``future_predictor`` to a model that has ``add_head`` (``HFCausalLM``)."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        self.job_config = job_config

    def convert(self, model: nn.Module) -> None:
        """Attach the heads, on meta, before the host parallelises the model. In place."""
        encoder, predictor = self.job_config.future_encoder, self.job_config.future_predictor
        hidden_size = model.config.get_text_config().hidden_size
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[self.job_config.training.dtype]):
            head = FuturePredictor(hidden_size, predictor.head_type, predictor.dropout)
        model.add_head("future_encoder", FutureEncoder(encoder.future_k), {})
        model.add_head("future_predictor", head, head.parameter_inits())
        if encoder.loss_weight == 0.0:
            # Never trained: gradients that never come would be waited for by DDP.
            head.requires_grad_(False)
        model.remember_state()
        logger.info(
            f"Attached future_encoder and future_predictor: {sum(p.numel() for p in head.parameters()):,} parameters"
        )

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""
