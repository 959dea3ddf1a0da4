"""Which modules of a mixture of experts are its experts, and which its routers."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

if TYPE_CHECKING:
    from flame_ext.model.hf_causal_lm import HFCausalLM

_STACKED = "grouped_gemm"  # the word of transformers' plans for a parameter whose first axis counts experts


def stacked_experts(model: nn.Module) -> dict[str, Any]:
    """Returns the modules that hold a layer's experts stacked, by name: those of transformers' plan (``base_model_ep_plan``).

    The model is one before parallelisms are applied. Without a plan they are the modules with parameters of three axes, of which
    all have ``num_experts`` rows.
    """
    plan = getattr(model, "_ep_plan", None) or {}
    planned = {name.rpartition(".")[0] for name, word in plan.items() if word == _STACKED}
    if planned:
        return {n: m for n, m in model.named_modules() if replace_layer_number_by_wildcard(n) in planned}
    return {name: module for name, module in model.named_modules() if is_stacked(module)}


def is_stacked(module: nn.Module) -> bool:
    count, parameters = getattr(module, "num_experts", None), list(module.parameters(recurse=False))
    return any(p.dim() > 2 for p in parameters) and all(p.dim() > 1 and len(p) == count for p in parameters)


def find_routers(model: HFCausalLM) -> tuple[dict[str, nn.Module], str]:
    """Returns the routers of a whole model by name, and why they cannot be observed; neither for a dense model.

    They are those that the architecture names, or else, as some do not and others name a whole block, the modules beside stacked
    experts with a row for each.
    """
    found = [routers for routers in (_named_routers(model), _routers_beside_experts(model)) if routers]
    for routers in found:
        if not _not_observed(model, routers):
            return routers, ""
    if found:
        return found[-1], _not_observed(model, found[-1])
    return {}, "none of its modules is known as a router" if has_experts(model) else ""


def experts_of(router: nn.Module) -> int:
    """The number of experts that a router chooses from: the rows of its weight."""
    return int(next(iter(router.parameters())).shape[0])


def _named_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of transformers' ``_can_record_outputs``."""
    kinds = []
    for part in model.modules():
        recorders = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            target = recorder if inspect.isclass(recorder) else getattr(recorder, "target_class", None)
            kinds += [target] if inspect.isclass(target) else []
    return {name: module for name, module in model.named_modules() if isinstance(module, tuple(kinds))}  # type: ignore[misc]


def _routers_beside_experts(model: HFCausalLM) -> dict[str, nn.Module]:
    found = {}
    for name, experts in stacked_experts(model).items():
        block, count = name.rpartition(".")[0], experts_of(experts)
        for key, module in model.get_submodule(block).named_children():
            rows = any(p.dim() == 2 and len(p) == count for p in module.parameters(recurse=False))
            if rows and module is not experts:
                found[f"{block}.{key}"] = module
    return found


def has_experts(model: nn.Module) -> bool:
    """Whether a model is a mixture of experts."""
    held = (m for name, m in model.named_modules() if name.rpartition(".")[2] == "experts")
    return bool(stacked_experts(model)) or any(True for module in held for _ in module.parameters())


def _not_observed(model: HFCausalLM, routers: dict[str, nn.Module]) -> str:
    """Says why the routers cannot be observed; empty if they can."""
    if len({experts_of(router) for router in routers.values()}) > 1:
        return "its routers choose from different numbers of experts"
    blocks = {name.rpartition(".")[0] for name in stacked_experts(model)}
    if unknown := sorted(block for block in blocks if not any(name.startswith(f"{block}.") for name in routers)):
        return f"none of the modules of {unknown[0]} is known as a router"
    states = torch.zeros(1, 2, model.config.get_text_config().hidden_size, device="meta")
    for router in {type(router): router for router in routers.values()}.values():
        kind = type(router).__name__
        try:
            output = copy.deepcopy(router).to("meta")(states)
        except Exception as e:  # the architecture's code may want anything
            return f"{kind} does not take hidden states alone ({type(e).__name__}: {str(e)[:100]})"
        if not _is_known(output, experts_of(router)):
            return f"{kind} does not return logits, weights and experts"
    return ""


def _is_known(output: Any, experts: int) -> bool:
    if not isinstance(output, tuple) or not output or not all(isinstance(part, Tensor) for part in output):
        return False
    output = in_order(output)
    return [part.is_floating_point() for part in output] == [True, True, False] and output[0].shape[-1] == experts


def in_order(output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turns what a router returns into logits, weights, experts, and back: some return these the other way round."""
    return output if output[0].is_floating_point() else output[::-1]
