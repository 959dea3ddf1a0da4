"""Tensors without values, which remember where each of their elements comes from.

transformers rearranges weights while it loads and saves some architectures: it stacks the experts of a layer, fuses projections,
transposes. Its own code for that runs on these tensors, and leaves the boxes of the stored tensors that make up the result. Nothing
is read, and whoever needs a slice of the result then reads just what the slice is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, pairwise
from math import prod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from flame_ext.seeding.sources.boxes import Box, box_at, full_box, intersection

Of = TypeVar("Of")


@dataclass(frozen=True)
class Part(Generic[Of]):
    """A box of a tensor whose elements are those of a box of another tensor."""

    box: Box
    of: Of  # The other tensor: what describes it is up to the user
    axes: tuple[int | None, ...]
    """For each axis of the other tensor, the tensor's axis that runs along it; None if the box is one element thick there."""
    begin: tuple[int, ...]
    """Index in the other tensor of the box's first element."""

    def within(self, box: Box) -> Part[Of] | None:
        """Return what of this part lies in a box of the tensor."""
        if (common := intersection(self.box, box)) is None:
            return None
        moved = [0 if axis is None else common[axis][0] - self.box[axis][0] for axis in self.axes]
        return replace(self, box=common, begin=tuple(b + by for b, by in zip(self.begin, moved, strict=True)))

    @property
    def box_of(self) -> Box:
        """The same elements as a box of the other tensor."""
        sizes = [1 if axis is None else self.box[axis][1] - self.box[axis][0] for axis in self.axes]
        return box_at(self.begin, sizes)

    def placed(self, box_of: Box) -> Box:
        """Return where a box of the other tensor, which lies in this part, is in the tensor."""
        box = list(self.box)
        for axis, begin, (first, last) in zip(self.axes, self.begin, box_of, strict=True):
            if axis is not None:
                start = self.box[axis][0] - begin
                box[axis] = (start + first, start + last)
        return tuple(box)

    def arranged(self, values: Tensor) -> Tensor:
        """Return a view of values of the other tensor's box, with the axes of the tensor."""
        for dim in reversed([dim for dim, axis in enumerate(self.axes) if axis is None]):
            values = values.squeeze(dim)
        axes = [axis for axis in self.axes if axis is not None]
        values = values.permute(sorted(range(len(axes)), key=axes.__getitem__))
        for axis in range(len(self.box)):
            if axis not in axes:
                values = values.unsqueeze(axis)
        return values


class UnknownRearrangement(Exception):
    """Something is done to the tensors that is no rearrangement of their elements, or none that this module knows."""


class TracedTensor(Tensor):
    """A tensor without values: the parts that it is made of."""

    parts: tuple[Part[Any], ...]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, parts: Sequence[Part[Any]]) -> TracedTensor:
        traced: TracedTensor = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        traced.parts = tuple(parts)
        return traced

    @classmethod
    def whole(cls, shape: Sequence[int], dtype: torch.dtype, of: Any) -> TracedTensor:
        """Return a tensor that is another one, which ``of`` describes, as it is."""
        return cls(shape, dtype, [Part(full_box(shape), of, tuple(range(len(shape))), (0,) * len(shape))])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if (rule := _RULES.get(func.overloadpacket)) is None:
            raise UnknownRearrangement(f"{func.overloadpacket} is no rearrangement of elements that is known here")
        result = rule(*args, **(kwargs or {}))
        # torch refuses a view that is the very object which was viewed.
        return _like(result, result.shape, result.parts) if result is args[0] else result

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TracedTensor({tuple(self.shape)}, {self.dtype}, {len(self.parts)} parts)"


def _like(tensor: TracedTensor, shape: Sequence[int], parts: Sequence[Part[Any]]) -> TracedTensor:
    return TracedTensor(shape, tensor.dtype, parts)


def _with_axis(part: Part[Any], axis: int, new: Sequence[tuple[int, int]], becomes: int | None) -> Part[Any]:
    """Replace one axis of the tensor by the ranges ``new``; what ran along it runs along axis ``becomes``."""
    by = len(new) - 1
    axes = tuple(becomes if a == axis else a if a is None or a < axis else a + by for a in part.axes)
    return replace(part, box=(*part.box[:axis], *new, *part.box[axis + 1 :]), axes=axes)


