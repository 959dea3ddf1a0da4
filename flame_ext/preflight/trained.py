"""Checks of what a run trains, on the model with its heads on the meta device."""

from collections.abc import Iterator

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import set_default_dtype
from transformers import PreTrainedConfig

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.heads.registry import attach_heads
from flame_ext.model.freezing import freeze_parameters
from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, Stage, build_hf_causal_lm
from flame_ext.model.pipeline_stages import layers_of_stages, not_pipelined, stage_of


def check_trained(config: FlameJobConfig, _hf_config: PreTrainedConfig) -> Iterator[str]:
    """Yields one sentence for each finding in what is frozen."""
    if not config.training.freeze:
        return
    if config.optimizer.early_step_in_backward:
        yield "optimizer.early_step_in_backward does not go with training.freeze: it waits for every gradient; leave it out"
    args = HFModelArgs()
    args.update_from_config(config)
    try:
        with set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model = build_hf_causal_lm(args)
            attach_heads(model, config)
        freeze_parameters(model, config.training.freeze)
    except ConfigError as e:
        yield str(e)
        return
    if config.parallelism.pipeline_parallel_degree > 1 and not_pipelined(model) is None:
        yield from _resting_stages(model, config)


def _resting_stages(model: HFCausalLM, config: FlameJobConfig) -> Iterator[str]:
    try:
        stages = layers_of_stages(config.parallelism, len(model.layers))
    except ConfigError:  # which the checks of parallelism say
        return
    for index, layers in enumerate(stages):
        stage = stage_of(model, Stage(index, len(stages)), layers)
        if not any(parameter.requires_grad for parameter in stage.parameters()):
            yield (
                f"training.freeze leaves stage {index} of {len(stages)} (layers {layers}) nothing to train, and so nothing to its "
                "optimizer: freeze fewer, give the stage another layer (parallelism.module_fqns_per_model_part), or scale with FSDP"
            )
