"""What differs between two sources: names, shapes and dtypes from headers; values tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flame_ext.seeding.sources.source import Source, TensorEntry
from flame_ext.seeding.sources.tensors import read_tensor, same_bits

_CHUNK = 2**22  # elements that are compared at a time


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same on two sides."""

    name: str
    kind: str
    """"missing" (on the second side), "unexpected" (there alone), "shape", "dtype" or "values"."""
    first: str
    second: str
    max_abs: float | None = None
    mean_abs: float | None = None

    def __str__(self) -> str:
        size = "" if self.max_abs is None else f" (max {self.max_abs:.3g}, mean {self.mean_abs:.3g})"
        return f"{self.name!r}: {self.kind}: {self.first} against {self.second}{size}"


def compare_headers(first: Mapping[str, TensorEntry], second: Mapping[str, TensorEntry]) -> list[Difference]:
    """Names, shapes and dtypes of two sides. Sorted by name."""
    found: list[Difference] = []
    for name in sorted({*first, *second}):
        if name not in second:
            found.append(Difference(name, "missing", described(first[name]), "absent"))
        elif name not in first:
            found.append(Difference(name, "unexpected", "absent", described(second[name])))
        elif first[name].shape != second[name].shape:
            found.append(Difference(name, "shape", described(first[name]), described(second[name])))
        elif first[name].dtype != second[name].dtype:
            found.append(Difference(name, "dtype", described(first[name]), described(second[name])))
    return found


def compare_values(first: Source, second: Source, names: Iterable[str]) -> Iterator[Difference]:
    """Those of ``names`` whose values differ; both have them, in one shape. NaN equals NaN of the same bits alone."""
    for name in names:
        difference = _compare_tensors(name, read_tensor(first, name), read_tensor(second, name))
        if difference is not None:
            yield difference


def _compare_tensors(name: str, a: Tensor, b: Tensor) -> Difference | None:
    """Of one shape. A function of its own, so that both are gone before the next two are read."""
    if a.dtype == b.dtype and same_bits(a, b):
        return None
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    largest, total, flat_a, flat_b = 0.0, 0.0, a.reshape(-1), b.reshape(-1)
    for begin in range(0, len(flat_a), _CHUNK):  # so that the wide copies stay small
        part = (flat_a[begin : begin + _CHUNK].to(wide) - flat_b[begin : begin + _CHUNK].to(wide)).abs()
        maximum = part.max().item()
        largest = maximum if maximum != maximum else max(largest, maximum)
        total += part.sum().item()
    if a.dtype != b.dtype and largest == 0.0:
        return None
    return Difference(name, "values", _name(a.dtype), _name(b.dtype), largest, total / max(1, a.numel()))


def described(entry: TensorEntry) -> str:
    """Dtype and shape, for a message."""
    return f"{_name(entry.dtype)} {list(entry.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
