"""Flat ranges as rectangles, and rectangles as a whole tensor."""

from __future__ import annotations

import functools
from itertools import pairwise, product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.runtime.checkpoint import flat_pieces, local_pieces, rectangles
from meshwright.runtime.checkpoint.rectangles import Rectangle, tiling_problem


@st.composite
def shapes_with_a_range(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start, stop = sorted(draw(st.lists(st.integers(0, prod(shape)), min_size=2, max_size=2)))
    return shape, start, stop


def indices(shape: tuple[int, ...], part: Rectangle) -> list[int]:
    """Flat positions of a rectangle's elements, in its own row-major order."""
    numbers = np.arange(prod(shape)).reshape(shape)
    offsets, sizes = part
    window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
    return list(np.asarray(numbers[window]).flatten())


@functools.cache
def runs_of(shape: tuple[int, ...]) -> frozenset[tuple[int, int]]:
    """Every flat range that is one rectangle."""
    found = set()
    per_dim = [[(o, s) for o in range(n) for s in range(1, n - o + 1)] for n in shape]
    for choice in product(*per_dim):
        part = (tuple(o for o, _ in choice), tuple(s for _, s in choice))
        inside = indices(shape, part)
        if inside == list(range(inside[0], inside[0] + len(inside))):
            found.add((inside[0], inside[-1] + 1))
    return frozenset(found)


def fewest(shape: tuple[int, ...], start: int, stop: int) -> int:
    """Least number of rectangular runs that make up a range, by trying all."""
    best = {start: 0}
    for end in range(start + 1, stop + 1):
        best[end] = min(
            (best[begin] + 1 for begin in range(start, end) if (begin, end) in runs_of(shape)), default=10**9
        )
    return best[stop]


@settings(deadline=None)
@given(shapes_with_a_range())
def test_rectangles_are_disjoint_in_order_and_cover_exactly_the_range(
    case: tuple[tuple[int, ...], int, int],
) -> None:
    shape, start, stop = case
    covered = [flat for part in rectangles(shape, start, stop) for flat in indices(shape, part)]
    assert covered == list(range(start, stop))


@settings(deadline=None)
@given(shapes_with_a_range())
def test_no_fewer_rectangles_would_do(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    assert len(rectangles(shape, start, stop)) == fewest(shape, start, stop)
    assert len(rectangles(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


def test_rectangles_of_a_range_across_rows() -> None:
    assert rectangles((3, 4), 2, 12) == [((0, 2), (1, 2)), ((1, 0), (2, 4))]
    assert rectangles((), 0, 1) == [((), ())]
    assert rectangles((0, 4), 0, 0) == []


def test_a_range_outside_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 7\) is not inside"):
        rectangles((2, 3), 3, 7)


@settings(deadline=None)
@given(shapes_with_a_range(), st.data())
def test_flat_pieces_lie_where_the_local_tensor_does(
    case: tuple[tuple[int, ...], int, int], data: st.DataObject
) -> None:
    local, start, stop = case
    before = [data.draw(st.integers(0, 3)) for _ in local]
    after = [data.draw(st.integers(0, 3)) for _ in local]
    whole = torch.arange(prod(b + n + a for b, n, a in zip(before, local, after, strict=True)))
    whole = whole.reshape([b + n + a for b, n, a in zip(before, local, after, strict=True)])
    ranges = [(b, b + n) for b, n in zip(before, local, strict=True)]
    flat = whole[tuple(slice(*r) for r in ranges)].flatten()[start:stop]
    pieces = flat_pieces(ranges, flat, start, stop, whole.shape)
    assert pieces.problem() is None
    for piece in pieces.pieces:
        offsets, sizes = piece.rectangle
        window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        assert torch.equal(piece.tensor, whole[window])
        assert piece.tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert sum(piece.tensor.numel() for piece in pieces.pieces) == stop - start


def test_padding_is_no_part_of_the_whole() -> None:
    padded = torch.arange(12).reshape(3, 4)  # holds rows 5 and 6, columns 0 to 2
    ranges = [(5, 7), (0, 3)]
    (piece,) = local_pieces(ranges, padded, (7, 3)).pieces
    assert piece.offsets == (5, 0)
    assert piece.tensor.tolist() == [[0, 1, 2], [4, 5, 6]]
    first = flat_pieces(ranges, padded.flatten()[:6], 0, 6, (7, 3), local_shape=(3, 4))
    last = flat_pieces(ranges, padded.flatten()[6:], 6, 12, (7, 3), local_shape=(3, 4))
    assert [(p.offsets, p.tensor.tolist()) for p in first.pieces] == [
        ((5, 0), [[0, 1, 2]]),
        ((6, 0), [[4, 5]]),
    ]
    assert [(p.offsets, p.tensor.tolist()) for p in last.pieces] == [((6, 2), [[6]])]


def test_tensors_that_do_not_fit_their_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="does not hold the ranges"):
        local_pieces([(0, 3)], torch.zeros(2), (4,))
    with pytest.raises(ValueError, match="a flat tensor of 3 elements"):
        flat_pieces([(0, 3)], torch.zeros(2), 0, 3, (4,))


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_tiling_agrees_with_counting_every_element(shape: list[int], data: st.DataObject) -> None:
    def part() -> Rectangle:
        offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        return offsets, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))

    parts = {part() for _ in range(data.draw(st.integers(0, 4)))}
    if data.draw(st.booleans()):  # a real tiling, by cutting the flat range
        cuts = sorted({0, prod(shape), *data.draw(st.lists(st.integers(0, prod(shape)), max_size=4))})
        parts = {r for a, b in pairwise(cuts) for r in rectangles(shape, a, b)}
    counts = np.zeros(shape, int)
    for offsets, sizes in parts:
        counts[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    assert (tiling_problem(shape, parts) is None) == bool((counts == 1).all())


def test_what_is_wrong_with_a_tiling_is_said() -> None:
    whole = ((0, 0), (4, 4))
    assert tiling_problem((4, 4), [whole]) is None
    assert tiling_problem((), [((), ())]) is None
    assert tiling_problem((4, 4), [((0, 0), (4, 5))]) == "part [0:4, 0:5] leaves the shape (4, 4)"
    assert tiling_problem((4, 4), [((-1, 0), (4, 4))]) == "part [-1:3, 0:4] leaves the shape (4, 4)"
    assert tiling_problem((4, 4), [((0, 0), (4, 3))]) == "4 of its 16 elements are in no part"
    overlapping = tiling_problem((4, 4), [((0, 0), (3, 4)), ((2, 0), (2, 4))])
    assert overlapping == "parts [0:3, 0:4] and [2:4, 0:4] overlap without being equal"
