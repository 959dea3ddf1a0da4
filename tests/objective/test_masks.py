"""Masks against their definition, position by position; and no leak through the real backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

from flame_ext.heads.future_encoder import AnticausalEncoder
from flame_ext.heads.spec import FutureSummaries
from flame_ext.model.attention import MaskForm, attention_windows
from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, build_hf_causal_lm
from flame_ext.objective import masks
from flame_ext.objective.masks import (
    anticausal_block_mask,
    anticausal_mask,
    anticausal_window_mask,
    doc_ids_from_eos,
    has_future,
    pair_mask,
)
from tests.tiny_models import save_tiny

BATCHES = st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3)
LENGTH = 64  # longer than the windows of three layers together


@given(BATCHES, st.integers(0, 10), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_masks_are_their_definitions(tokens: list[list[int]], future_k: int, shift: int) -> None:
    input_ids = torch.tensor(tokens)
    docs = doc_ids_from_eos(input_ids, eos_id=0)
    mask, unbounded = anticausal_mask(9, future_k, docs), anticausal_mask(9, future_k)
    valid = has_future(docs)
    pairs = pair_mask(valid, docs, shift)
    for b, row in enumerate(tokens):
        expected_doc = [sum(token == 0 for token in row[:i]) for i in range(9)]
        assert docs[b].tolist() == expected_doc
        for i in range(9):
            for j in range(9):
                near = i < j and (future_k == 0 or j <= i + future_k)
                assert unbounded[0, 0, i, j].item() == near
                assert mask[b, 0, i, j].item() == (near and expected_doc[i] == expected_doc[j])
            assert valid[b, i].item() == mask[b, 0, i].any().item()
            target = i + shift
            assert pairs[b, i].item() == (
                target < 9 and expected_doc[target] == expected_doc[i] and valid[b, target].item()
            )


def test_shift_zero_is_refused() -> None:
    docs = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="shift must be >= 1"):
        pair_mask(has_future(docs), docs, 0)


@given(BATCHES, st.integers(0, 10), st.booleans())
@settings(max_examples=60, deadline=None)
def test_block_mask_is_the_dense_mask(tokens: list[list[int]], future_k: int, documents: bool) -> None:
    docs = doc_ids_from_eos(torch.tensor(tokens), eos_id=0) if documents else None
    block_mask = anticausal_block_mask(9, future_k, docs)
    b, i, j = (torch.arange(n) for n in (len(tokens), 9, 9))
    allowed = block_mask.mask_mod(b[:, None, None], torch.tensor(0), i[None, :, None], j[None, None, :])
    expected = anticausal_mask(9, future_k, docs)[:, 0].expand(len(tokens), 9, 9)
    assert torch.equal(allowed.expand_as(expected), expected)


@given(BATCHES, st.integers(1, 6), st.booleans(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_window_mask_is_the_dense_mask(tokens: list[list[int]], future_k: int, documents: bool, min_block: int) -> None:
    docs = doc_ids_from_eos(torch.tensor(tokens), eos_id=0) if documents else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_MIN_BLOCK", min_block)
        blocks = anticausal_window_mask(9, future_k, docs)
    size = max(future_k, min_block)
    assert blocks.shape == (len(tokens) if documents else 1, -(-9 // size), size, size + future_k)
    dense = torch.zeros(len(blocks), 9, 9, dtype=torch.bool)
    for b, n, i, j in blocks.nonzero().tolist():
        dense[b, n * size + i, n * size + j] = True  # out of bounds if anything beyond the end is allowed
    assert torch.equal(dense, anticausal_mask(9, future_k, docs)[:, 0])


@pytest.mark.parametrize("future_k", [0, 5, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_flex_attention_skips_no_block_that_counts(future_k: int, documents: bool) -> None:
    """Over several blocks of 128, and documents that end inside of them."""
    length = 300
    docs = (torch.arange(2 * length).view(2, length) % 130 == 0).long().cumsum(dim=1) if documents else None
    query, key, value = torch.randn(3, 2, 1, length, 8, generator=torch.Generator().manual_seed(0))
    mask, block_mask = (
        anticausal_mask(length, future_k, docs),
        anticausal_block_mask(length, future_k, docs),
    )
    # Which blocks are left out, since the kernels that leave them out do not run here.
    expected = torch.nn.functional.pad(mask, (0, 384 - length, 0, 384 - length))
    expected = expected.unflatten(3, (3, 128)).unflatten(2, (3, 128)).any(dim=5).any(dim=3)
    assert torch.equal(block_mask.to_dense().bool(), expected) and not expected.all()
    with torch.no_grad():
        actual = flex_attention(query, key, value, block_mask=block_mask)
        wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(actual, wanted)


def random_model(folder: Path) -> HFCausalLM:
    """With weights so large that every token matters to all that may see it."""
    with torch.device("meta"):
        model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(folder)))
    model.to_empty(device="cpu")
    model.init_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def total_reach(model: HFCausalLM, future_k: int) -> int:
    """How far ahead a summary looks: each layer looks further by its own window, or by future_k if that is less."""
    layer_types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    assert len(layer_types) == 3
    reach = 0
    for kind in layer_types:
        window = model.config.sliding_window - 1 if kind == "sliding_attention" else LENGTH
        reach += min(window, future_k or LENGTH)
    return reach


@torch.no_grad()
def summarise(
    encoder: AnticausalEncoder, model: HFCausalLM, tokens: Tensor, doc_ids: Tensor | None, form: MaskForm = "dense"
) -> FutureSummaries:
    """As a teacher does: the states of a forward under the encoder's mask."""
    mask = encoder.attention_mask(tokens, doc_ids, form)
    return encoder.summaries(model(tokens, attention_mask=mask, output="hidden_states"), tokens, doc_ids)


