"""What routers do in a forward, and the gradient of their loss, against transformers' own functions."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from transformers import AutoModelForCausalLM
from transformers.models.granitemoe import modeling_granitemoe as granitemoe

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.host.names import op_sac_save_list
from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, LossOutput, build_hf_causal_lm
from flame_ext.model.routing import Routes
from flame_ext.preflight.moe import _compiles_grouped_mm
from flame_ext.step.balance import Balance, load_figures
from tests.ranks import TINY_OLMO
from tests.tiny_models import save_tiny

COEFFICIENT = 0.3
BALANCED = ("olmoe", "qwen3-moe", "qwen2-moe", "mixtral", "granite-moe", "gpt-oss")


def built(folder: Path, **options: Any) -> tuple[HFCausalLM, nn.Module]:
    """The model of this package with the weights of ``folder``, and transformers' own."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    model: Any = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(folder), **options))
    model.to_empty(device="cpu")
    model.init_weights(torch.device("cpu"))
    model.load_state_dict(reference.state_dict(), strict=False)
    return model.train(), reference


def balance_of(model: HFCausalLM, **options: Any) -> Balance:
    config, dims = FlameJobConfig(), SimpleNamespace(get_optional_mesh=lambda _name: None)
    for name, value in options.items():
        setattr(config.moe, name, value)
    return Balance(SimpleNamespace(parts=[model], model=model, group=None), config, dims, torch.device("cpu"))


def plan_of(tokens: Tensor, microbatches: int) -> Any:
    return SimpleNamespace(microbatches=list(tokens.chunk(microbatches)))


def count(model: HFCausalLM, tokens: Tensor, routes: Routes) -> None:
    with torch.no_grad():
        model(tokens, output="hidden_states", routes=routes)


def step(model: HFCausalLM, balance: Balance, tokens: Tensor, microbatches: int = 1) -> float:
    """Gradients of the mean cross-entropy and the routers' loss, as the trainer makes them; returns the routers' loss."""
    plan = plan_of(tokens, microbatches)
    balance.begin(plan, lambda part, routes: count(model, part, routes))
    for part in plan.microbatches:
        routes = balance.routes()

        def compute(logits: Tensor, *_: Any, part: Tensor = part) -> LossOutput:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            return LossOutput(loss / tokens[:, 1:].numel(), {})

        loss = model(part, compute=compute, routes=routes).loss
        balance.add(routes)
        loss.backward()
    return float(balance.parts()["loss_router"])


def logits_of_routers(model: nn.Module) -> list[Tensor]:
    """Returns a list that the next forward fills, wherever a router returns them."""
    found: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(
                lambda m, _i, output: found.extend(t for t in output if t.shape[-1] == len(m.weight))
            )
    return found


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    expected = {name: p.grad for name, p in reference.named_parameters()}
    found = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 264, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("name", BALANCED)
def test_loss_and_gradients_are_those_of_transformers(
    tmp_path: Path, tokens: Tensor, name: str, microbatches: int
) -> None:
    model, reference = built(save_tiny(name, tmp_path), aux_loss_coef=COEFFICIENT)
    reference.router_aux_loss_coef = COEFFICIENT
    logits = logits_of_routers(reference)
    recorded = "router_logits" in reference._can_record_outputs
    expected = reference(tokens, labels=tokens, output_router_logits=recorded)
    aux_loss = expected.aux_loss
    if not recorded:  # Granite-MoE's loss fails for lack of them in transformers 5.17
        aux_loss = granitemoe.load_balancing_loss_func(tuple(logits), 4, 2)
        expected.loss = expected.loss + COEFFICIENT * aux_loss
    expected.loss.backward()
    balance = balance_of(model)
    loss = step(model, balance, tokens, microbatches)
    assert loss == pytest.approx(aux_loss.item(), rel=1e-6)
    assert float(*balance.weighted()) == pytest.approx(COEFFICIENT * loss, rel=1e-6)
    assert_same_gradients(model, reference)
    chosen = torch.stack([logits.topk(2).indices for logits in logits])
    naive = torch.stack([(chosen == expert).sum((1, 2)) for expert in range(balance.counts().shape[1])], dim=1)
    assert torch.equal(balance.counts(), naive)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_recomputed_layers_count_once(tmp_path: Path, tokens: Tensor, mode: str, microbatches: int) -> None:
    model, reference = built(save_tiny("olmoe", tmp_path), aux_loss_coef=COEFFICIENT)
    reference.router_aux_loss_coef = COEFFICIENT
    reference(tokens, labels=tokens, output_router_logits=True).loss.backward()
    options = ActivationCheckpoint(mode=mode, selective_ac_option="op")
    apply_ac(model, options, model_compile_enabled=False, op_sac_save_list=op_sac_save_list, base_folder=str(tmp_path))
    balance = balance_of(model)
    step(model, balance, tokens, microbatches)
    assert_same_gradients(model, reference)
    assert balance.counts().sum() == 2 * 2 * tokens.numel(), "two layers, two experts for each token"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_have_the_same_gradients(tmp_path: Path, tokens: Tensor, checkpointed: bool) -> None:
    how = "auto" if _compiles_grouped_mm() else "batched_mm"
    options = {"aux_loss_coef": COEFFICIENT, "experts_implementation": how}
    model, reference = built(save_tiny("olmoe", tmp_path), **options)
    reference.router_aux_loss_coef = COEFFICIENT
    reference(tokens, labels=tokens, output_router_logits=True).loss.backward()
    if checkpointed:
        options = ActivationCheckpoint(mode="full")
        apply_ac(model, options, model_compile_enabled=True, op_sac_save_list=op_sac_save_list, base_folder="")
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    balance = balance_of(model)
    step(model, balance, tokens, microbatches=2)
    assert_same_gradients(model, reference)
    assert balance.counts().sum() == 2 * 2 * tokens.numel()


