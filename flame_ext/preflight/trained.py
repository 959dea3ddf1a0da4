"""Checks of what a run trains: adapters, and parameters that are frozen, on the model with its heads on the meta device."""

from collections.abc import Iterator

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import set_default_dtype
from transformers import PreTrainedConfig

from flame_ext.config.sections import ALL_LINEAR, FlameJobConfig, Lora
from flame_ext.errors import ConfigError
from flame_ext.heads.registry import CONVERTER_NAME, attach_heads, freezing_heads
from flame_ext.hf_config import random_fields
from flame_ext.model.adapters import CONVERTER_NAME as LORA
from flame_ext.model.adapters import OPTION, add_adapters
from flame_ext.model.freezing import freeze_parameters
from flame_ext.model.hf_causal_lm import HFCausalLM, Stage
from flame_ext.model.pipeline_stages import layers_of_stages, not_pipelined, stage_of
from flame_ext.model.tensor_parallel import adapter_problems
from flame_ext.preflight.model import model_on_meta


def check_adapters(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each finding in ``[lora]``, and for each option that does not go with it."""
    converters, options = config.model.converters, config.lora
    if LORA not in converters:
        if options != Lora():
            yield f'[lora] has no effect without model.converters = ["{LORA}", …]; add it, or leave the section out'
        return
    if converters.count(LORA) > 1 or CONVERTER_NAME in converters[: converters.index(LORA)]:
        yield (
            f'model.converters must have "{LORA}" once and before "{CONVERTER_NAME}", got {converters}: adapters are for the '
            "backbone, and heads are trained as they are"
        )
    if ALL_LINEAR in options.target_modules[1:] or not all(options.target_modules) or options.target_modules[:1] == []:
        yield f"lora.target_modules must name linear layers, or be ['{ALL_LINEAR}'] alone, got {options.target_modules}"
    for name, is_set, why in _not_with_adapters(config):
        if is_set:
            yield f"{name} does not go with {OPTION}: {why}"


def _not_with_adapters(config: FlameJobConfig) -> Iterator[tuple[str, bool, str]]:
    """Yields options, whether they are set, and why they do not go with adapters."""
    degrees = config.parallelism
    dropped = config.lora.lora_dropout > 0 and degrees.tensor_parallel_degree > 1
    drawn = "ranks would draw the same for different features; set lora.lora_dropout = 0, or scale with FSDP"
    yield "lora.lora_dropout > 0 with parallelism.tensor_parallel_degree > 1", dropped, drawn
    yield "parallelism.expert_parallel_degree > 1", degrees.expert_parallel_degree > 1, "not tested; scale with FSDP"
    float8 = [name for name in config.model.converters if name.startswith("quantize.")]
    yield f"model.converters {', '.join(map(repr, float8))}", bool(float8), "its layers are no plain linear ones"
    yield "training.freeze", bool(config.training.freeze), "adapters and heads alone are trained; use freeze of a head"
    freezing = [f"{name}.freeze_backbone" for name in freezing_heads(config)]
    yield ", ".join(freezing), bool(freezing), "the adapters would be frozen as well; drop one of the two"
    rows = "the rows of new tokens would stay as they begin, since embeddings are frozen"
    yield "seed.resize_vocabulary", config.seed.resize_vocabulary, rows
    steps = "steps hold adapters and heads alone; the last step is exported (checkpoint.last_save_in_hf)"
    yield "export.interval > 0", config.export.interval > 0, steps
    biases = "the biases would be missing beside the adapters in their export"
    yield "moe.bias_update_rate > 0", config.moe.bias_update_rate > 0, biases
    early = "it waits for every gradient; leave it out"
    yield "optimizer.early_step_in_backward", config.optimizer.early_step_in_backward, early


def check_recomputed(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    """Yields a sentence if layers would draw other random numbers when activation checkpointing runs them again."""
    checkpointed = config.activation_checkpoint
    if checkpointed.mode == "none" or checkpointed.preserve_rng_state:
        return
    drawing = [f"{name} = {value} in config.json" for name, value in random_fields(hf_config).items()]
    if LORA in config.model.converters and config.lora.lora_dropout > 0:
        drawing.insert(0, f"lora.lora_dropout = {config.lora.lora_dropout}")
    if drawing:
        yield (
            f"activation_checkpoint.preserve_rng_state = false does not go with {', '.join(drawing)}: layers that run again in the "
            "backward would draw other masks than in the forward, and gradients would be wrong; leave it out, or set these to 0"
        )


def check_trained(config: FlameJobConfig, _hf_config: PreTrainedConfig) -> Iterator[str]:
    """Yields one sentence for each finding in what is frozen, and in where adapters are."""
    has_adapters = LORA in config.model.converters
    if not (config.training.freeze or has_adapters):
        return
    if config.optimizer.early_step_in_backward:
        yield "optimizer.early_step_in_backward does not go with training.freeze: it waits for every gradient; leave it out"
    try:
        model = model_on_meta(config)
        with set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            if has_adapters:
                add_adapters(model, config.lora)
            attach_heads(model, config)
        freeze_parameters(model, config.training.freeze)
    except ConfigError as e:
        yield str(e)
        return
    if has_adapters and config.parallelism.tensor_parallel_degree > 1:
        yield from adapter_problems(model)
    if config.parallelism.pipeline_parallel_degree > 1 and not_pipelined(model) is None:
        option = OPTION if has_adapters else "training.freeze"
        yield from _resting_stages(model, config, option)


def _resting_stages(model: HFCausalLM, config: FlameJobConfig, option: str) -> Iterator[str]:
    try:
        stages = layers_of_stages(config.parallelism, len(model.layers))
    except ConfigError:  # which the checks of parallelism say
        return
    for index, layers in enumerate(stages):
        stage = stage_of(model, Stage(index, len(stages)), layers)
        if not any(parameter.requires_grad for parameter in stage.parameters()):
            yield (
                f"{option} leaves stage {index} of {len(stages)} (layers {layers}) nothing to train, and so nothing to its optimizer: "
                "freeze fewer, give the stage another layer (parallelism.module_fqns_per_model_part), or scale with FSDP"
            )
