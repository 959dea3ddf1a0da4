"""The operations of heads that MFU counts, against those that torch's counter sees in a forward of their losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flame_ext.heads.registry import attach_heads, enabled_heads, job_config_class
from flame_ext.heads.spec import HeadBatch
from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, build_hf_causal_lm
from tests.flops import flop_counter
from tests.ranks import TINY_OLMO

LENGTH, TOKENS, TOP_K, STEPS, DEPTH = 24, 48, 3, 2, 2


def vectors(module: nn.Module) -> int:
    """The parameters of norms and biases, which multiply as well but are in no matrix product."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 1)


def with_head(name: str, **options: Any) -> tuple[HFCausalLM, Any]:
    config = job_config_class()()
    config.training.seq_len = LENGTH
    for option, value in ({"enable": True} | options).items():
        setattr(getattr(config, name), option, value)
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(TINY_OLMO)))
    alone = model.model_args.get_nparams_and_flops(model, LENGTH)
    attach_heads(model, config)
    with_it = model.model_args.get_nparams_and_flops(model, LENGTH)
    head, multiplications = model.get_submodule(name), model.heads[name].multiplications
    assert with_it[0] - alone[0] == sum(p.numel() for p in head.parameters())
    assert with_it[1] - alone[1] == 6 * multiplications, "of a forward and twice as many of a backward"
    model.to_empty(device="cpu")
    model.init_weights()
    for parameter in model.parameters():
        parameter.detach().normal_(std=0.02)
    return model, config


@pytest.mark.parametrize(
    ("name", "options", "times"),
    [
        ("mtp", {"depth": DEPTH}, 1),
        ("mtp", {"depth": DEPTH, "kind": "sequential"}, 1),
        ("token_order", {}, 1),
        ("future_bag", {}, 1),
        ("next_latent", {"steps": STEPS}, STEPS),
    ],
)
def test_a_loss_multiplies_as_often_as_it_says(name: str, options: dict[str, Any], times: int) -> None:
    model, config = with_head(name, **options)
    head, spec, tokens = model.get_submodule(name), enabled_heads(config)[name], torch.randint(0, 99, (2, LENGTH))

    def counted(logits: torch.Tensor, states: torch.Tensor, unembed: Any) -> int:
        documents = torch.zeros_like(tokens)
        batch = HeadBatch(states, logits, tokens, tokens, documents, 1.0, config, model.get_input_embeddings(), unembed)
        with flop_counter() as flops, sdpa_kernel(SDPBackend.MATH):
            spec.loss(head, batch)
        return flops.get_total_flops()

    expected = model.heads[name].multiplications - times * vectors(head)
    assert model(tokens, compute=counted) == 2 * TOKENS * expected


@pytest.mark.parametrize("head_type", ["mlp", "tower"])
def test_candidates_multiply_as_often_as_it_says(head_type: str) -> None:
    model, _ = with_head("action_layer", head_type=head_type, top_k=TOP_K)
    head: Any = model.get_submodule("action_layer")
    states, once = torch.randn(TOKENS, model.config.hidden_size), vectors(head.state_norm) + vectors(head.state_proj)
    with flop_counter() as flops:
        head(states, torch.randint(99, (TOKENS, 1 + TOP_K)), states, model.get_input_embeddings())
    expected = model.heads["action_layer"].multiplications - once - (1 + TOP_K) * (vectors(head) - once)
    assert flops.get_total_flops() == 2 * TOKENS * expected


def test_a_head_that_rests_multiplies_nothing() -> None:
    model, _ = with_head("token_order", loss_weight=0.0)
    assert model.heads["token_order"].multiplications == 0
