"""Boxes of index ranges, against sets of indices."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_ext.seeding.sources.boxes import Box, full_box, inside, intersection, tiles_exactly, volume


def indices(box: Box) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(*ends) for ends in box)))


def boxes(dims: int) -> st.SearchStrategy[Box]:
    ends = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda pair: (min(pair), max(pair)))
    return st.tuples(*[ends] * dims)


@given(st.integers(0, 3).flatmap(lambda n: st.tuples(boxes(n), boxes(n))))
def test_intersection_is_that_of_the_indices(pair: tuple[Box, Box]) -> None:
    a, b = pair
    common = intersection(a, b)
    assert set(indices(common) if common is not None else []) == set(indices(a)) & set(indices(b))
    assert volume(a) == len(indices(a))


@given(st.integers(0, 2).flatmap(lambda n: st.tuples(boxes(n), st.lists(boxes(n), max_size=4))))
def test_tiles_exactly_is_each_index_once(case: tuple[Box, list[Box]]) -> None:
    box, parts = case
    written = [index for part in parts for index in indices(part)]
    assert tiles_exactly(box, parts) == (sorted(written) == sorted(indices(box)))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_a_grid_of_cuts_tiles_and_one_piece_less_does_not(shape: list[int], data: st.DataObject) -> None:
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    grid = list(itertools.product(*(list(itertools.pairwise(cut)) for cut in cuts)))
    parts = data.draw(st.permutations(grid))
    assert tiles_exactly(full_box(shape), parts)
    assert not tiles_exactly(full_box(shape), parts[1:])
    assert not tiles_exactly(full_box(shape), [*parts, parts[0]])


@pytest.mark.parametrize(
    ("box", "parts"),
    [
        (((0, 4),), [((0, 2),), ((0, 2),)]),
        (((0, 4),), [((0, 3),), ((2, 3),)]),
        (((0, 2), (0, 4)), [((0, 2), (0, 2)), ((0, 1), (1, 3)), ((1, 2), (2, 4))]),
        (((0, 3), (0, 2)), [((0, 2), (0, 1)), ((0, 1), (1, 2)), ((1, 3), (0, 1)), ((2, 3), (1, 2))]),
        ((), [(), ()]),
    ],
)
def test_as_many_elements_are_not_enough(box: Box, parts: list[Box]) -> None:
    """One is written twice and another never."""
    assert not tiles_exactly(box, parts)


def test_inside_is_relative_to_the_outer_box() -> None:
    assert inside(((4, 6), (0, 3)), ((2, 8), (0, 5))) == (slice(2, 4), slice(0, 3))
    assert inside((), ()) == ()
