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
from transformers import AutoConfig, AutoModelForCausalLM

from flame_ext.errors import SeedError
from flame_ext.seeding.proof import parity as parity_module
from flame_ext.seeding.proof.parity import Probe, Verification, load_reference_model, verify
from flame_ext.seeding.sources.open import open_source
from tests.ranks import TINY_OLMO

TOKENS = torch.arange(2, 66)[None]


def reference(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY_OLMO, dtype=dtype)


def run(mode: str, probe: Probe) -> Verification:
    return verify(mode, probe, lambda: reference(probe.dtype), TINY_OLMO)


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


def test_a_second_copy_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = open_source(TINY_OLMO), AutoConfig.from_pretrained(TINY_OLMO)

    def load() -> torch.nn.Module:
        return load_reference_model(source, config, set(source.entries), torch.float32, trust_remote_code=False)

    nbytes = sum(p.numel() for p in load().parameters()) * 4
    monkeypatch.setattr(parity_module, "available_memory", lambda: nbytes - 1)
    with pytest.raises(
        SeedError, match="tiny_olmo: seed.verify = 'parity' loads a second copy .* use seed.verify = 'finite'"
    ):
        load()
    monkeypatch.setattr(parity_module, "available_memory", lambda: nbytes)
    monkeypatch.setattr(parity_module, "_device_memory_left", lambda device: nbytes - 1)
    with pytest.raises(SeedError, match="second copy of the model .* on cpu, which has"):
        verify("parity", probe(lambda logits: logits), load, TINY_OLMO)
