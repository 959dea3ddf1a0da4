"""The ``ModelConverter`` that attaches the heads: ``model.converters = ["future_prediction"]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import set_default_dtype

from flame_ext.errors import CheckpointError
from flame_ext.heads.action_layer import ActionLayer
from flame_ext.heads.future_encoder import build_future_encoder
from flame_ext.heads.future_predictor import FuturePredictor
from flame_ext.heads.own import enabled_heads, own_head
from flame_ext.model.attention import attention_windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from flame_ext.model.hf_causal_lm import HFCausalLM


class FuturePredictionConverter:
    """Adds the heads to a model that has ``add_head`` (``HFCausalLM``)."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims | None = None) -> None:
        self.job_config = job_config

    def convert(self, model: HFCausalLM) -> None:
        """Attach the heads, on meta, before the host parallelises the model. In place.

        A head whose losses have weight 0 does not ask for gradients, nor do a frozen backbone and projections behind
        detached targets: gradients that never come would be waited for by DDP.
        """
        config = self.job_config
        encoder, predictor, action = config.future_encoder, config.future_predictor, config.action_layer
        if predictor.freeze_backbone:
            model.requires_grad_(False)
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            heads = build_heads(config, model.config, model)
        trained = {
            "future_encoder": encoder.loss_weight > 0 and not encoder.detach_targets,
            "future_predictor": encoder.loss_weight > 0,
            "action_layer": action.loss_weight > 0 or action.model_loss_weight > 0,
            **{name: section.loss_weight > 0 for name, section in enabled_heads(config).items()},
        }
        for name, head in heads.items():
            head.requires_grad_(trained[name])
            model.add_head(name, head, head.parameter_inits())
            model.head_optimization[name] = getattr(config, name)
        model.remember_state()
        sizes = ", ".join(f"{name} ({sum(p.numel() for p in head.parameters()):,})" for name, head in heads.items())
        logger.info(f"Attached heads (parameters): {sizes}{'; the backbone is frozen' * predictor.freeze_backbone}")

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""


def head_arguments(job_config: JobConfig, config: PreTrainedConfig, backbone: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of each enabled head to what it is built from, as plain data; an export keeps it (``future_heads/config.json``).

    Args:
        job_config: with the sections of flame_ext.
        config: the backbone's, a transformers configuration.
        backbone: whose kind of norm the action layer takes over.
    """
    text = config.get_text_config()
    encoder, predictor, action = job_config.future_encoder, job_config.future_predictor, job_config.action_layer
    anticausal = encoder.summary_method == "anticausal"
    arguments: dict[str, dict[str, Any]] = {}
    if encoder.enable:
        arguments["future_encoder"] = {
            "summary_method": encoder.summary_method,
            "future_k": encoder.future_k,
            "hidden_size": text.hidden_size,
            "num_heads": text.num_attention_heads,
            "windows": attention_windows(text) if anticausal else None,
        }
        arguments["future_predictor"] = {
            "hidden_size": text.hidden_size,
            "head_type": predictor.head_type,
            "dropout": predictor.dropout,
        }
    if action.enable:
        inferred_norm = any("RMSNorm" in type(module).__name__ for module in backbone.modules())
        arguments["action_layer"] = {
            "hidden_size": text.hidden_size,
            "head_type": action.head_type,
            "use_rms_norm": inferred_norm if action.use_rms_norm is None else action.use_rms_norm,
            "ffn_hidden_size": action.ffn_hidden_size or _ffn_hidden_size(text),
        }
    for name, section in enabled_heads(job_config).items():
        if (spec := own_head(name)) is not None:
            arguments[name] = spec.arguments(section, text)
    return arguments


HEAD_BUILDERS: dict[str, Callable[..., Any]] = {
    "future_encoder": build_future_encoder,
    "future_predictor": FuturePredictor,
    "action_layer": ActionLayer,
}
"""Name of a head to what builds it from its arguments."""


def build_head(name: str, arguments: dict[str, Any]) -> Any:
    """A head, flame_ext's or a user's own.

    Raises:
        CheckpointError: nobody has registered one of this name.
    """
    spec = own_head(name)
    if spec is not None:
        return spec.build(**arguments)
    if name not in HEAD_BUILDERS:
        raise CheckpointError(
            f"head {name!r} is not known (known: {', '.join(HEAD_BUILDERS)}); import the module that registers it first"
        )
    return HEAD_BUILDERS[name](**arguments)


def build_heads(job_config: JobConfig, config: PreTrainedConfig, backbone: nn.Module) -> dict[str, Any]:
    """The enabled heads, on the current default device; arguments as in :func:`head_arguments`."""
    arguments = head_arguments(job_config, config, backbone)
    return {name: build_head(name, values) for name, values in arguments.items()}


def _ffn_hidden_size(text: PreTrainedConfig) -> int:
    """The backbone's, under the names that configurations have for it."""
    for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"):
        if getattr(text, name, None):
            return getattr(text, name)
    return 4 * text.hidden_size
