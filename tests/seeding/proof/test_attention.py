"""The proofs of attention pass what is right and refuse what is not; of parts of sequences: tests/model/test_context_parallel.py."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.proof.attention import ROUNDING, prove_anticausal, prove_attention
from flame_ext.seeding.proof.parity import Probe

TOKENS = torch.tensor([[3, 9, 4, 7, 7, 5, 2, 8]])


def embedded(tokens: Tensor) -> Tensor:
    return torch.stack([tokens.double(), tokens.double() ** 2], dim=-1)


def following(tokens: Tensor) -> Tensor:
    """The sum over each position and those after it, as an anti-causal layer with its residual stream has it."""
    return embedded(tokens).flip(1).cumsum(dim=1).flip(1)


def test_what_reads_the_future_alone_passes() -> None:
    prove_anticausal(following, TOKENS)
    prove_anticausal(following, TOKENS[:, :4])
    for token in (0, 1):  # a text of which the tokenizer knows no word
        prove_anticausal(following, torch.full((1, 6), token))


def test_a_window_passes() -> None:
    prove_anticausal(lambda tokens: embedded(tokens).roll(-1, dims=1), TOKENS)


@pytest.mark.parametrize("leak", [1e-9, 1.0])
def test_a_leak_is_refused(leak: float) -> None:
    with pytest.raises(SeedError, match=r"leaks: with token 4 changed, the summaries of 3 of the 3 positions after it"):
        prove_anticausal(lambda tokens: following(tokens) + leak * embedded(tokens).cumsum(dim=1), TOKENS)


def test_rounding_is_no_leak_where_it_is_allowed() -> None:
    def rounded(tokens: Tensor) -> Tensor:
        return following(tokens) + leak * embedded(tokens).cumsum(dim=1)

    leak = 1e-3
    prove_anticausal(rounded, TOKENS, rounding=ROUNDING)
    leak = 2e-2
    with pytest.raises(SeedError, match="leaks"):
        prove_anticausal(rounded, TOKENS, rounding=ROUNDING)


def test_a_leak_to_one_position_is_refused() -> None:
    def leaking(tokens: Tensor) -> Tensor:
        summaries = following(tokens)
        summaries[:, -1, 0] += tokens[:, 4]
        return summaries

    with pytest.raises(SeedError, match="of 1 of the 3 positions"):
        prove_anticausal(leaking, TOKENS)


def test_a_causal_forward_is_refused() -> None:
    with pytest.raises(SeedError, match="leaks"):
        prove_anticausal(lambda tokens: embedded(tokens).cumsum(dim=1), TOKENS)


def test_what_sees_no_future_is_refused() -> None:
    with pytest.raises(SeedError, match="sees no future: with token 4 changed, the summary of position 3"):
        prove_anticausal(embedded, TOKENS)


def test_a_backbone_that_can_not_run_under_the_mask_is_refused() -> None:
    def failing(tokens: Tensor) -> Tensor:
        raise AttributeError("'dict' object has no attribute 'shape'")

    with pytest.raises(
        SeedError, match="fails with AttributeError: 'dict' object has no attribute 'shape'; take 'mean'"
    ):
        prove_anticausal(failing, TOKENS, "take 'mean'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    def broken(tokens: Tensor) -> Tensor:
        summaries = following(tokens)
        summaries[:, -1] = value  # as a row with nothing allowed is apt to be
        return summaries

    with pytest.raises(SeedError, match="not finite"):
        prove_anticausal(broken, TOKENS)


def test_what_the_probe_has_forwards_for_is_proved() -> None:
    def logits(tokens: Tensor) -> Tensor:
        assert tokens.shape == (1, 8)
        return embedded(tokens)

    def summaries(tokens: Tensor) -> Tensor:
        assert tokens.shape == (1, 20), "as long as the training's sequences"
        return following(tokens)

    float32, cpu = torch.float32, torch.device("cpu")
    probe = Probe(TOKENS, logits, contextlib.nullcontext, float32, float32, cpu, vocab_size=10, seq_len=20)
    assert prove_attention(probe) == []
    probe = replace(probe, logits_in_parts=logits, summaries=summaries)
    assert prove_attention(probe) == [
        "sequences in parts give the logits of whole ones",
        "no summary of the future depends on its past",
    ]
    with pytest.raises(SeedError, match="logits differ"):
        prove_attention(replace(probe, logits_in_parts=lambda tokens: embedded(tokens) + 1))
    with pytest.raises(SeedError, match="sees no future"):
        prove_attention(replace(probe, summaries=embedded))
