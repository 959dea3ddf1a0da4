"""The proof fails when it should: against ``from_pretrained``, in one process."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from flame_ext.errors import SeedError
from flame_ext.seeding.proof.parity import Probe, Verification, verify
from tests.ranks import TINY_OLMO

TOKENS = torch.arange(2, 66)[None]


def reference(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY_OLMO, dtype=dtype)


def run(mode: str, probe: Probe) -> Verification:
    def reference_logits(probe: Probe) -> Tensor:
        return reference(probe.dtype).eval()(probe.tokens).logits.float().detach()

    return verify(mode, probe, reference_logits, TINY_OLMO)


def probe(change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Probe:
    """The reference model's own logits, changed."""
    model = reference(dtype).eval()
    return Probe(
        tokens=TOKENS,
        forward=lambda tokens: change(model(tokens).logits),
        autocast=contextlib.nullcontext,
        dtype=dtype,
        compute_dtype=dtype,
        device=torch.device("cpu"),
        vocab_size=264,
    )


def test_the_same_model_passes() -> None:
    result = run("parity", probe(lambda logits: logits))
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
        run("parity", probe(change, dtype))


@pytest.mark.parametrize("mode", ["finite", "parity"])
def test_nan_fails(mode: str) -> None:
    with pytest.raises(SeedError, match="is nan"):
        run(mode, probe(lambda logits: logits * float("nan")))


def test_a_loss_near_chance_is_a_loud_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = run("finite", probe(lambda logits: logits * 0.0))
    assert result.loss == pytest.approx(math.log(264), rel=1e-6) and result.reference_loss is None
    assert "chance is ln(264) = 5.576" in caplog.text
    caplog.clear()
    assert run("none", probe(lambda logits: logits * 0.0)).loss == result.loss
    assert "chance is ln(264)" in caplog.text, "no mode keeps it to itself"
    caplog.clear()
    run("finite", probe(lambda logits: 20.0 * F.one_hot(TOKENS.roll(-1, 1), logits.shape[-1])))
    assert "chance" not in caplog.text
