"""The stages of a pipeline: the layers of each, by torchtitan's arithmetic, and the model of one stage.

A stage is the whole model in which the modules of other stages do nothing. So names, layer types and ``forward`` stay the same.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from flame_ext.errors import ConfigError
from flame_ext.host.names import Parallelism, generate_llm_fqn_per_model_part
from flame_ext.model.hf_causal_lm import HFCausalLM, Stage

# The supported schedules of torch: their stages lie on the ranks in turn, and their backward is not split in two.
SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B")
_TITAN_NAMES = ("tok_embeddings", "norm", "output")  # torchtitan's names of the modules around the layers


def layers_of_stages(parallelism: Parallelism, num_layers: int) -> list[list[int]]:
    """Returns the numbers of the decoder layers of each stage; raises a ConfigError if the options do not give a pipeline."""
    degree, per_stage = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_layers_per_stage
    first_less = parallelism.pipeline_parallel_first_stage_less_layers
    last_less = parallelism.pipeline_parallel_last_stage_less_layers
    single = issubclass(get_schedule_class(parallelism.pipeline_parallel_schedule), PipelineScheduleSingle)
    names, option = parallelism.module_fqns_per_model_part, "module_fqns_per_model_part"
    if names is None:
        count, option = degree * (1 if single else 2), "pipeline_parallel_degree"
        if per_stage is not None:
            option = "pipeline_parallel_layers_per_stage"
            if per_stage < 1:
                raise ConfigError(f"parallelism.{option} must be >= 1, got {per_stage}")
            count = math.ceil((num_layers + first_less + last_less) / per_stage)
        try:
            names = generate_llm_fqn_per_model_part(count, num_layers, first_less, last_less)
        except ValueError as e:
            raise ConfigError(
                f"parallelism.{option} gives {count} stages for a model of {num_layers} layers "
                f"(pipeline_parallel_first_stage_less_layers {first_less}, last {last_less}): {e}"
            ) from e
    stages = _layers_by_name(names, num_layers)
    per_rank = len(stages) / degree
    if (per_rank != 1) if single else (per_rank < 2 or per_rank % 1):
        needed = "one stage for each rank" if single else "at least two stages for each rank, as many for each"
        raise ConfigError(
            f"parallelism.{option} gives {len(stages)} stages on {degree} ranks; pipeline_parallel_schedule "
            f"{parallelism.pipeline_parallel_schedule!r} needs {needed}"
        )
    return stages


def _layers_by_name(stages: Sequence[Sequence[str]], num_layers: int) -> list[list[int]]:
    """Turns ``[["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]`` into ``[[0], [1]]``."""
    last_words = [[name.rpartition(".")[2] for name in names] for names in stages]
    numbers = [[int(word) for word in words if word.isdigit()] for words in last_words]
    others = {word for words in last_words for word in words if not word.isdigit()}
    if [n for names in numbers for n in names] != list(range(num_layers)) or not others <= set(_TITAN_NAMES):
        raise ConfigError(
            f"parallelism.module_fqns_per_model_part must hold layers.0 to layers.{num_layers - 1} in order, each once, and "
            f"beside them at most {', '.join(_TITAN_NAMES)}, got {[list(names) for names in stages]}"
        )
    empty = next((i for i, names in enumerate(numbers[1:-1], start=1) if not names), None)
    if empty is not None:
        raise ConfigError(f"parallelism.module_fqns_per_model_part: stage {empty} has no layer")
    return numbers


def pipeline_plan(model: HFCausalLM) -> tuple[list[str], str, list[str]] | None:
    """Reads the names of the backbone's modules before the layers, of its layers and of those after; None without a plan.

    Those of a multimodal model that text does not reach are before the layers.
    """
    base, text = model.base_model, model.text_backbone
    place = next(f"{name}." if name else "" for name, module in base.named_modules() if module is text)
    beside = [name for name, child in base.named_children() if text not in (base, *child.modules())]
    names = list(getattr(text.config, "base_model_pp_plan", None) or {})
    lists = [i for i, name in enumerate(names) if isinstance(text.get_submodule(name), nn.ModuleList)]
    if len(lists) != 1:
        return None
    (at,), names = lists, [place + name for name in names]
    return [*beside, *names[:at]], names[at], names[at + 1 :]


@torch.no_grad()
def not_pipelined(model: HFCausalLM) -> str | None:
    """Says why the layers of this backbone, which may be on meta, cannot be spread over stages; None if no reason is known.

    A stage hands its hidden states to the next one as input embeddings. So the backbone without the modules of its plan
    has to return its input embeddings to the last bit: anything else that it does to them would be done by every stage.
    """
    if pipeline_plan(model) is None:
        return "transformers has no pipeline plan for it (base_model_pp_plan)"
    nothing = stage_of(model, Stage(1, 3), [])
    left = [name for name, _ in nothing.base_model.named_parameters()]
    if left:
        return f"its pipeline plan leaves out {', '.join(left[:3])}"
    states = torch.randn(1, 8, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    try:
        if torch.equal(states, nothing(states)):
            return None
    except Exception as e:  # the architecture's code may need any module that a stage lacks
        return f"its forward does not run without embedding and layers ({type(e).__name__}: {str(e)[:200]})"
    return "its forward does more to hidden states than its layers do, and every stage would do it"


class PassedOver(nn.Module):
    """Stands for a layer of another stage, and returns the hidden states unchanged."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


class StageLayers(nn.ModuleList):
    """The list of all layers on one stage; iteration yields all of them, but only the stage's own are its children."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields the layers that checkpointing, compilation and sharding are applied to."""
        return (child for child in super().named_children() if not isinstance(child[1], PassedOver))


def stage_of(whole: HFCausalLM, stage: Stage, layers: Sequence[int]) -> HFCausalLM:
    """Returns a copy of the model on meta that keeps one stage, with the decoder layers of the numbers ``layers``.

    The heads lie on the last stage; so does a copy of the input embedding, if :func:`shares_embedding`.
    """
    plan = pipeline_plan(whole)
    assert plan is not None, "preflight refuses models without a plan"
    before, layers_name, after = plan
    model = copy.deepcopy(whole)
    base = model.base_model
    embedding = model.get_input_embeddings()
    shared = stage.is_last and shares_embedding(whole)
    for name in before:
        if not stage.is_first and not (shared and base.get_submodule(name) is embedding):
            base.set_submodule(name, nn.Identity())
    every = enumerate(base.get_submodule(layers_name))
    base.set_submodule(layers_name, StageLayers(layer if i in layers else PassedOver() for i, layer in every))
    if not stage.is_last:
        for name in after:
            base.set_submodule(name, nn.Identity())
        for name in model.heads:
            delattr(model, name)
        model.heads = {}
        for name, child in list(model.named_children()):
            if child is not base:
                setattr(model, name, nn.Identity())
    model.stage, model.of_whole = stage, (whole,)
    model.remember_state()
    return model


def shares_embedding(whole: HFCausalLM) -> bool:
    """Whether the last stage needs the input embedding too: it is tied to the output embedding, or a head looks tokens up."""
    return whole.get_input_embeddings() in whole.tied_modules or any(h.uses_embedding for h in whole.heads.values())