def _slices(part: Part[Any], axis: int, borders: Sequence[int]) -> list[Part[Any]]:
    """Cut a part along an axis at the borders."""
    begin, end = part.box[axis]
    inner = [begin, *(border for border in borders if begin < border < end), end]
    boxes = ((*part.box[:axis], piece, *part.box[axis + 1 :]) for piece in pairwise(inner))
    return [cut for box in boxes if (cut := part.within(box)) is not None]


def _narrow(tensor: TracedTensor, dim: int, begin: int, end: int) -> TracedTensor:
    shape = [*tensor.shape]
    shape[dim] = end - begin
    box = (*full_box(tensor.shape[:dim]), (begin, end), *full_box(tensor.shape[dim + 1 :]))
    inside = [cut for part in tensor.parts if (cut := part.within(box)) is not None]
    moved = [_with_axis(p, dim, [(p.box[dim][0] - begin, p.box[dim][1] - begin)], dim) for p in inside]
    return _like(tensor, shape, moved)


def _drop(tensor: TracedTensor, dim: int) -> TracedTensor:
    """Leave out an axis of length one."""
    return _like(
        tensor,
        [*tensor.shape[:dim], *tensor.shape[dim + 1 :]],
        [_with_axis(p, dim, [], None) for p in tensor.parts],
    )


def _insert(tensor: TracedTensor, dim: int) -> TracedTensor:
    """Put an axis of length one before axis ``dim``."""

    def inserted(part: Part[Any]) -> Part[Any]:
        axes = tuple(a if a is None or a < dim else a + 1 for a in part.axes)
        return replace(part, box=(*part.box[:dim], (0, 1), *part.box[dim:]), axes=axes)

    return _like(tensor, [*tensor.shape[:dim], 1, *tensor.shape[dim:]], [inserted(p) for p in tensor.parts])


def _join(tensors: Sequence[TracedTensor], dim: int) -> TracedTensor:
    shapes = {(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors}
    if len(shapes) > 1:
        raise ValueError(f"tensors of the shapes {sorted(tuple(t.shape) for t in tensors)} are joined along axis {dim}")
    starts = [0, *accumulate(t.shape[dim] for t in tensors)]
    parts = [
        _with_axis(p, dim, [(start + p.box[dim][0], start + p.box[dim][1])], dim)
        for start, tensor in zip(starts, tensors, strict=False)
        for p in tensor.parts
    ]
    shape = [*tensors[0].shape]
    shape[dim] = starts[-1]
    return TracedTensor(shape, reduce(torch.promote_types, (t.dtype for t in tensors)), parts)


def _split_axis(tensor: TracedTensor, dim: int, inner: int) -> TracedTensor:
    """Make an axis of length ``outer * inner`` two axes."""
    outer = tensor.shape[dim] // inner
    borders = range(0, tensor.shape[dim], inner)
    rows = [row for part in tensor.parts for row in _slices(part, dim, borders)]
    parts = []
    for row in rows:
        begin, end = row.box[dim]
        at = begin // inner
        parts.append(_with_axis(row, dim, [(at, at + 1), (begin - at * inner, end - at * inner)], dim + 1))
    return _like(tensor, [*tensor.shape[:dim], outer, inner, *tensor.shape[dim + 1 :]], parts)


def _merge_axes(tensor: TracedTensor, dim: int) -> TracedTensor:
    """Make an axis and the next one axis."""
    inner = tensor.shape[dim + 1]
    rows = [row for part in tensor.parts for row in _slices(part, dim, range(tensor.shape[dim]))]
    parts = []
    for row in rows:  # one element thick along ``dim``
        at = row.box[dim][0] * inner
        begin, end = row.box[dim + 1]
        row = _with_axis(row, dim, [], None)
        parts.append(_with_axis(row, dim, [(at + begin, at + end)], dim))
    return _like(tensor, [*tensor.shape[:dim], tensor.shape[dim] * inner, *tensor.shape[dim + 2 :]], parts)


# -- the rules for torch's operations, by their arguments ---------------------------------------------------------------------


def _cat(tensors: Sequence[TracedTensor], dim: int = 0) -> TracedTensor:
    if not all(isinstance(tensor, TracedTensor) for tensor in tensors):
        raise UnknownRearrangement("tensors of a file are joined with values that are in no file")
    return _join(tensors, dim % tensors[0].dim())


def _stack(tensors: Sequence[TracedTensor], dim: int = 0) -> TracedTensor:
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], dim)


