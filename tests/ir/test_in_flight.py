"""A short order stands for a long one: the fullest moments repeat themselves."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.ir.in_flight import enough_micro_batches, fullest_moments, peak_of_rank
from meshwright.ir.schedule import build_schedule, live_at_peak, require_buildable
from meshwright.policy import CHUNKED_SCHEDULES, SCHEDULES, V_SCHEDULES, ScheduleName


def buildable(name: ScheduleName, num_ranks: int, count: int, chunks: int) -> bool:
    with suppress(InputError):
        require_buildable(name, num_ranks, count, chunks)
        return True
    return False


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_peak_of_a_short_order_is_that_of_the_whole(data: st.DataObject) -> None:
    """live_at_peak over every action of the whole order, whatever each stage weighs."""
    name = data.draw(st.sampled_from(SCHEDULES))
    num_ranks = data.draw(st.integers(1, 6))
    chunks = 1 if name not in CHUNKED_SCHEDULES else 2
    if name in CHUNKED_SCHEDULES - V_SCHEDULES:
        chunks = data.draw(st.integers(1, 4))
    count = data.draw(st.integers(1, 60))
    assume(buildable(name, num_ranks, count, chunks))
    weights = st.lists(st.integers(0, 50), min_size=num_ranks * chunks, max_size=num_ranks * chunks)
    forward, deferred = data.draw(weights), data.draw(weights)
    whole = build_schedule(name, num_ranks, count, chunks)
    for rank in range(num_ranks):
        expected = live_at_peak(whole, rank, forward, deferred)
        found = peak_of_rank(name, num_ranks, chunks, count, rank, forward, deferred)
        held = ("peak_bytes", "stages", "forward_held", "weight_held")
        assert [getattr(found, key) for key in held] == [getattr(expected, key) for key in held]
        own = [(forward[stage], deferred[stage]) for stage in expected.stages]
        moments = fullest_moments(name, num_ranks, chunks, count, rank)
        assert expected.peak_bytes == max(
            sum(h * f + w * d for h, w, (f, d) in zip(held_, waiting, own, strict=True))
            for held_, waiting in moments
        )


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "GPipe"])
def test_thousands_of_micro_batches_need_a_short_order(name: ScheduleName) -> None:
    for num_ranks in (1, 4, 16):
        enough = enough_micro_batches(name, num_ranks, 4096)
        assert enough <= 2 * num_ranks
        assert buildable(name, num_ranks, enough, 2 if name in CHUNKED_SCHEDULES else 1)


def test_no_moment_is_within_another() -> None:
    moments = [(*held, *waiting) for held, waiting in fullest_moments("InterleavedZeroBubble", 4, 3, 64, 2)]
    assert len(moments) > 1
    for one in moments:
        for other in moments:
            assert one == other or any(a > b for a, b in zip(one, other, strict=True))
