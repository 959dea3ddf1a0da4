"""The proof fails when it should: against stock ``from_pretrained``, in one process."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flame_ext.errors import SeedError
from flame_ext.seeding.verify import Probe, verify
from tests.ranks import TINY_OLMO

TOKENS = torch.arange(2, 66)[None]


def probe(change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Probe:
    """The stock model's own logits, changed."""
    stock = AutoModelForCausalLM.from_pretrained(TINY_OLMO, dtype=dtype).eval()
    return Probe(
        tokens=TOKENS,
        forward=lambda tokens: change(stock(tokens).logits),
        context=contextlib.nullcontext(),
        dtype=dtype,
        compute_dtype=dtype,
        device=torch.device("cpu"),
        vocab_size=264,
    )


def test_the_same_model_passes() -> None:
    result = verify("parity", probe(lambda logits: logits), TINY_OLMO, trust_remote_code=False)
    assert result.passed and result.max_abs_diff == 0.0 and result.loss == result.reference_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.index_add(1, torch.tensor([5]), torch.full_like(x[:, :1], 1.0)),
        lambda x: x * 1.1,
        lambda x: x.roll(1, 1),
    ],
    ids=["one-position", "scaled", "shifted"],
)
def test_another_function_fails(dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(SeedError, match="does not compute what from_pretrained computes"):
        verify("parity", probe(change, dtype), TINY_OLMO, trust_remote_code=False)


@pytest.mark.parametrize("mode", ["finite", "parity"])
def test_nan_fails(mode: str) -> None:
    with pytest.raises(SeedError, match="is nan"):
        verify(mode, probe(lambda logits: logits * float("nan")), TINY_OLMO, trust_remote_code=False)


def test_a_loss_near_chance_is_a_loud_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = verify("finite", probe(lambda logits: logits * 0.0), TINY_OLMO, trust_remote_code=False)
    assert result.loss == pytest.approx(math.log(264), rel=1e-6) and result.reference_loss is None
    assert "chance is ln(264) = 5.576" in caplog.text
    caplog.clear()
    verify("none", probe(lambda logits: logits * 0.0), TINY_OLMO, trust_remote_code=False)
    assert "chance" not in caplog.text