def _unsqueeze(tensor: TracedTensor, dim: int) -> TracedTensor:
    return _insert(tensor, dim % (tensor.dim() + 1))


def _squeeze(tensor: TracedTensor, dim: int | Sequence[int] | None = None) -> TracedTensor:
    dims = range(tensor.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    for d in sorted({d % tensor.dim() for d in dims}, reverse=True):
        tensor = _drop(tensor, d) if tensor.shape[d] == 1 else tensor
    return tensor


def _split(tensor: TracedTensor, sizes: int | Sequence[int], dim: int = 0) -> list[TracedTensor]:
    dim %= tensor.dim()
    length = tensor.shape[dim]
    ends = [*range(sizes, length, sizes), length] if isinstance(sizes, int) else [*accumulate(sizes)]
    if ends[-1] != length:
        raise ValueError(f"an axis of length {length} is split into {list(sizes)}")  # type: ignore[arg-type]
    return [_narrow(tensor, dim, begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _select(tensor: TracedTensor, dim: int, index: int) -> TracedTensor:
    dim, index = dim % tensor.dim(), index % tensor.shape[dim]
    return _drop(_narrow(tensor, dim, index, index + 1), dim)


def _unbind(tensor: TracedTensor, dim: int = 0) -> list[TracedTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _slice(
    tensor: TracedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> TracedTensor:
    if step != 1:
        raise UnknownRearrangement(f"elements are taken in steps of {step}")
    begin, end, _ = slice(start, end).indices(tensor.shape[dim])
    return _narrow(tensor, dim % tensor.dim(), begin, max(begin, end))


def _permute(tensor: TracedTensor, order: Sequence[int]) -> TracedTensor:
    order = [dim % tensor.dim() for dim in order]
    parts = [
        replace(
            p,
            box=tuple(p.box[dim] for dim in order),
            axes=tuple(axis if axis is None else order.index(axis) for axis in p.axes),
        )
        for p in tensor.parts
    ]
    return _like(tensor, [tensor.shape[dim] for dim in order], parts)


def _transpose(tensor: TracedTensor, dim0: int, dim1: int) -> TracedTensor:
    order = [*range(tensor.dim())]
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(tensor, order)


def _view(tensor: TracedTensor, shape: Sequence[int]) -> TracedTensor:
    shape = [prod(tensor.shape) // -prod(shape) if size == -1 else size for size in shape]
    if prod(shape) != prod(tensor.shape):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is viewed as {shape}")
    axis = 0
    while axis < max(tensor.dim(), len(shape)):
        if axis == len(shape):
            tensor = _drop(tensor, axis)
        elif axis == tensor.dim():
            tensor = _insert(tensor, axis)
        elif tensor.shape[axis] == shape[axis]:
            axis += 1
        elif tensor.shape[axis] > shape[axis] and tensor.shape[axis] % shape[axis] == 0:
            tensor = _split_axis(tensor, axis, tensor.shape[axis] // shape[axis])
        else:
            tensor = _merge_axes(tensor, axis)
    return tensor


def _same(tensor: TracedTensor, **_: Any) -> TracedTensor:
    return tensor


_aten = torch.ops.aten
_RULES: dict[Any, Callable[..., Any]] = {
    _aten.alias: _same,
    _aten.cat: _cat,
    _aten.clone: _same,
    _aten.detach: _same,
    _aten.permute: _permute,
    _aten.select: _select,
    _aten.slice: _slice,
    _aten.split: _split,
    _aten.split_with_sizes: _split,
    _aten.squeeze: _squeeze,
    _aten.stack: _stack,
    _aten.transpose: _transpose,
    _aten.unbind: _unbind,
    _aten.unsqueeze: _unsqueeze,
    _aten.view: _view,
    _aten._unsafe_view: _view,
}
