"""Multi-token prediction against the architecture's own layer and a loop over positions, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import ParallelDims
from transformers import (
    ApertusConfig,
    AutoConfig,
    AutoModel,
    BertConfig,
    GPTNeoConfig,
    MambaConfig,
    PreTrainedConfig,
)

from flame_ext.heads import mtp
from flame_ext.heads.mtp import HEAD, Mtp, mtp_loss
from flame_ext.heads.registry import attach_heads
from flame_ext.heads.spec import HeadBatch
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.model.parallelize import parallelize_hf_causal_lm
from flame_ext.train import parse
from tests.layouts import COMPILE, PER_OP
from tests.ranks import DEBUG_TOML, TINY_OLMO
from tests.tiny_models import CONFIGS, MIXTURES


def arguments(name: str, kind: str, depth: int) -> dict[str, Any]:
    backbone = SimpleNamespace(config=CONFIGS[name])
    return HEAD.arguments(SimpleNamespace(kind=kind, depth=depth), backbone)


def randomised(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.detach().copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def naive(
    head: Mtp, states: Tensor, embedding: Tensor, unembedding: Tensor, batch: HeadBatch, documents: bool
) -> Tensor:
    """The mean of the heads' summed cross-entropies, one sequence or document at a time, by layers of transformers."""
    total = states.new_zeros(())
    for b in range(len(states)):
        starts = [0, *(t for t in range(1, states.shape[1]) if batch.doc_ids[b, t] != batch.doc_ids[b, t - 1])]
        ends = [*starts[1:], states.shape[1]]
        # Without document attention a layer reads across documents, whose ends still limit what is predicted.
        for begin, end in zip(starts, ends, strict=True) if documents else [(0, states.shape[1])]:
            tokens, state = batch.input_ids[b, begin:end], states[b, begin:end]
            for number, block in enumerate(head.blocks):
                layer: Any = AutoModel.from_config(
                    AutoConfig.for_model(**block.decoder.config.to_dict()), dtype=torch.float64
                )
                layer.set_input_embeddings(nn.Identity())
                given = state
                if head.kind == "sequential":
                    ahead = embedding[tokens.roll(-1 - number)]  # the last ones are of no counted position
                    both = [block.state_norm(given), block.token_norm(ahead)]
                    given = torch.cat(both, dim=-1) @ block.proj.weight.T
                parameters = dict(block.decoder.named_parameters())
                output = torch.func.functional_call(layer, parameters, kwargs={"inputs_embeds": given[None]})
                made = output.last_hidden_state[0]
                for t in range(len(tokens) - 2 - number):
                    target = t + 2 + number
                    if batch.doc_ids[b, begin + target] == batch.doc_ids[b, begin + t]:
                        logits = made[t] @ unembedding.T
                        total = total + (logits.logsumexp(0) - logits[tokens[target]]) / len(head.blocks)
                state = made if head.kind == "sequential" else state
    return total


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", ["parallel", "sequential"])
@pytest.mark.parametrize("name", ["olmo2", "qwen3-qk-norm", "gpt2-learned-positions"])
def test_loss_and_gradients_are_the_naive_ones(name: str, kind: str, documents: bool) -> None:
    torch.manual_seed(0)
    head, width, vocab_size = Mtp(**arguments(name, kind, 2)), CONFIGS[name].hidden_size, 11
    randomised(head, 1)
    embedding, output = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size, bias=False)
    input_ids = torch.randint(0, vocab_size, (2, 9))
    doc_ids = torch.tensor([[0] * 9, [0, 0, 0, 0, 1, 1, 1, 2, 2]])
    states = torch.randn(2, 9, width).requires_grad_()
    config = SimpleNamespace(data=SimpleNamespace(document_attention=documents))
    batch = HeadBatch(
        states, torch.empty(2, 9, vocab_size), input_ids, input_ids, doc_ids, 7.0, config, embedding, output
    )
    chunks: list[int] = []
    output.register_forward_hook(lambda _module, _args, logits: chunks.append(logits.shape[1]))
    with mock.patch.object(mtp, "chunk_elements", return_value=10 * vocab_size):
        loss = mtp_loss(head, batch)["loss_mtp"]
        assert chunks == [10, 10, 10, 6], "logits exist for a chunk of the states of both heads"
        loss.backward()
    assert len(chunks) == 8, "they are computed again"

    exact = Mtp(**arguments(name, kind, 2)).double()
    exact.load_state_dict({key: tensor.double() for key, tensor in head.state_dict().items()})
    exact_states = states.detach().double().requires_grad_()
    unembedding = output.weight.detach().double().requires_grad_()
    expected = naive(exact, exact_states, embedding.weight.detach().double(), unembedding, batch, documents) / 7
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = {"states": states, "output": output.weight, **dict(head.named_parameters())}
    others = {"states": exact_states, "output": unembedding, **dict(exact.named_parameters())}
    for key, tensor in found.items():
        scale = others[key].grad.abs().max().item()
        torch.testing.assert_close(tensor.grad, others[key].grad.float(), rtol=1e-4, atol=1e-5 * scale, msg=key)
    assert embedding.weight.grad is None, "it stays the language model's"