def test_means_over_a_micro_batch(tmp_path: Path, tokens: Tensor) -> None:
    model, reference = built(save_tiny("olmoe", tmp_path), aux_loss_coef=COEFFICIENT)
    balance = balance_of(model, balance_over="micro_batch")
    loss = step(model, balance, tokens, microbatches=2)
    losses = [reference(part, output_router_logits=True).aux_loss.item() for part in tokens.chunk(2)]
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert balance.counts().sum() == 2 * 2 * tokens.numel()


def test_forwards_without_routes_count_nothing(tmp_path: Path, tokens: Tensor) -> None:
    model, _ = built(save_tiny("olmoe", tmp_path), aux_loss_coef=COEFFICIENT)
    balance = balance_of(model)
    first = step(model, balance, tokens)
    counts = balance.counts().clone()
    with torch.no_grad():
        model(tokens.flip(1), attention_mask=torch.ones(4, 1, 32, 32, dtype=torch.bool).triu(1), output="hidden_states")
    assert torch.equal(balance.counts(), counts) and float(balance.parts()["loss_router"]) == first


def test_a_dense_model_has_neither_routes_nor_options_of_routers() -> None:
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(TINY_OLMO)))
    assert "router" not in model.config.to_json_string()
    balance = balance_of(model)
    balance.begin(plan_of(torch.zeros(2, 4), 2), lambda *_: pytest.fail("nothing is to be counted"))
    assert balance.routes() is None and balance.weighted() == [] and balance.parts() == {}


def test_figures_of_the_load_are_those_of_a_naive_count() -> None:
    counts = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]])
    figures = load_figures(counts)
    assert figures["router_unused"] == 2 / 8 and figures["router_largest_share"] == 6 / 8
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert float(figures["router_entropy"]) == pytest.approx((entropy + 1) / 2)


def test_biases_move_towards_an_even_load(tmp_path: Path, tokens: Tensor) -> None:
    model, reference = built(save_tiny("deepseek-v3", tmp_path))
    balance = balance_of(model, bias_update_rate=0.01)
    routers = [layer.mlp.gate for layer in model.layers[1:]]
    before = [router.e_score_correction_bias.clone() for router in routers]
    chosen: list[Tensor] = []
    for layer in reference.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))
    reference(tokens)
    balance.begin(plan_of(tokens, 1), lambda *_: None)
    routes = balance.routes()
    model(tokens, routes=routes)
    balance.add(routes)
    balance.end(updated=False)
    assert all(torch.equal(router.e_score_correction_bias, old) for router, old in zip(routers, before, strict=True))
    balance.end(updated=True)
    for router, old, experts in zip(routers, before, chosen, strict=True):
        load = torch.bincount(experts.flatten(), minlength=8).float()
        torch.testing.assert_close(router.e_score_correction_bias - old, 0.01 * torch.sign(load.mean() - load))


def test_frozen_routers_have_no_gradient(tmp_path: Path, tokens: Tensor) -> None:
    model, _ = built(save_tiny("gpt-oss", tmp_path), aux_loss_coef=0.0, freeze_router=True)
    model(tokens).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == [f"model.layers.{i}.mlp.router.{name}" for i in range(2) for name in ("weight", "bias")]


@pytest.mark.parametrize(
    ("name", "active"),
    [  # by hand: attention, then the experts of a token, then what every token goes through
        ("olmoe", 2 * (32 * (32 + 16 + 16 + 32) + 2 * 3 * 24 * 32 + 8 * 32)),
        ("mixtral", 2 * (32 * (32 + 16 + 16 + 32) + 2 * 3 * 24 * 32 + 4 * 32)),
        ("qwen2-moe", 2 * (32 * (32 + 16 + 16 + 32) + 64 + 2 * 3 * 24 * 32 + 8 * 32 + 3 * 40 * 32 + 32)),
    ],
)
def test_operations_are_those_of_the_experts_of_a_token(tmp_path: Path, name: str, active: int) -> None:
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(save_tiny(name, tmp_path))))
    norms = sum(p.numel() for key, p in model.named_parameters() if "norm" in key)
    nparams, flops = model.model_args.get_nparams_and_flops(model, seq_len=16)
    assert nparams == sum(p.numel() for p in model.parameters())
    assert flops == 6 * (active + norms + 264 * 32) + 12 * 2 * 32 * 16


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("deepseek-v3", {"aux_loss_coef": 0.1}, "defines no auxiliary loss"),
        ("dense", {"aux_loss_coef": 0.1}, "it is no mixture of experts"),
        ("dense", {"freeze_router": True}, "moe.freeze_router"),
        ("dense", {"experts_implementation": "grouped_mm"}, "experts implementation"),
    ],
)
def test_what_an_architecture_lacks_is_refused(tmp_path: Path, name: str, options: Any, words: str) -> None:
    folder = TINY_OLMO if name == "dense" else save_tiny(name, tmp_path)
    with pytest.raises(ConfigError, match=words):
        build_hf_causal_lm(HFModelArgs(hf_assets_path=str(folder), **options))
