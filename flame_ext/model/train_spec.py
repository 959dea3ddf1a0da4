"""``model.name = "hf_causal_lm"``: the TrainSpec, built from the host's parts wherever it has them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torchtitan.components.loss import LossFunction
from torchtitan.protocols import StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec

from flame_ext.config.sections import FlameJobConfig
from flame_ext.data.build import build_dataloader
from flame_ext.data.tokenizer import build_tokenizer
from flame_ext.future_objective import loss_compile_backend
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.model.parallelize import parallelize_hf_causal_lm
from flame_ext.model.pipeline import pipeline_hf_causal_lm
from flame_ext.objective.cross_entropy import cross_entropy_loss
from flame_ext.run.metrics import build_metrics_processor
from flame_ext.run.optimization import build_lr_schedulers, build_optimizers
from flame_ext.run.validation import build_validator

MODEL_NAME = "hf_causal_lm"


class IdentityStateDictAdapter(StateDictAdapter):
    """The model's keys are the Hugging Face ones already."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return hf_state_dict


def build_loss(job_config: FlameJobConfig, **_kwargs: Any) -> LossFunction:
    """The host's cross-entropy, number for number, without its float32 copies of the logits."""
    return partial(cross_entropy_loss, compile_backend=loss_compile_backend(job_config))


def build_train_spec() -> TrainSpec:
    return TrainSpec(
        model_cls=build_hf_causal_lm,
        model_args={"auto": HFModelArgs()},
        parallelize_fn=parallelize_hf_causal_lm,
        pipelining_fn=pipeline_hf_causal_lm,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics_processor,
        state_dict_adapter=IdentityStateDictAdapter,
    )
