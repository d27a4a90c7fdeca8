"""Ranks, coordinates and groups, held against Megatron-LM's own generator."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.files import decode
from meshwright.layout import (
    DENSE_ORDER,
    EXPERT_ORDER,
    MAX_WORLD_SIZE,
    Layout,
    divisors,
    nearest_divisors,
    nearest_to,
)

VIEWS = {"dense": DENSE_ORDER, "expert": EXPERT_ORDER}
MEGATRON_ORDER = "tp-cp-ep-dp-pp"


def random_layout(draw: Callable[[list[int]], int]) -> Layout:
    """A valid layout of at most 864 ranks; experts take any divisor of the ranks of a stage."""
    degrees = {
        "tp": draw([1, 2, 3, 4, 8]),
        "cp": draw([1, 1, 2, 3]),
        "dp": draw([1, 2, 3, 4, 6, 8, 9]),
        "pp": draw([1, 2, 3, 4]),
        "vpp": draw([1, 2]),
    }
    stage_ranks = degrees["tp"] * degrees["cp"] * degrees["dp"]
    etp = draw(divisors(stage_ranks))
    ep = draw(divisors(stage_ranks // etp))
    return Layout(**degrees, etp=etp, ep=ep)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    return random_layout(lambda values: draw(st.sampled_from(values)))


@pytest.fixture(scope="module")
def rank_generator() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = pytest.importorskip("megatron.core.parallel_state", exc_type=ImportError)
    return state.RankGenerator


def megatron_groups(rank_generator: Any, layout: Layout, view: str, axes: str) -> list[list[int]]:
    """The groups as `initialize_model_parallel` makes them: one generator for each view."""
    if view == "dense":
        sizes = {"tp": layout.tp, "ep": 1, "dp": layout.dp, "pp": layout.pp, "cp": layout.cp}
    else:
        sizes = {"tp": layout.etp, "ep": layout.ep, "dp": layout.edp, "pp": layout.pp, "cp": 1}
    groups: list[list[int]] = rank_generator(**sizes, order=MEGATRON_ORDER).get_ranks(axes)
    return groups


def test_groups_are_those_of_megatron(rank_generator: Any) -> None:
    source = random.Random(20240607)
    seen = [random_layout(source.choice) for _ in range(400)]
    for layout in seen:
        for axis in DENSE_ORDER:
            assert layout.groups(axis) == megatron_groups(rank_generator, layout, "dense", axis), layout
        for axis, word in (("etp", "tp"), ("ep", "ep"), ("edp", "dp"), ("pp", "pp")):
            theirs = megatron_groups(rank_generator, layout, "expert", word)
            assert layout.groups(axis, "expert") == theirs, layout
        assert layout.groups("dp_cp") == megatron_groups(rank_generator, layout, "dense", "dp-cp"), layout
    assert sum(layout.etp != layout.tp for layout in seen) > 200
    assert sum(layout.cp > 1 and layout.ep > 1 for layout in seen) > 50
    assert sum(layout.ep > layout.tp * layout.cp > layout.tp > 1 for layout in seen) > 5
    assert any(layout.ep == layout.tp * layout.cp * layout.dp > layout.dp > 1 for layout in seen)


# Typed from Megatron-LM's RankGenerator, so that they hold where it is not installed.
KNOWN_GROUPS = [
    (
        Layout(tp=2, pp=2, dp=2, ep=2, etp=1),
        {
            ("tp", "dense"): [[0, 1], [2, 3], [4, 5], [6, 7]],
            ("dp", "dense"): [[0, 2], [1, 3], [4, 6], [5, 7]],
            ("pp", "dense"): [[0, 4], [1, 5], [2, 6], [3, 7]],
            ("ep", "expert"): [[0, 1], [2, 3], [4, 5], [6, 7]],
            ("edp", "expert"): [[0, 2], [1, 3], [4, 6], [5, 7]],
        },
    ),
    (
        Layout(tp=2, pp=2, dp=4, ep=4, etp=1),
        {
            ("ep", "expert"): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
            ("edp", "expert"): [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]],
        },
    ),
    (
        Layout(tp=2, pp=2, dp=2, ep=2, etp=2),
        {
            ("etp", "expert"): [[0, 1], [2, 3], [4, 5], [6, 7]],
            ("ep", "expert"): [[0, 2], [1, 3], [4, 6], [5, 7]],
            ("edp", "expert"): [[0], [1], [2], [3], [4], [5], [6], [7]],
        },
    ),
]


@pytest.mark.parametrize(("layout", "known"), KNOWN_GROUPS)
def test_known_groups(layout: Layout, known: dict[tuple[str, Any], list[list[int]]]) -> None:
    for (axis, view), groups in known.items():
        assert layout.groups(axis, view) == groups


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_coordinates_and_rank_are_inverse(layout: Layout) -> None:
    for view in ("dense", "expert"):
        seen = set()
        for rank in range(layout.world_size):
            coordinates = layout.coordinates(rank, view)
            assert layout.rank(coordinates, view) == rank
            assert all(0 <= value < layout.size(axis) for axis, value in coordinates.items())
            seen.add(tuple(coordinates.values()))
        assert len(seen) == layout.world_size


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_groups_divide_the_world(layout: Layout) -> None:
    everyone = list(range(layout.world_size))
    for view, axes in VIEWS.items():
        for axis in (*axes, *(["dp_cp"] if view == "dense" else [])):
            groups = layout.groups(axis, view)
            assert sorted(chain.from_iterable(groups)) == everyone
            assert {len(group) for group in groups} == {layout.size(axis)}
            for group in groups:
                assert all(layout.group_of(rank, axis, view) == group for rank in group)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_members_of_a_group_differ_along_its_axis_only(layout: Layout) -> None:
    for view, axes in VIEWS.items():
        for axis in axes:
            for group in layout.groups(axis, view)[:20]:
                places = [layout.coordinates(rank, view) for rank in group]
                assert [place.pop(axis) for place in places] == list(range(layout.size(axis)))
                assert all(place == places[0] for place in places)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_both_views_are_of_the_same_world(layout: Layout) -> None:
    assert layout.etp * layout.ep * layout.edp * layout.pp == layout.world_size
    assert layout.groups("pp", "dense") == layout.groups("pp", "expert")
    for rank in range(layout.world_size):
        assert layout.coordinates(rank)["pp"] == layout.coordinates(rank, "expert")["pp"]


@pytest.mark.parametrize(
    ("degrees", "key", "nearest"),
    [
        ({"tp": 2, "dp": 4, "ep": 3}, "ep", [1, 2, 4]),
        ({"tp": 2, "dp": 4, "ep": 16}, "ep", [2, 4, 8]),
        ({"tp": 2, "dp": 4, "ep": 3, "etp": 2}, "ep", [1, 2, 4]),
        ({"tp": 2, "dp": 4, "etp": 3}, "etp", [1, 2, 4]),
        ({"tp": 1024, "dp": 1025}, "world_size", []),
    ],
)
def test_impossible_degrees_are_refused(degrees: dict[str, int], key: str, nearest: list[int]) -> None:
    with pytest.raises(InputError) as caught:
        decode(Layout, degrees, "layout")
    assert (caught.value.key, list(caught.value.nearest)) == (f"layout.{key}", nearest)
    for value in nearest:
        Layout(**{**degrees, key: value})


@pytest.mark.parametrize("rank", [-1, 8, 10**30])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    layout = Layout(tp=2, dp=4)
    for ask in (layout.coordinates, lambda r: layout.group_of(r, "tp")):
        with pytest.raises(InputError, match="between 0 and 7"):
            ask(rank)


def test_an_axis_of_the_other_view_is_a_defect() -> None:
    layout = Layout(tp=2, dp=4, ep=4)
    for axis, view in (("ep", "dense"), ("tp", "expert"), ("dp_cp", "expert"), ("vpp", "dense")):
        with pytest.raises(KeyError):
            layout.groups(axis, view)
    with pytest.raises(KeyError):
        layout.size("world_size")


def test_the_largest_world_is_taken() -> None:
    layout = Layout(tp=8, dp=2**13, pp=16, ep=64)
    assert layout.world_size == MAX_WORLD_SIZE
    assert layout.group_of(MAX_WORLD_SIZE - 1, "pp")[0] == MAX_WORLD_SIZE // 16 - 1


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 1024, 5040])
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_divisors_of_huge_numbers_take_no_time() -> None:
    start = time.perf_counter()
    found = divisors(2**53)
    assert time.perf_counter() - start < 1.0
    assert found == [2**i for i in range(54) if i <= 20 or i >= 33]


def test_nearest_values() -> None:
    assert nearest_divisors(48, 7) == [4, 6, 8]
    assert nearest_divisors(48, 7, multiple=4) == [3, 4, 6]
    assert nearest_to(5, [1, 2, 8, 9], 2) == [2, 8]


@settings(max_examples=100, deadline=None)
@given(layouts(), st.data())
def test_shards_and_replicas_make_up_the_data_axes(layout: Layout, data: st.DataObject) -> None:
    """ZeRO divides over runs of neighbours of one data group; replicas take one rank of each run."""
    both = [n for n in divisors(layout.dp * layout.cp) if layout.edp % n == 0]
    hybrid = layout.model_copy(update={"dp_replicas": data.draw(st.sampled_from(both))})
    for whole, prefix, view in (("dp_cp", "dp", "dense"), ("edp", "edp", "expert")):
        shards = hybrid.groups(f"{prefix}_shard", view)
        replicas = hybrid.groups(f"{prefix}_replica", view)
        for group in hybrid.groups(whole, view):
            size = len(group) // hybrid.dp_replicas
            runs = [group[first : first + size] for first in range(0, len(group), size)]
            assert [run for run in shards if run[0] in group] == runs
            across = [list(ranks) for ranks in zip(*runs, strict=True)]
            assert sorted(own for own in replicas if own[0] in group) == sorted(across)
        for rank in range(0, hybrid.world_size, 7):
            assert hybrid.group_of(rank, f"{prefix}_shard", view) in shards
            assert hybrid.group_of(rank, f"{prefix}_replica", view) in replicas


def test_replicas_must_divide_both_data_axes() -> None:
    with pytest.raises(InputError, match="dp_replicas: 4: must divide edp = 2"):
        decode(Layout, {"dp": 4, "ep": 2, "dp_replicas": 4})
