"""Transfers that share a link, by hand arithmetic and against the closed form of a passage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.simulator.passages import left_over, shared_level
from meshwright.simulator.streams import Flow, Stretch, Trace, arrivals, work_through

amounts = st.floats(0.0, 5.0)


def test_two_flows_on_one_tier_take_turns_and_on_two_do_not() -> None:
    both = [Flow(1.0, 0, 7), Flow(3.0, 0, 8)]
    assert arrivals(both, 10.0) == [(pytest.approx(12.0), 7), (pytest.approx(14.0), 8)]
    apart = [Flow(1.0, 0, 7), Flow(3.0, 1, 8)]
    assert arrivals(apart, 10.0) == [(pytest.approx(11.0), 7), (pytest.approx(13.0), 8)]


def test_a_flow_slows_a_transfer_and_not_compute() -> None:
    stretch = Stretch(((1.0, -1), (1.0, 0)), (), 0.0, 2.0)
    end, arrived = work_through([stretch], [Flow(1.5, 0, 3)], 0.0)
    # Alone for a second of compute, then half and half: 0.5 s of flow last 1 s, then 0.5 s of transfer.
    assert (end, arrived) == (pytest.approx(2.5), [(pytest.approx(2.0), 3)])
    end, _ = work_through([stretch], [Flow(1.5, 1, 3)], 0.0)
    assert end == pytest.approx(2.0)


def test_hidden_transfers_move_only_beside_compute() -> None:
    """0.8 s hidden beside 0.5 s of compute leave 0.3 s, whatever stands between the compute."""
    stretch = Stretch(((0.25, -1), (2.0, 1), (0.25, -1)), ((0.8, 0),), 0.1, 2.9)
    trace = Trace([], [], [], [])
    end, _ = work_through([stretch], [], 0.0, trace)
    assert end == pytest.approx(2.9)
    assert trace.left == [[(0, (pytest.approx(2.5), pytest.approx(2.8)))]]
    assert trace.host == [(pytest.approx(2.8), pytest.approx(2.9))]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(amounts, st.integers(0, 1)), max_size=4), st.floats(0.0, 5.0))
def test_moment_by_moment_is_the_closed_form(hidden: list[tuple[float, int]], compute_s: float) -> None:
    """What is left after compute: simulated flow by flow, and by the level of even shares."""
    hiding = {str(axis): seconds for axis, (seconds, _) in enumerate(hidden)}
    tiers = {str(axis): tier for axis, (_, tier) in enumerate(hidden)}
    left = left_over(hiding, tiers, compute_s, contention=True)
    stretch = Stretch(((compute_s, -1),), tuple(hidden), 0.0, 0.0)
    end, _ = work_through([stretch], [], 0.0, Trace([], [], [], []))
    assert end == pytest.approx(compute_s + sum(float(s) for s in left.values()), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(amounts, min_size=1, max_size=5), st.floats(0.0, 10.0))
def test_even_shares_use_the_whole_link(hidden: list[float], compute_s: float) -> None:
    """Σ min(amount, level) is all that the link can move, or all that there is."""
    level = float(shared_level(hidden, compute_s))
    moved = sum(min(amount, level) for amount in hidden)
    assert moved == pytest.approx(min(sum(hidden), compute_s), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(-1, 1)), max_size=6),
    st.lists(st.tuples(st.floats(0.01, 2.0), st.integers(0, 1)), max_size=3),
)
def test_flows_never_speed_anything_up(
    pieces: list[tuple[float, int]], flows: list[tuple[float, int]]
) -> None:
    """The end is at least that of the pieces alone, at most that and all flows; no flow beats its bytes; the
    link of a tier moves at most a second's worth each second."""
    alone = sum(seconds for seconds, _ in pieces)
    under_way = [Flow(seconds, tier, key) for key, (seconds, tier) in enumerate(flows)]
    end, arrived = work_through([Stretch(tuple(pieces), (), 0.0, alone)], under_way, 0.0)
    every = [*arrived, *arrivals(under_way, end)]
    assert alone - 1e-9 <= end <= alone + sum(seconds for seconds, _ in flows) + 1e-9
    assert sorted(key for _, key in every) == list(range(len(flows)))
    assert all(time >= flows[key][0] - 1e-9 for time, key in every)
    for tier in (0, 1):
        moved = sum(seconds for seconds, own in (*flows, *pieces) if own == tier)
        last = max([time for time, key in every if flows[key][1] == tier] + [end])
        assert moved <= last + 1e-9
