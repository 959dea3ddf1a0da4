"""Attention with sinks (gpt-oss) under the masks of this package, against transformers' own eager code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from flame_ext.model.attention import boolean_attention
from flame_ext.objective.masks import anticausal_mask, anticausal_window_mask, causal_mask

LENGTH, SCALING = 150, 8**-0.5
EVERY = torch.arange(LENGTH)
DOCUMENTS = torch.stack(
    [torch.repeat_interleave(torch.arange(4), torch.tensor(n)) for n in ([70, 1, 40, 39], [9, 141, 0, 0])]
)
DENSE = {
    "causal": causal_mask(None, 0, EVERY, EVERY),
    "documents": causal_mask(DOCUMENTS, 0, EVERY, EVERY),
    "documents, window": causal_mask(DOCUMENTS, 16, EVERY, EVERY),
    "future": anticausal_mask(LENGTH),  # its last row allows nothing
    "future within documents": anticausal_mask(LENGTH, 0, DOCUMENTS),
    "near future": anticausal_mask(LENGTH, 5, DOCUMENTS),
}


def inputs() -> list[Tensor]:
    """Queries of four heads, keys and values of two, and the sinks, which matter as much as keys do."""
    shapes = [(2, 4, LENGTH, 8), (2, 2, LENGTH, 8), (2, 2, LENGTH, 8), (4,)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).mul(1.5).requires_grad_() for shape in shapes]


def attended(module: SimpleNamespace, tensors: list[Tensor], mask: Tensor, ours: bool) -> list[Tensor]:
    """The (B, T, H, d) result, and the gradients of ``tensors``."""
    query, key, value, sinks = tensors
    if ours:
        output, _ = boolean_attention(module, query, key, value, mask, scaling=SCALING, s_aux=sinks)
    else:
        additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        output, _ = eager_attention_forward(module, query, key, value, additive, scaling=SCALING)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


def module_of(sinks: Tensor) -> SimpleNamespace:
    return SimpleNamespace(sinks=sinks, num_key_value_groups=2, training=False, is_causal=True)


@pytest.mark.parametrize("name", DENSE)
def test_values_and_gradients_are_those_of_transformers(name: str) -> None:
    tensors, mask = inputs(), DENSE[name]
    module = module_of(tensors[3])
    expected = attended(module, tensors, mask, ours=False)
    for found, tensor in zip(attended(module, tensors, mask, ours=True), expected, strict=True):
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-5)
    empty = ~mask.any(dim=-1).expand(2, 1, -1).squeeze(1)
    assert torch.all(expected[0][empty] == 0) and bool(empty.any()) == ("future" in name)
    assert torch.all(expected[4] != 0), "sinks take part"


def test_blocks_of_a_short_window_are_the_dense_mask() -> None:
    tensors = inputs()
    module = module_of(tensors[3])
    expected = attended(module, tensors, DENSE["near future"], ours=False)
    blocks = anticausal_window_mask(LENGTH, 5, DOCUMENTS)
    assert blocks.shape[1] > 1
    for found, tensor in zip(attended(module, tensors, blocks, ours=True), expected, strict=True):
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-5)
