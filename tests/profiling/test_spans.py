"""Span arithmetic against the definition: which instants belong to what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import call, event, note

from meshwright.profiling.spans import beyond, common, length, merged
from meshwright.profiling.trace import rank_trace
from meshwright.profiling.usage import rank_use

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def instants(spans: list[tuple[int, int]] | list[tuple[float, float]]) -> set[int]:
    """The unit intervals that spans of whole numbers cover."""
    return {at for start, end in spans for at in range(int(start), int(end))}


@given(SPANS, SPANS)
def test_spans_are_sets_of_instants(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    a, b = merged(one), merged(other)
    assert instants(a) == instants(one)
    assert instants(common(a, b)) == instants(one) & instants(other)
    assert instants(beyond(a, b)) == instants(one) - instants(other)
    for found in (a, common(a, b), beyond(a, b)):
        assert found == merged(found)
        assert length(found) == len(instants(found))


@given(SPANS, SPANS, SPANS)
def test_overlap_is_that_of_holistic_trace_analysis(
    ops: list[tuple[int, int]], tp: list[tuple[int, int]], dp: list[tuple[int, int]]
) -> None:
    """A brute-force sweep over instants, as HTA defines it: level 3 is where both run. Communication in the
    background runs from its call, here of no length, to the end of its work."""
    step = note("step:0", 0, 60)
    events = [step, *(event("aten::mm", start, end) for start, end in ops if end > start)]
    for axis, spans, kind in (("tp", tp, "all_reduce"), ("dp_cp", dp, "all_gather")):
        for start, end in sorted(s for s in spans if s[1] > s[0]):
            events += [
                call(axis, kind, 8, start, start),
                event(f"gloo:{kind}", start, end, "user_annotation"),
            ]
    found = rank_use(rank_trace(0, events))
    compute, by_axis = instants(ops), {"tp": instants(tp), "dp_cp": instants(dp)}
    comm = by_axis["tp"] | by_axis["dp_cp"]
    assert found.compute_s == pytest.approx(len(compute) * 1e-6)
    assert found.comm_s == pytest.approx(len(comm) * 1e-6)
    assert found.hidden_s == pytest.approx(len(comm & compute) * 1e-6)
    assert found.idle_s == pytest.approx((60 - len(comm | compute)) * 1e-6, abs=1e-12)
    for axis in found.axes:
        own = by_axis[axis.axis]
        assert axis.seconds == pytest.approx(len(own) * 1e-6)
        assert axis.hidden_s == pytest.approx(len(own & compute) * 1e-6)
        assert axis.exposed_s == pytest.approx(len(own - compute) * 1e-6, abs=1e-12)
        assert axis.hidden_fraction == pytest.approx(len(own & compute) / len(own))
