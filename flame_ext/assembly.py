"""The one registration: what torchtitan finds by name, put together from model, heads, data, objective and optimizer."""

from functools import cache, partial
from typing import Any

from torch import nn
from torchtitan.components.loss import LossFunction
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import StateDictAdapter

from flame_ext.config.sections import FlameJobConfig, loss_compile_backend
from flame_ext.data.build import build_dataloader
from flame_ext.data.sources import register_local_sources
from flame_ext.data.tokenizer import build_tokenizer
from flame_ext.heads.registry import CONVERTER_NAME, attach_heads
from flame_ext.host.names import TrainSpec, model_converters, register_model_converter, register_train_spec
from flame_ext.model.adapters import CONVERTER_NAME as LORA
from flame_ext.model.adapters import add_adapters
from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, build_hf_causal_lm
from flame_ext.model.parallelize import parallelize_hf_causal_lm
from flame_ext.model.pipeline import pipeline_hf_causal_lm
from flame_ext.model.quantization import FLOAT8, with_names_of_transformers
from flame_ext.objective.cross_entropy import cross_entropy_loss
from flame_ext.run.metrics import FutureMetricsProcessor
from flame_ext.run.optimization import build_lr_schedulers, build_optimizers
from flame_ext.run.validation import build_validator

MODEL_NAME = "hf_causal_lm"


@cache
def register() -> None:
    """Register TrainSpec, ModelConverter and local datasets with torchtitan. Safe to call again."""
    register_train_spec(MODEL_NAME, build_train_spec())
    register_model_converter(FuturePredictionConverter, CONVERTER_NAME)
    register_model_converter(LoraConverter, LORA)
    model_converters[FLOAT8] = with_names_of_transformers(model_converters[FLOAT8])
    register_local_sources()


class FuturePredictionConverter:
    """``model.converters = ["future_prediction"]``: attaches the enabled heads to a :class:`HFCausalLM`."""

    def __init__(self, job_config: FlameJobConfig, parallel_dims: ParallelDims | None = None) -> None:
        self.job_config = job_config

    def convert(self, model: HFCausalLM) -> None:
        """Attach the heads, on meta, before torchtitan parallelises the model. In place."""
        attach_heads(model, self.job_config)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""


class LoraConverter:
    """``model.converters = ["lora", …]``: adds the adapters of ``[lora]`` to a :class:`HFCausalLM` and freezes the rest."""

    def __init__(self, job_config: FlameJobConfig, parallel_dims: ParallelDims | None = None) -> None:
        self.options = job_config.lora

    def convert(self, model: HFCausalLM) -> None:
        """Add the adapters, on meta, before heads are attached and torchtitan parallelises the model. In place."""
        add_adapters(model, self.options)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing to do."""


class IdentityStateDictAdapter(StateDictAdapter):
    """The model's keys are the Hugging Face ones already."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return hf_state_dict


def build_loss(job_config: FlameJobConfig, **_kwargs: Any) -> LossFunction:
    """torchtitan's cross-entropy, number for number, without its float32 copies of the logits."""
    return partial(cross_entropy_loss, compile_backend=loss_compile_backend(job_config))


def build_train_spec() -> TrainSpec:
    """The TrainSpec of ``model.name = "hf_causal_lm"``."""
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
        build_metrics_processor_fn=FutureMetricsProcessor,
        state_dict_adapter=IdentityStateDictAdapter,
    )
