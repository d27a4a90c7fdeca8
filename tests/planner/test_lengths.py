"""Lengths that plans are ranked on: shares add up, means are kept, every length can be cut."""

from __future__ import annotations

from math import gcd
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.planner.lengths import MOST, lengths_of
from meshwright.workload import Workload


def workload(length: Any) -> Workload:
    return Workload.model_validate({"global_batch_size": 8, "sequence_length": length})


def test_one_length_is_itself() -> None:
    assert lengths_of(workload(4096)).shares == ((4096, 1.0),)
    assert lengths_of(workload({"min": 128, "max": 128})).shares == ((128, 1.0),)


def test_a_range_is_uniform_in_five_parts() -> None:
    """Middles of fifths of 0 to 10,240, as multiples of 1,024."""
    found = lengths_of(workload({"min": 1024, "max": 11_264}))
    assert found.shares == tuple((length, 0.2) for length in (2048, 4096, 6144, 8192, 10_240))
    assert "assumed uniform" in found.words


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.floats(0.02, 0.98))
def test_a_mean_is_kept_up_to_rounding(low: int, width: int, where: float) -> None:
    step = 64
    bounds = {"min": low * step, "max": (low + width) * step}
    mean = round(bounds["min"] + where * (bounds["max"] - bounds["min"]))
    found = lengths_of(workload({**bounds, "mean": mean}))
    unit = gcd(bounds["min"], bounds["max"])
    assert sum(share for _, share in found.shares) == pytest.approx(1)
    assert all(length % unit == 0 for length, _ in found.shares)
    assert all(bounds["min"] <= length <= bounds["max"] for length, _ in found.shares)
    assert found.mean_tokens == pytest.approx(mean, abs=unit / 2 + 1)
    assert len(found.shares) <= MOST


def test_few_counted_lengths_are_as_counted_and_many_are_grouped() -> None:
    few = lengths_of(workload({"counts": [[128, 3], [512, 1]]}))
    assert few.shares == ((128, 0.75), (512, 0.25))
    counts = [[128 * n, 100 - n] for n in range(1, 41)]
    many = lengths_of(workload({"counts": counts}))
    mean = sum(length * count for length, count in counts) / sum(count for _, count in counts)
    assert len(many.shares) == MOST
    assert [share for _, share in many.shares] == pytest.approx([0.2] * MOST)
    assert many.mean_tokens == pytest.approx(mean, abs=64)
