"""Pooled summaries against their definitions, what reaches them, and the action layer's scores."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_ext.heads import action_layer
from flame_ext.heads.action_layer import ActionLayer
from flame_ext.heads.future_encoder import AnticausalEncoder, build_future_encoder
from flame_ext.heads.pooled_encoder import PooledEncoder
from flame_ext.objective.masks import has_future
from flame_ext.seeding.new_parameters import initialise

METHODS = ["mean", "max", "attention", "query"]
LEARNED = ("attention", "query")
LENGTH, WIDTH = 12, 8
DOC_IDS = torch.tensor([[0] * 7 + [1] * 5, [0] * LENGTH])


def encoder_with_weights(method: str, future_k: int) -> PooledEncoder:
    encoder = PooledEncoder(method, future_k, WIDTH, num_heads=2)
    initialise(dict(encoder.named_parameters()), encoder.parameter_inits(), rng_seed=0)
    return encoder


def random_states(seed: int = 0) -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def window(t: int, doc_ids: Tensor, future_k: int) -> list[int]:
    """The positions that the summary of t is of."""
    last = LENGTH - 1 if future_k == 0 else min(LENGTH - 1, t + future_k)
    return [j for j in range(t + 1, last + 1) if doc_ids[j] == doc_ids[t]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("future_k", [0, 1, 4, 5])
def test_a_state_reaches_the_summaries_before_it_and_no_other(method: str, future_k: int) -> None:
    encoder, states = encoder_with_weights(method, future_k), random_states()
    before = encoder(states, DOC_IDS)
    assert torch.equal(before.valid_mask, has_future(DOC_IDS)) and torch.isfinite(before.states).all()
    for j in range(LENGTH):
        changed = states.clone()
        # Beyond every maximum; attention must not be drawn to it altogether, nor turned away.
        changed[0, j] += 100.0 if method == "max" else torch.linspace(-1, 1, WIDTH)
        differs = (encoder(changed, DOC_IDS).states != before.states).any(dim=-1)
        assert not differs[1].any(), "the other sequence"
        for t in range(LENGTH):
            read = window(t, DOC_IDS[0], future_k)
            asked = [t] if method == "query" and len(read) > 1 else []  # of one position there is nothing to choose
            assert differs[0, t].item() == (j in read + asked), (t, j)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("future_k", [0, 1, 4, 5])
def test_summaries_are_their_definitions(method: str, future_k: int) -> None:
    encoder, states = encoder_with_weights(method, future_k), random_states()
    result = encoder(states, DOC_IDS)
    assert result.states.dtype == torch.float32
    for b in range(2):
        for t in range(LENGTH):
            positions = window(t, DOC_IDS[b], future_k)
            assert result.valid_mask[b, t].item() == bool(positions)
            if not positions:
                expected = torch.zeros(WIDTH)
            elif method == "mean":
                expected = states[b, positions].mean(dim=0)
            elif method == "max":
                expected = states[b, positions].amax(dim=0)
            else:
                half = WIDTH // 2
                query = encoder.q_proj.weight @ states[b, t if method == "query" else t + 1]
                keys, values = (states[b, positions] @ p.weight.T for p in (encoder.k_proj, encoder.v_proj))
                expected = torch.cat(
                    [
                        torch.softmax(keys[:, head] @ query[head] / half**0.5, dim=0) @ values[:, head]
                        for head in (slice(0, half), slice(half, WIDTH))
                    ]
                )
            torch.testing.assert_close(result.states[b, t], expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("future_k", [0, 3])
def test_documents_of_one_token_have_no_future_and_no_nan(method: str, future_k: int) -> None:
    encoder, states = encoder_with_weights(method, future_k), random_states().requires_grad_()
    result = encoder(states, torch.arange(LENGTH).expand(2, -1))
    assert not result.valid_mask.any() and torch.equal(result.states, torch.zeros_like(states))
    (result.states.square().sum() + result.states.sum()).backward()
    for tensor in (states, *encoder.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_finite_and_reach_the_states(method: str) -> None:
    encoder, states = encoder_with_weights(method, 4), random_states().requires_grad_()
    encoder(states, DOC_IDS).states.square().sum().backward()
    for tensor in (states, *encoder.parameters()):
        assert torch.isfinite(tensor.grad).all() and tensor.grad.any()
    if method != "query":
        assert not states.grad[0, 0].any() and not states.grad[0, 7].any(), "the first of a document is nobody's future"


@pytest.mark.parametrize("method", METHODS)
def test_summaries_of_bfloat16_states(method: str) -> None:
    encoder = encoder_with_weights(method, 4).to(torch.bfloat16)
    states = random_states().to(torch.bfloat16)
    result = encoder(states, DOC_IDS).states
    assert result.dtype == (torch.bfloat16 if method in LEARNED else torch.float32)
    if method not in LEARNED:
        torch.testing.assert_close(result, encoder(states.float(), DOC_IDS).states, rtol=0, atol=0)


def test_build_by_name() -> None:
    for method in METHODS:
        encoder = build_future_encoder(method, 3, WIDTH, 4)
        assert isinstance(encoder, PooledEncoder) and (encoder.method, encoder.future_k) == (method, 3)
        assert encoder.num_heads == 4
        names = {name for name, _ in encoder.named_parameters()}
        assert set(encoder.parameter_inits()) == names and bool(names) == (method in LEARNED)
    assert build_future_encoder("attention", 0, WIDTH, 3).num_heads == 1
    windows = {"full_attention": 0, "sliding_attention": 16}
    encoder = build_future_encoder("anticausal", 3, WIDTH, 4, windows)
    assert isinstance(encoder, AnticausalEncoder) and (encoder.future_k, encoder.windows) == (3, windows)
    assert encoder.parameter_inits() == {} and not list(encoder.parameters())


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="'mean', 'max', 'attention', 'query', got 'median'"):
        build_future_encoder("median", 0, WIDTH, 2)


LAYERS = [(head_type, rms) for head_type in ("mlp", "tower") for rms in (True, False)]


Inputs = tuple[Tensor, Tensor, Tensor, nn.Embedding]


def layer_and_inputs(head_type: str, use_rms_norm: bool) -> tuple[ActionLayer, Inputs]:
    layer = ActionLayer(WIDTH, head_type, use_rms_norm, ffn_hidden_size=12)
    inits = layer.parameter_inits()
    assert set(inits) == {name for name, _ in layer.named_parameters()}
    initialise(dict(layer.named_parameters()), inits, rng_seed=0)
    generator = torch.Generator().manual_seed(0)
    states, table, summaries = (torch.randn(rows, WIDTH, generator=generator) for rows in (11, 20, 11))
    token_ids = torch.randint(20, (11, 4), generator=generator)
    embed = nn.Embedding.from_pretrained(table, freeze=False)
    return layer, (states.requires_grad_(), token_ids, F.normalize(summaries, dim=-1), embed)


@pytest.mark.parametrize(("head_type", "use_rms_norm"), LAYERS)
def test_scores_are_cosines_of_predictions_and_summaries(head_type: str, use_rms_norm: bool) -> None:
    layer, (states, token_ids, summaries, embed) = layer_and_inputs(head_type, use_rms_norm)
    norm = torch.nn.RMSNorm if use_rms_norm else torch.nn.LayerNorm
    assert isinstance(layer.state_norm, norm) and isinstance(layer.action_norm, norm)
    scores, predictions = layer(states, token_ids, summaries, embed)
    assert scores.shape == (11, 4) and predictions.shape == (11, WIDTH)
    assert scores.dtype == predictions.dtype == torch.float32
    for n in range(11):
        for c in range(4):
            prediction = layer.predict(states[n], embed(token_ids[n, c : c + 1]))[0]
            torch.testing.assert_close(prediction.norm(), torch.tensor(1.0))
            torch.testing.assert_close(scores[n, c], torch.cosine_similarity(prediction, summaries[n], dim=0))
            if c == 0:
                torch.testing.assert_close(predictions[n], prediction)
    with torch.no_grad():
        assert all(map(torch.equal, layer(states, token_ids, summaries, embed), (scores, predictions)))


def test_mlp_is_one_linear_map_of_both_side_by_side() -> None:
    layer, (states, token_ids, _, embed) = layer_and_inputs("mlp", False)
    inputs = (states[:, None].expand(-1, 4, -1), embed(token_ids))
    weight = torch.cat([layer.state_proj.weight, layer.action_proj.weight], dim=1)
    hidden = torch.cat([F.layer_norm(x, (WIDTH,)) for x in inputs], dim=-1)
    expected = F.normalize(layer.out_proj(F.gelu(F.linear(hidden, weight, layer.state_proj.bias))), dim=-1)
    torch.testing.assert_close(layer.predict(states, embed(token_ids)), expected)


@pytest.mark.parametrize(("head_type", "use_rms_norm"), LAYERS)
@pytest.mark.parametrize("elements", [1, 4 * 12 * 3])
def test_chunks_change_nothing_and_alone_are_in_memory(
    monkeypatch: pytest.MonkeyPatch, head_type: str, use_rms_norm: bool, elements: int
) -> None:
    results = []
    for chunk in (1 << 24, elements):
        monkeypatch.setattr(action_layer, "chunk_elements", lambda _device, chunk=chunk: chunk)
        layer, (states, token_ids, summaries, embed) = layer_and_inputs(head_type, use_rms_norm)
        looked_up: list[weakref.ref[Tensor]] = []

        def count(_module: object, inputs: tuple[Tensor], result: Tensor, looked_up: Any = looked_up) -> None:
            assert all(earlier() is None for earlier in looked_up), "an earlier chunk's embeddings are still in memory"
            looked_up.append(weakref.ref(result))

        embed.register_forward_hook(count)
        scores, predictions = layer(states, token_ids, summaries, embed)
        chunks = 1 if chunk == 1 << 24 else 11 if chunk == 1 else 4
        assert len(looked_up) == chunks
        (scores.sin().sum() + predictions[:, 0].sum()).backward()
        assert len(looked_up) == 2 * chunks
        assert embed.weight.grad is None and all(parameter.grad is not None for parameter in layer.parameters())
        results.append((scores, predictions, states.grad, *(parameter.grad for parameter in layer.parameters())))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_bfloat16_layer_scores_in_float32() -> None:
    layer, (states, token_ids, summaries, embed) = layer_and_inputs("tower", True)
    expected, _ = layer(states, token_ids, summaries, embed)
    scores, predictions = layer.bfloat16()(states.bfloat16(), token_ids, summaries, embed.bfloat16())
    assert scores.dtype == predictions.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.1)


def test_unknown_head_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'mlp', 'tower', got 'deep'"):
        ActionLayer(WIDTH, "deep", True, 12)
