"""Attention within documents: a packed sequence gives the same as transformers' model on each document alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac

from flame_ext.data.loader import positions_in_documents
from flame_ext.data.packing import PADDING
from flame_ext.model.attention import causal_attention
from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, build_hf_causal_lm
from flame_ext.objective.masks import causal_block_mask, causal_mask
from tests.tiny_models import load_stock, save_tiny

LENGTHS = [[5, 1, 11, 7], [24]]


def as_trained(model: torch.nn.Module, doc_ids: torch.Tensor) -> dict:
    inputs = {"input": doc_ids, "doc_ids": doc_ids, "positions": positions_in_documents(doc_ids)}
    return causal_attention(model, inputs, True, torch.device("cpu"))


def stock_and_ours(name: str, folder: Path) -> tuple[HFCausalLM, torch.nn.Module]:
    save_tiny(name, folder)
    stock = load_stock(folder).eval()
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(folder)))
    model.to_empty(device="cpu")
    model.init_weights()
    model.load_state_dict(stock.state_dict())
    return model.eval(), stock


def packed_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(1, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    return tokens, torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS])


@pytest.mark.parametrize(
    "name",
    ["olmo-tied", "gpt2-learned-positions", "gemma2", "gemma3-rope-per-layer", "olmo3-sliding-window", "gpt-oss"],
)
def test_a_document_is_computed_as_if_it_were_alone(name: str, tmp_path: Path) -> None:
    model, stock = stock_and_ours(name, tmp_path)
    tokens, doc_ids = packed_tokens()
    with torch.no_grad():
        packed = model(tokens, **as_trained(model, doc_ids))
        for row, lengths in enumerate(LENGTHS):
            for part, logits in zip(tokens[row].split(lengths), packed[row].split(lengths), strict=True):
                assert torch.allclose(logits, stock(part[None]).logits[0], atol=2e-5), (row, len(part))
        across = model(tokens)
    assert not torch.allclose(across[0], packed[0], atol=1e-3), "without the mask they do see each other"
    assert torch.allclose(across[1], packed[1], atol=2e-5)


@pytest.mark.parametrize("name", ["olmo-tied", "gemma2", "olmo3-sliding-window"])
def test_layers_that_run_again_in_the_backward_attend_as_before(name: str, tmp_path: Path) -> None:
    """Gemma-2 makes its own masks for another attention than the one that takes these masks."""
    gradients = []
    for mode in ("none", "full"):
        model, _ = stock_and_ours(name, tmp_path / mode)
        if mode == "full":
            apply_ac(model, ActivationCheckpoint(mode="full"))
        tokens, doc_ids = packed_tokens()
        model(tokens, **as_trained(model, doc_ids)).logsumexp(dim=-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(gradients[0]) > 15 and all(map(torch.equal, *gradients))


@pytest.mark.parametrize("window", [0, 3])
def test_a_part_of_a_mask_is_its_rows_in_the_order_of_the_keys(window: int) -> None:
    every, documents = torch.arange(16), torch.tensor([[0] * 5 + [1] * 7 + [2] * 4])
    queries, keys = torch.tensor([0, 1, 2, 3, 12, 13, 14, 15]), torch.randperm(16)
    for doc_ids in (documents, None):
        part = causal_mask(doc_ids, window, every, every)[:, :, queries][..., keys]
        assert torch.equal(causal_mask(doc_ids, window, queries, keys), part)
        blocks = causal_block_mask(doc_ids, window, queries, keys)
        row, column = torch.meshgrid(torch.arange(8), torch.arange(16), indexing="ij")
        batch = torch.tensor(0 if doc_ids is documents else 3)  # FlexAttention asks for every sequence
        assert torch.equal(blocks.mask_mod(batch, torch.tensor(0), row, column), part[0, 0])
        assert blocks.shape == (1, 1, 8, 16)


@pytest.mark.parametrize("window", [0, 3])
def test_block_masks_are_the_dense_ones(window: int) -> None:
    doc_ids = torch.tensor([[0] * 5 + [1] * 7 + [2] * 2 + [PADDING, PADDING + 1], [0] * 16])
    every = torch.arange(16)
    dense = causal_mask(doc_ids, window, every, every)
    blocks = causal_block_mask(doc_ids, window, every, every)
    b, i, j = torch.meshgrid(torch.arange(2), torch.arange(16), torch.arange(16), indexing="ij")
    assert torch.equal(blocks.mask_mod(b, torch.tensor(0), i, j), dense[:, 0])
    naive = [
        [[j <= i and (not window or i - j < window) and d[i] == d[j] for j in range(16)] for i in range(16)]
        for d in doc_ids.tolist()
    ]
    assert dense[:, 0].tolist() == naive
