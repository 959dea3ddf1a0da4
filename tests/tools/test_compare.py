"""Differences of two sources: against naive arithmetic in float64, and bit for bit in one dtype."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.source import TensorEntry
from flame_ext.tools import describe
from flame_ext.tools.describe import Difference, compare_headers, compare_values
from tests.sources import save_dcp


def entry(*shape: int, dtype: torch.dtype = torch.float32) -> TensorEntry:
    return TensorEntry("key", shape, dtype, ())


def values_of(tmp_path: Path, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Difference]:
    one, two = (open_source(save_dcp(dict(held), tmp_path / name)) for name, held in (("a", first), ("b", second)))
    return {difference.name: difference for difference in compare_values(one, two, sorted(first))}


def test_headers_differ_in_one_way_a_name() -> None:
    first = {"same": entry(2), "gone": entry(3), "dtype": entry(2), "both": entry(2), "shape": entry(2, 3)}
    bf16 = torch.bfloat16
    second = {
        "same": entry(2),
        "new": entry(),
        "dtype": entry(2, dtype=bf16),
        "both": entry(1, dtype=bf16),
        "shape": entry(6),
    }
    assert compare_headers(first, second) == [
        Difference("both", "shape", "float32 [2]", "bfloat16 [1]"),
        Difference("dtype", "dtype", "float32 [2]", "bfloat16 [2]"),
        Difference("gone", "missing", "float32 [3]", "absent"),
        Difference("new", "unexpected", "absent", "float32 []"),
        Difference("shape", "shape", "float32 [2, 3]", "float32 [6]"),
    ]
    assert compare_headers(first, first) == []


def test_bits_count_in_one_dtype(tmp_path: Path) -> None:
    nan, other_nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    ones = torch.ones(2)
    first = {
        "nan": nan.repeat(2),
        "payload": nan.repeat(2),
        "zero": torch.zeros(2),
        "scalar": ones[0],
    }
    second = {
        "nan": nan.repeat(2),
        "payload": other_nan.repeat(2),
        "zero": -torch.zeros(2),
        "scalar": ones[0],
    }
    found = values_of(tmp_path, first, second)
    assert found.keys() == {"payload", "zero"}
    assert math.isnan(found["payload"].max_abs) and math.isnan(found["payload"].mean_abs)
    assert (found["zero"].max_abs, found["zero"].mean_abs) == (0.0, 0.0)


def test_values_count_across_dtypes(tmp_path: Path) -> None:
    exact = torch.tensor([1.0, -0.5, 0.0])
    first = {"exact": exact, "lossy": torch.tensor([1.001, 2.0]), "integers": torch.tensor([1, 2])}
    second = {
        "exact": exact.bfloat16(), "lossy": torch.tensor([1.001, 2.0]).bfloat16(),
        "integers": torch.tensor([1.0, 2.25]),
    }  # fmt: skip
    found = values_of(tmp_path, first, second)
    assert found.keys() == {"lossy", "integers"}
    assert (found["lossy"].first, found["lossy"].second) == ("float32", "bfloat16")
    assert found["lossy"].max_abs == abs(first["lossy"][0].double() - 1.0).item()
    assert (found["integers"].max_abs, found["integers"].mean_abs) == (0.25, 0.125)


@pytest.mark.parametrize("chunk", [1, 7, 2**22])
def test_sizes_of_differences_do_not_depend_on_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(describe, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 9, generator=generator) for _ in range(2))
    with_nan, with_complex = b.clone(), torch.complex(a, b)
    with_nan[2, 2] = torch.nan  # neither first nor last: a larger difference follows
    found = values_of(
        tmp_path,
        {"real": a, "strided": a.T, "nan": a, "complex": with_complex},
        {"real": b, "strided": b.T, "nan": with_nan, "complex": with_complex + 3 + 4j},
    )
    naive = (a.double() - b.double()).abs()
    for name in ("real", "strided"):
        assert found[name].max_abs == naive.max().item()
        assert found[name].mean_abs == pytest.approx(naive.mean().item(), rel=1e-12)
    assert math.isnan(found["nan"].max_abs) and math.isnan(found["nan"].mean_abs)
    assert found["complex"].max_abs == pytest.approx(5, rel=1e-6)


def test_tensors_without_elements_are_the_same() -> None:
    """Without a file: the reader of DCP refuses them."""
    for dtype in (torch.float32, torch.bfloat16):
        assert describe._compare_tensors("empty", torch.ones(0, 3), torch.ones(0, 3, dtype=dtype)) is None
