"""transformers' own operations on tensors without values: what the result is made of is what they make of values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import core_model_loading as loading

from flame_ext.seeding.sources.boxes import full_box, inside, tiles_exactly
from flame_ext.seeding.sources.traced import TracedTensor, UnknownRearrangement


def values_of(tensor: TracedTensor, stored: dict[str, Tensor]) -> Tensor:
    assert tiles_exactly(full_box(tensor.shape), [part.box for part in tensor.parts])
    values = torch.empty(tensor.shape, dtype=tensor.dtype)
    for part in tensor.parts:
        read = stored[part.of][inside(part.box_of, full_box(stored[part.of].shape))]
        values[inside(part.box, full_box(tensor.shape))] = part.arranged(read)
    return values


CONFIG = SimpleNamespace(num_attention_heads=4)
OPERATIONS: dict[str, tuple[list[str], list[str], tuple[int, ...], list[loading.ConversionOps]]] = {
    "stack and concatenate": (["g.*.w", "u.*.w"], ["gu"], (6, 5), [loading.MergeModulelist(0), loading.Concatenate(1)]),
    "stack within": (["d.*.w"], ["d"], (6, 5), [loading.MergeModulelist(1)]),
    "concatenate": (["q", "k", "v"], ["qkv"], (4, 3, 2), [loading.Concatenate(0)]),
    "chunk and unstack": (["gu"], ["g.*.w", "u.*.w"], (4, 6, 3), [loading.Chunk(1), loading.SplitModulelist(0)]),
    "unstack": (["d"], ["d.*.w"], (4, 1, 3), [loading.SplitModulelist(0)]),
    "chunk": (["abc"], ["a", "b", "c"], (9, 2), [loading.Chunk(0)]),
    "transpose": (["a"], ["b"], (3, 8, 2), [loading.Transpose(0, 2)]),
    "interleave": (["a"], ["b"], (3, 8, 5), [loading.Interleave(1)]),
    "interleave back": (["a"], ["b"], (3, 8, 5), [loading.Interleave(1, inverse=True)]),
    "permute for rope": (["q"], ["q"], (16, 3), [loading.PermuteForRope(permute_layer_names=["q"])]),
    "permute a bias back": (["q"], ["q"], (16,), [loading.PermuteForRope(permute_layer_names=["q"], inverse=True)]),
    "convolution": (["a"], ["b"], (4, 2, 1, 3, 3), [loading.Conv3dToLinear(2, (1, 3, 3))]),
    "convolution back": (["a"], ["b"], (4, 18), [loading.LinearToConv3d(2, (1, 3, 3))]),
}
if hasattr(loading, "Split"):  # not yet in transformers 5.17
    OPERATIONS["split"] = (["ab"], ["a", "b"], (9, 2), [loading.Split(0)])


@pytest.mark.parametrize("case", OPERATIONS)
def test_operations_leave_what_they_leave_of_values(case: str) -> None:
    sources, targets, shape, operations = OPERATIONS[case]
    stored: dict[str, Tensor] = {}
    values: dict[str, list[Tensor]] = {pattern: [] for pattern in sources}
    traced: dict[str, list[Tensor]] = {pattern: [] for pattern in sources}
    for pattern in sources:
        for number in range(4 if "*" in pattern else 1):
            key = pattern.replace("*", str(number))
            stored[key] = torch.randn(shape, generator=torch.Generator().manual_seed(len(stored)))
            values[pattern].append(stored[key])
            traced[pattern].append(TracedTensor.whole(shape, torch.float32, key))
    sizes = {"a": 6, "b": 3}
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(sizes[name], 2))
    names = {"source_patterns": sources, "target_patterns": targets, "config": CONFIG, "model": model}
    for operation in operations:
        values = operation.convert(values, full_layer_name=targets[0], **names)
        traced = operation.convert(traced, full_layer_name=targets[0], **names)
    assert list(traced) == list(values)
    for name, value in values.items():
        expected, found = (v[0] if isinstance(v, list) else v for v in (value, traced[name]))
        assert torch.equal(values_of(found, stored), expected), name


@pytest.mark.parametrize(
    "change",
    [lambda t: t.squeeze(), lambda t: t.squeeze(-2), lambda t: t.squeeze((0, 2)), lambda t: t.reshape(t.shape)],
)
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (1, 1), (3, 2)])
def test_axes_are_dropped_or_kept_as_torch_does(change, shape: tuple[int, ...]) -> None:
    stored = {"a": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    try:
        expected = change(stored["a"])
    except IndexError:  # no such axis
        return
    assert torch.equal(values_of(change(TracedTensor.whole(shape, torch.float32, "a")), stored), expected)


def test_a_part_knows_what_lies_in_a_box_and_back() -> None:
    a, b = (TracedTensor.whole((4, 6), torch.float32, key) for key in "ab")
    tensor = torch.stack([a, b]).transpose(1, 2)
    (part,) = [found for p in tensor.parts if (found := p.within(((1, 2), (2, 5), (0, 3)))) is not None]
    assert (
        part.of == "b" and part.box_of == ((0, 3), (2, 5)) and part.placed(((1, 2), (3, 4))) == ((1, 2), (3, 4), (1, 2))
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t * 2, "aten.mul"),
        (lambda t: t.to(torch.bfloat16), "aten._to_copy"),
        (lambda t: torch.cat([t, torch.zeros(1, 4)]), "values that are in no file"),
        (lambda t: t[::2], "in steps of 2"),
        (lambda t: torch.zeros(3, 4).copy_(t), "aten.copy_"),
    ],
)
def test_what_is_no_rearrangement_is_refused_by_name(change, what: str) -> None:
    with pytest.raises(UnknownRearrangement, match=what):
        change(TracedTensor.whole((3, 4), torch.float32, "a"))


@pytest.mark.parametrize(
    "change", [lambda t: t.split([1, 1]), lambda t: t.reshape(5, 2), lambda t: torch.cat([t, t[0]])]
)
def test_shapes_that_do_not_fit_are_refused(change) -> None:
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        change(TracedTensor.whole((3, 4), torch.float32, "a"))