@pytest.mark.parametrize("name", ["olmo-tied", "gemma2", "gpt2-learned-positions"])
def test_new_layers_begin_as_their_architecture_begins_norms(name: str) -> None:
    """Gemma's have weights around 0, to which they add 1; a layer that begins at 1 would be twice as large."""
    torch.manual_seed(0)
    fresh = AutoModel.from_config(AutoConfig.for_model(**arguments(name, "parallel", 1)["decoder"]))
    inits = Mtp(**arguments(name, "parallel", 1)).parameter_inits()
    for key, parameter in fresh.named_parameters():
        if "norm" in key.lower() or "ln_" in key:
            assert inits[f"blocks.0.decoder.{key}"].value == parameter.unique().item(), key
        elif parameter.ndim == 2 and f"blocks.0.decoder.{key}" in inits:
            inputs = parameter.shape[0 if "c_" in key else 1]  # GPT-2's have a column for each output
            assert math.isclose(inits[f"blocks.0.decoder.{key}"].bound, math.sqrt(3 / inputs)), key


def test_the_backbone_has_no_part_in_the_head() -> None:
    head = Mtp(**arguments("olmo2", "parallel", 1))
    assert not any(parameter.shape[0] == CONFIGS["olmo2"].vocab_size for parameter in head.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]]), "cannot be built"),
        (MambaConfig(num_hidden_layers=2, hidden_size=32), "cannot be built"),
        (ApertusConfig(num_hidden_layers=2, hidden_size=32), "buffers that no source holds"),
        (BertConfig(num_hidden_layers=2, is_decoder=True), "also has 'pooler.dense.weight'"),
    ],
)
def test_an_architecture_whose_layer_is_no_head_is_refused(config: PreTrainedConfig, message: str) -> None:
    (problem,) = HEAD.check_model(None, config)
    assert (
        message in problem and problem.startswith(f"mtp.enable with {config.model_type!r}") and "token_order" in problem
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_architectures_that_are_tested_are_not(name: str) -> None:
    assert not list(HEAD.check_model(None, CONFIGS[name]))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_unless_its_first_layer_is_dense(name: str) -> None:
    problems = "; ".join(HEAD.check_model(None, MIXTURES[name]))
    assert ("mixtures of experts" in problems) == (name not in ("deepseek-v3", "glm4-moe")) == bool(problems)


def test_its_layers_are_treated_as_those_of_the_backbone() -> None:
    """Checkpointed, compiled and sharded by themselves; the output embedding is the root's, and gathered once for all chunks."""
    given = [f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={TINY_OLMO}", "--mtp.enable", "--mtp.depth=2"]
    config = parse([*given, *COMPILE, *PER_OP])
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(TINY_OLMO)))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # not tied
    attach_heads(model, config)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        degrees = dict.fromkeys(("dp_replicate", "cp", "tp", "pp", "ep", "etp"), 1)
        parallelize_hf_causal_lm(model, ParallelDims(**degrees, dp_shard=2, world_size=2), config)
    finally:
        dist.destroy_process_group()
    layers = [layer for layers in model.layer_lists for layer in layers]
    assert len(layers) == model.config.num_hidden_layers + 2
    for layer in layers:
        assert isinstance(layer, OptimizedModule) and isinstance(layer._orig_mod, CheckpointWrapper)
        assert isinstance(layer, FSDPModule)
    assert isinstance(model.mtp, FSDPModule) and not isinstance(model.lm_head, FSDPModule)
