"""Routers are found in every mixture, whether its architecture names them or not, and a mixture without is no dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from flame_ext.errors import ConfigError
from flame_ext.model import routing
from flame_ext.model.experts import find_routers
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.model.routing import Routes
from tests.model.test_routing import balance_of
from tests.tiny_models import CONFIGS, MIXTURES, save_tiny


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config((CONFIGS | MIXTURES)[name])


def called_routers(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__.endswith("Router")]


def unnamed(model: PreTrainedModel, kind: Any = None) -> None:
    """Takes the architecture's names of its routers away, or has it name ``kind``."""
    for module in model.modules():
        if recorded := getattr(module, "_can_record_outputs", None):
            rest = {key: value for key, value in recorded.items() if key != "router_logits"}
            module._can_record_outputs = rest | ({"router_logits": kind} if kind else {})  # type: ignore[assignment]


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_found_by_name_and_without(name: str) -> None:
    model = on_meta(name)
    expected = called_routers(model)
    assert len(expected) == 4 if name == "qwen3-moe" else 2
    for _ in range(2):
        found, problem = find_routers(model)
        assert list(found) == expected and problem == ""
        unnamed(model)


def test_the_router_is_found_where_its_whole_block_is_named() -> None:
    model = on_meta("olmoe")
    unnamed(model, type(model.model.layers[0].mlp))
    assert (list(find_routers(model)[0]), find_routers(model)[1]) == (called_routers(model), "")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dense_model_has_no_routers_and_no_problem(name: str) -> None:
    assert find_routers(on_meta(name)) == ({}, "")


def test_what_can_not_be_observed_says_why() -> None:
    model = on_meta("olmoe")
    for layer in model.model.layers:
        layer.mlp.gate = nn.Linear(32, 8, bias=False, device="meta")
    unnamed(model)
    found, problem = find_routers(model)
    assert list(found) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert problem == "Linear does not return logits, weights and experts"
    for layer in model.model.layers:
        layer.mlp.gate = nn.Sequential(layer.mlp.gate)
    assert find_routers(model) == ({}, "none of its modules is known as a router")
    for layer in model.model.layers:  # one module for each expert, as in older architectures
        layer.mlp.experts = nn.ModuleList(nn.Linear(32, 32, device="meta") for _ in range(8))
    assert find_routers(model) == ({}, "none of its modules is known as a router")


def test_every_block_of_experts_has_to_have_a_router_that_is_known() -> None:
    model = on_meta("olmoe")
    block = model.model.layers[1].mlp
    block.gate = nn.Sequential(nn.Linear(32, 8, bias=False, device="meta"))
    assert find_routers(model)[1] == "none of the modules of model.layers.1.mlp is known as a router"


def test_a_mixture_without_known_routers_is_not_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "find_routers", lambda _model: ({}, "none is known"))
    args = HFModelArgs(hf_assets_path=str(save_tiny("olmoe", tmp_path)))
    model = build_hf_causal_lm(args)
    assert model.routing.problem == "none is known" and balance_of(model).routes() is None
    args.freeze_router = True
    with pytest.raises(ConfigError, match=r"^moe.freeze_router with OlmoeForCausalLM: none is known; leave it out$"):
        build_hf_causal_lm(args)


class Reversed(nn.Module):
    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, experts = logits.softmax(-1).topk(2)
        return experts, weights, logits


def test_a_router_may_return_its_logits_last() -> None:
    router, logits = Reversed(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = router(logits)
    router.register_forward_hook(lambda *args: routing._pass_on(*args, balanced=True))
    routes = Routes(1, 4, torch.device("cpu"))
    with routes.heard(0):
        found = router(logits)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert routes.counts.tolist() == [torch.bincount(expected[0].flatten(), minlength=4).tolist()]
    pull = torch.tensor([1.0, -2.0, 3.0, 0.5])
    (of_logits,) = torch.autograd.grad((logits.softmax(-1) * pull).sum(), logits)
    routing.set_pull(pull)
    (with_pull,) = torch.autograd.grad(found[1].sum(), logits, retain_graph=True)
    routing.set_pull(None)
    (without,) = torch.autograd.grad(found[1].sum(), logits)
    torch.testing.assert_close(with_pull - without, of_logits)