def check_reach(model: HFCausalLM, future_k: int, form: MaskForm = "dense") -> None:
    tokens = torch.randint(2, 264, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[0, 13] = 0  # the end of the first document
    docs = doc_ids_from_eos(tokens, 0)
    encoder = AnticausalEncoder(future_k, attention_windows(model.config))
    reach = total_reach(model, future_k)
    for doc_ids in (None, docs):
        before = summarise(encoder, model, tokens, doc_ids, form)
        assert torch.isfinite(before.states).all()
        assert torch.equal(before.valid_mask, has_future(torch.zeros_like(tokens) if doc_ids is None else docs))
        for j in (0, 5, 13, 20, 31, 50, LENGTH - 1):
            changed = tokens.clone()
            changed[0, j] = 100 if tokens[0, j] != 100 else 101
            differs = (before.states != summarise(encoder, model, changed, doc_ids, form).states).any(dim=-1)
            assert not differs[1].any(), "the other sequence"
            for t in range(LENGTH):
                same_document = doc_ids is None or docs[0, t] == docs[0, j]
                may_see = t <= j <= t + reach and same_document
                assert differs[0, t].item() == may_see, (t, j)


@pytest.mark.parametrize(
    ("name", "future_k"),
    [
        *((name, future_k) for name in ("olmo-tied", "olmo2", "llama-scaled-rope") for future_k in (0, 4)),
        # Sliding windows of 16: in some layers (Gemma-2), in all of them (OLMo-3); wider and narrower than future_k.
        *((name, future_k) for name in ("gemma2", "olmo3-sliding-window") for future_k in (0, 4, 18)),
    ],
)
def test_no_token_reaches_a_summary_of_its_future(tmp_path: Path, name: str, future_k: int) -> None:
    """Perturb one token: summaries after it and in other documents are bit-unchanged, those that may see it change."""
    check_reach(random_model(save_tiny(name, tmp_path)), future_k)


@pytest.mark.parametrize("name", ["olmo-tied", "llama-scaled-rope", "gemma2", "olmo3-sliding-window"])
def test_windows_are_attended_to_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(masks, "_MIN_BLOCK", 6)  # the last block is not full
    model = random_model(save_tiny(name, tmp_path))
    check_reach(model, future_k=4, form="windows")
    tokens = torch.randint(0, 264, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    docs = doc_ids_from_eos(tokens % 10, 0)
    encoder = AnticausalEncoder(4, attention_windows(model.config))
    for doc_ids in (None, docs):
        blocks = summarise(encoder, model, tokens, doc_ids, "windows").states
        torch.testing.assert_close(blocks, summarise(encoder, model, tokens, doc_ids).states, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["olmo2", "olmo3-sliding-window"])
def test_no_token_reaches_a_summary_of_its_future_by_flex_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Not compiled: the mask and the way to the kernel are in question here, and compiling takes minutes.
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda self, training: None)
    monkeypatch.setattr(WrappedFlexAttention, "_compiled_flex_attention", staticmethod(flex_attention))
    model = random_model(save_tiny(name, tmp_path))
    check_reach(model, future_k=4, form="flex")
    tokens = torch.randint(2, 264, (2, LENGTH))
    encoder = AnticausalEncoder(0, attention_windows(model.config))
    torch.testing.assert_close(
        summarise(encoder, model, tokens, None, form="flex").states,
        summarise(encoder, model, tokens, None).states,
        rtol=1e-3,
        atol=1e-4,
    )
