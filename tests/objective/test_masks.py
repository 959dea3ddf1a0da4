"""Masks against their definition, position by position; and no leak through the real backbone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_ext.heads.future_encoder import FutureEncoder
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.objective.masks import anticausal_mask, doc_ids_from_eos, has_future, pair_mask
from tests.tiny_models import save_tiny

BATCHES = st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3)


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


@pytest.mark.parametrize("name", ["olmo-tied", "olmo2", "llama-scaled-rope"])
@pytest.mark.parametrize("future_k", [0, 4])
def test_no_token_reaches_a_summary_of_its_future(tmp_path_factory, name: str, future_k: int) -> None:
    """Perturb one token: summaries after it and in other documents are bit-unchanged, those that may see it change."""
    folder = save_tiny(name, tmp_path_factory.mktemp(name))
    with torch.device("meta"):
        model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(folder)))
    model.to_empty(device="cpu")
    model.init_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    tokens = torch.randint(2, 264, (2, 32))
    tokens[0, 13] = 0  # the end of the first document
    docs = doc_ids_from_eos(tokens, 0)
    encoder = FutureEncoder(future_k)
    layers = model.config.num_hidden_layers
    for doc_ids in (None, docs):
        before = encoder(model, tokens, doc_ids)
        assert torch.isfinite(before).all()
        for j in (0, 5, 13, 20, 31):
            changed = tokens.clone()
            changed[0, j] = 100 if tokens[0, j] != 100 else 101
            after = encoder(model, changed, doc_ids)
            differs = (before != after).any(dim=-1)
            assert not differs[1].any(), "the other sequence"
            reach = layers * future_k if future_k else 32  # each layer looks future_k further
            for t in range(32):
                same_document = doc_ids is None or docs[0, t] == docs[0, j]
                may_see = t <= j <= t + reach and same_document
                assert differs[0, t].item() == may_see, (t, j)
