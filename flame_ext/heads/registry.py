"""The heads that are known: the built-in ones and those that a user's module registers. Everything else asks here.

A module named by ``experimental.custom_import`` registers a head; docs/extending.md is a worked example.
"""

from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from typing import Any, get_type_hints

from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import set_default_dtype
from transformers import PreTrainedConfig

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import CheckpointError, ConfigError
from flame_ext.heads import action_layer, future_bag, future_encoder, future_predictor, mtp, next_latent, token_order
from flame_ext.heads.names import HEAD_NAMES
from flame_ext.heads.spec import LOSS_WEIGHT, HeadSection, HeadSpec
from flame_ext.model.hf_causal_lm import AttachedHead, HFCausalLM
from flame_ext.model.parameters import parameters_of, parameters_on_meta

CONVERTER_NAME = "future_prediction"
"""The model converter that attaches the enabled heads."""

_heads: dict[str, HeadSpec] = {
    "future_encoder": future_encoder.HEAD,
    "future_predictor": future_predictor.HEAD,
    "action_layer": action_layer.HEAD,
    "mtp": mtp.HEAD,
    "token_order": token_order.HEAD,
    "future_bag": future_bag.HEAD,
    "next_latent": next_latent.HEAD,
}


def register_head(name: str, spec: HeadSpec) -> None:
    """Make a head known. ``name`` is that of its section, of its module in the model, and the first part of its parameters' keys.

    It is attached where ``[name]`` says ``enable = true``. Raises ConfigError if the name is taken, or is no identifier.
    """
    if not name.isidentifier():
        raise ConfigError(
            f"register_head({name!r}): a head's name must be an identifier, it names a section and a module"
        )
    if name not in _heads and name in {f.name for f in fields(FlameJobConfig)}:
        raise ConfigError(f"register_head({name!r}): there is a section of this name already; take another one")
    if _heads.setdefault(name, spec) is not spec:
        raise ConfigError(f"register_head({name!r}): another head has this name; take another one")
    if name not in HEAD_NAMES:
        HEAD_NAMES.append(name)


def job_config_class() -> type[FlameJobConfig]:
    """The job's configuration with the section of every known head."""
    for spec in _heads.values():
        hints = get_type_hints(spec.section)
        for option in fields(spec.section):  # torchtitan reads types, which are strings under postponed annotations
            option.type = hints[option.name]
    sections: list[Any] = [(name, spec.section, field(default_factory=spec.section)) for name, spec in _heads.items()]
    return make_dataclass("JobConfig", sections, bases=(FlameJobConfig,))


def enabled_heads(config: FlameJobConfig) -> dict[str, HeadSpec]:
    """Name of each head that the job enables to its spec, in the order of registration."""
    sections = {name: getattr(config, name, None) for name in _heads}
    return {n: _heads[n] for n, s in sections.items() if isinstance(s, HeadSection) and s.enable}


def loss_weights(name: str, config: FlameJobConfig, step: int | None = None) -> dict[str, float]:
    """The weight of each loss of a head in a step; without a step, before any schedule."""
    spec = _heads[name]
    if spec.weights is not None:
        return spec.weights(config, step)
    return {} if spec.loss is None else {f"loss_{name}": getattr(config, name).loss_weight}


def trained_heads(config: FlameJobConfig) -> dict[str, HeadSpec]:
    """The enabled heads with a loss whose weight is above 0."""
    enabled = enabled_heads(config)
    return {name: spec for name, spec in enabled.items() if any(w > 0 for w in loss_weights(name, config).values())}


def teacher_of(config: FlameJobConfig) -> str | None:
    """The name of the enabled head that makes the summaries of the future, if a trained head needs them."""
    if not any(spec.needs_future for spec in trained_heads(config).values()):
        return None
    return next((name for name, spec in enabled_heads(config).items() if spec.is_teacher), None)


def freezing_heads(config: FlameJobConfig) -> list[str]:
    """The heads, enabled or not, whose section has a true ``freeze_backbone``: with any, the heads alone are trained."""
    return [name for name in _heads if getattr(getattr(config, name, None), "freeze_backbone", False)]


def attach_heads(model: HFCausalLM, config: FlameJobConfig) -> None:
    """Attach the enabled heads to a model on meta, before it is parallelised. In place.

    Heads whose losses have weight 0, and what is frozen, require no gradients: DDP would wait for what never comes. Raises a ConfigError
    if the states that logits are made of have another width than hidden_size, which heads are built for.
    """
    text, unembedding = model.config.get_text_config(), model.get_output_embeddings()
    if unembedding is not None and (width := unembedding.weight.shape[1]) != text.hidden_size:
        raise ConfigError(
            f"model.converters {CONVERTER_NAME!r}: heads read states of hidden_size {text.hidden_size}, and {model.config.model_type!r} "
            f"projects them to {width} before it makes logits (word_embed_proj_dim in config.json); train it without heads"
        )
    if freezing_heads(config):
        model.requires_grad_(False)
    enabled, trained = enabled_heads(config), trained_heads(config)
    with parameters_on_meta(), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        heads = {name: build_head(name, values) for name, values in head_arguments(config, model).items()}
    for name, head in heads.items():
        spec = enabled[name]
        trains = name in trained if spec.trains is None else spec.trains(config)
        head.requires_grad_(trains and not getattr(config, name).freeze)
        if getattr(config, name).freeze:
            model.frozen |= {f"{name}.{key}": f"{name}.freeze" for key, _ in head.named_parameters()}
        multiplications = (
            parameters_of(head) if spec.multiplications is None else spec.multiplications(head, model, config)
        )
        attached = AttachedHead(
            getattr(config, name),
            multiplications if name in trained else 0,
            uses_embedding=spec.uses_embedding,
            uses_unembedding=name in trained and spec.uses_unembedding,
            needs_logits=name in trained and spec.uses_logits,
            tensor_parallel_plan=spec.tensor_parallel_plan,
        )
        model.add_head(name, head, head.parameter_inits(), attached)
    model.remember_state()
    frozen = {name: ", frozen" * getattr(config, name).freeze for name in heads}
    sizes = ", ".join(f"{name} ({parameters_of(head):,}{frozen[name]})" for name, head in heads.items())
    logger.info(f"Attached heads (parameters): {sizes}{'; the backbone is frozen' * bool(freezing_heads(config))}")


def head_arguments(config: FlameJobConfig, backbone: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of each enabled head to what it is built from, as plain data; an export keeps it (``future_heads/config.json``)."""
    return {name: spec.arguments(getattr(config, name), backbone) for name, spec in enabled_heads(config).items()}


def build_head(name: str, arguments: dict[str, Any]) -> Any:
    """Build a head on the current default device; CheckpointError if nobody has registered one of this name."""
    if name not in _heads:
        raise CheckpointError(
            f"head {name!r} is not known (known: {', '.join(_heads)}); import the module that registers it first"
        )
    return _heads[name].build(**arguments)


def shown_metrics() -> tuple[str, ...]:
    """The heads' metrics that stand on the console, beside the losses."""
    return tuple(name for spec in _heads.values() for name in spec.shown)


def shown_on_cards() -> tuple[list[str], list[str]]:
    """The heads' metrics, and their options by full name, that a model card lists."""
    options = [f"{name}.{option}" for name, spec in _heads.items() for option in spec.card_options]
    return [metric for spec in _heads.values() for metric in spec.card_metrics], options


def record_of_heads(config: FlameJobConfig, step_batch: int) -> dict[str, Any]:
    """Facts of the enabled heads that determine the numbers of a run beside their options, by full name.

    ``step_batch`` is the number of sequences in a micro-batch of all ranks.
    """
    return {
        f"{name}.{key}": value
        for name, spec in enabled_heads(config).items()
        if spec.record is not None
        for key, value in spec.record(config, step_batch).items()
    }


def check_heads(config: FlameJobConfig) -> Iterator[str]:
    """Yield one sentence for each fault of the heads' sections."""
    enabled, attached = enabled_heads(config), CONVERTER_NAME in config.model.converters
    if enabled and not attached:
        names = ", ".join(f"{name}.enable" for name in enabled)
        yield f'{names}: true, but nothing attaches the heads: set model.converters = ["{CONVERTER_NAME}"]'
    if attached and not enabled:
        first, *others = (f"{name}.enable" for name in _heads)
        off = f"{first} is false, and so is {', '.join(others)}"
        yield f"model.converters has {CONVERTER_NAME!r}, but {off}: enable it or drop the converter"
    for name, spec in _heads.items():
        section = getattr(config, name, None)
        if section is None:
            yield f"head {name!r} was registered too late to be read; name its module in experimental.custom_import"
            continue
        if not isinstance(section, HeadSection):
            yield f"[{name}]: its dataclass must extend flame_ext.heads.spec.HeadSection, got {type(section).__name__}"
            continue
        if spec.weights is None and spec.loss is not None:
            yield from at_least(name, section, {"loss_weight": LOSS_WEIGHT["loss_weight"]})
        yield from spec.check(config) if spec.check is not None else ()
        yield from _check_optimization(name, section, config)
    if len(several := [name for name, spec in enabled.items() if spec.is_teacher]) > 1:
        yield f"{' and '.join(f'{name}.enable' for name in several)}: both make the summaries of the future; enable one of them"
    if not several:
        teachers = " or ".join(f"{name}.enable" for name, spec in _heads.items() if spec.is_teacher)
        waiting = [name for name, spec in enabled.items() if spec.needs_future]
        yield from (f"{name}.enable needs {teachers}: its loss takes summaries of the future" for name in waiting)
    if (freezing := freezing_heads(config)) and all(getattr(config, name).freeze for name in trained_heads(config)):
        yield f"{freezing[0]}.freeze_backbone leaves nothing to train: enable the heads, with a loss_weight above 0 and without freeze"


def check_heads_of_model(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    """Yield one sentence for each reason why an enabled head does not fit this backbone."""
    for spec in enabled_heads(config).values():
        yield from spec.check_model(config, hf_config) if spec.check_model is not None else ()


def _check_optimization(name: str, section: HeadSection, config: FlameJobConfig) -> Iterator[str]:
    if section.lr_scale <= 0:
        yield f"{name}.lr_scale must be > 0 (a multiple of optimizer.lr), got {section.lr_scale}"
    if section.weight_decay is not None and section.weight_decay < 0:
        yield f"{name}.weight_decay must be >= 0, got {section.weight_decay}; leave it out for optimizer.weight_decay"
    if section.warmup_steps is not None and section.warmup_steps < 0:
        yield f"{name}.warmup_steps must be >= 0, got {section.warmup_steps}; leave it out for lr_scheduler.warmup_steps"
    own_group = section.lr_scale != 1 or section.weight_decay is not None or section.warmup_steps is not None
    if own_group and section.freeze:
        yield f"{name}.freeze leaves nothing for {name}.lr_scale, weight_decay and warmup_steps: leave them out, or freeze"
    if own_group and config.optimizer.early_step_in_backward:
        yield (
            f"{name}.lr_scale, weight_decay and warmup_steps make a parameter group, which "
            "optimizer.early_step_in_backward does not have: drop one of the two"
        )
