"""Closed forms of pipelines against the action lists, run action by action."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.ir.schedule import Action, ActionKind, build_schedule, run_in_order
from meshwright.plan import split_layers
from meshwright.planner.pipeline import pipeline_time
from meshwright.policy import ScheduleName


def run(name: ScheduleName, num_ranks: int, count: int, chunks: int, stages: np.ndarray) -> float:
    """Seconds from the first start to the last end when every action of the order is run."""
    forward, inner, weight = stages

    def seconds(action: Action) -> float:
        total = 0.0
        for part in action.simple_actions:
            match part.kind:
                case ActionKind.FORWARD:
                    total += forward[part.stage]
                case ActionKind.BACKWARD:
                    total += inner[part.stage] + weight[part.stage]
                case ActionKind.INPUT_GRADIENT:
                    total += inner[part.stage]
                case _:
                    total += weight[part.stage]
        return float(total)

    spans = run_in_order(build_schedule(name, num_ranks, count, chunks), seconds)
    return max(rank_spans[-1][1] for rank_spans in spans)


def closed(name: ScheduleName, num_ranks: int, count: int, chunks: int, stages: np.ndarray) -> float:
    return float(pipeline_time(name, num_ranks, chunks, count, stages[..., None]).total_s[0])


def equal_stages(number: int, seconds: Sequence[float]) -> np.ndarray:
    return np.repeat(np.array(seconds)[:, None], number, axis=1)


def drawn_stages(data: st.DataObject, number: int, low: float, high: float) -> np.ndarray:
    row = st.lists(st.floats(low, high), min_size=number, max_size=number)
    return np.array([data.draw(row) for _ in range(3)])


times = st.floats(0.05, 3.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_gpipe_is_exact_for_any_stages(num_ranks: int, count: int, data: st.DataObject) -> None:
    stages = drawn_stages(data, num_ranks, 0.05, 3.0)
    assert closed("GPipe", num_ranks, count, 1, stages) == pytest.approx(
        run("GPipe", num_ranks, count, 1, stages), rel=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 14), times, times, times)
def test_1f1b_is_exact_for_equal_stages(
    num_ranks: int, count: int, forward: float, inner: float, weight: float
) -> None:
    """With fewer micro-batches than ranks too."""
    stages = equal_stages(num_ranks, (forward, inner, weight))
    assert closed("1F1B", num_ranks, count, 1, stages) == pytest.approx(
        run("1F1B", num_ranks, count, 1, stages), rel=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(0, 8), st.data())
def test_uneven_1f1b_is_a_close_lower_bound(num_ranks: int, more: int, data: st.DataObject) -> None:
    """Stages that differ by up to a factor two: never more than the order takes, and at most 4 % less."""
    stages = drawn_stages(data, num_ranks, 0.7, 1.4)
    count = num_ranks + more
    expected = run("1F1B", num_ranks, count, 1, stages)
    assert 0.96 * expected <= closed("1F1B", num_ranks, count, 1, stages) <= expected * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.data())
def test_uneven_1f1b_of_few_micro_batches_is_a_lower_bound(num_ranks: int, data: st.DataObject) -> None:
    stages = drawn_stages(data, num_ranks, 0.3, 3.0)
    count = data.draw(st.integers(1, num_ranks))
    expected = run("1F1B", num_ranks, count, 1, stages)
    assert closed("1F1B", num_ranks, count, 1, stages) <= expected * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 4), times, times, times)
def test_interleaving_is_exact_for_equal_stages(
    num_ranks: int, chunks: int, rounds: int, forward: float, inner: float, weight: float
) -> None:
    stages = equal_stages(num_ranks * chunks, (forward, inner, weight))
    count = num_ranks * rounds
    expected = run("Interleaved1F1B", num_ranks, count, chunks, stages)
    assert closed("Interleaved1F1B", num_ranks, count, chunks, stages) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8, 16]), st.integers(2, 5), st.integers(1, 6), st.floats(0.0, 1.5), st.data())
def test_uneven_interleaving_lies_within_its_error(
    num_ranks: int, chunks: int, rounds: int, head: float, data: st.DataObject
) -> None:
    """Layers split as evenly as they go, and a head of up to one and a half layers behind the last."""
    count = num_ranks * chunks
    layers = np.array(split_layers(data.draw(st.integers(count, 3 * count)), count), float)
    layers[-1] += head
    stages = np.stack([layers, 2 * layers, 0 * layers])
    expected = run("Interleaved1F1B", num_ranks, num_ranks * rounds, chunks, stages)
    found = closed("Interleaved1F1B", num_ranks, num_ranks * rounds, chunks, stages)
    assert found == pytest.approx(expected, rel=0.135)


@pytest.mark.parametrize(("num_ranks", "count", "chunks"), [(4, 2, 2), (8, 4, 2), (8, 4, 4), (8, 2, 2)])
def test_interleaving_with_fewer_micro_batches_than_ranks(num_ranks: int, count: int, chunks: int) -> None:
    stages = equal_stages(num_ranks * chunks, (1.0, 1.5, 0.5))
    expected = run("Interleaved1F1B", num_ranks, count, chunks, stages)
    assert closed("Interleaved1F1B", num_ranks, count, chunks, stages) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(2, 3), st.integers(2, 3), times, times, times)
def test_interleaved_zero_bubble_is_exact_for_equal_stages(
    num_ranks: int, chunks: int, rounds: int, forward: float, inner: float, weight: float
) -> None:
    stages = equal_stages(num_ranks * chunks, (forward, inner, weight))
    count = num_ranks * rounds
    expected = run("InterleavedZeroBubble", num_ranks, count, chunks, stages)
    assert closed("InterleavedZeroBubble", num_ranks, count, chunks, stages) == pytest.approx(
        expected, rel=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["ZBVZeroBubble", "DualPipeV"]), st.integers(2, 6), times, times, times)
def test_v_schedules_within_two_per_cent_for_equal_stages(
    name: ScheduleName, num_ranks: int, forward: float, inner: float, weight: float
) -> None:
    stages = equal_stages(2 * num_ranks, (forward, inner, weight))
    count = 3 * num_ranks
    expected = run(name, num_ranks, count, 2, stages)
    assert closed(name, num_ranks, count, 2, stages) == pytest.approx(expected, rel=0.02)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(2, 3), st.integers(2, 4), st.data())
def test_uneven_interleaving_stays_near(
    num_ranks: int, chunks: int, rounds: int, data: st.DataObject
) -> None:
    """Stages that differ by up to 10 %: the closed form is an approximation, and a good one."""
    stages = drawn_stages(data, num_ranks * chunks, 0.9, 1.1)
    count = num_ranks * rounds
    expected = run("Interleaved1F1B", num_ranks, count, chunks, stages)
    assert closed("Interleaved1F1B", num_ranks, count, chunks, stages) == pytest.approx(expected, rel=0.135)


def test_arrays_give_what_numbers_give() -> None:
    rng = np.random.default_rng(7)
    stages = rng.uniform(0.5, 1.5, (3, 8, 5))
    count = np.array([8, 12, 16, 20, 24])
    whole = pipeline_time("Interleaved1F1B", 4, 2, count, stages).total_s
    for column in range(5):
        alone = closed("Interleaved1F1B", 4, int(count[column]), 2, stages[..., column])
        assert whole[column] == pytest.approx(alone, rel=1e-12)


def test_bubble_and_slack_of_1f1b() -> None:
    """(P − 1)/(m + P − 1) of the time is idle; a rank has done its last backward before the ranks above."""
    stages = equal_stages(4, (1.0, 1.0, 1.0))
    time = pipeline_time("1F1B", 4, 1, 8, stages[..., None])
    assert float(time.bubble_fraction[0]) == pytest.approx(3 / 11)
    assert time.slack_s[:, 0].tolist() == [0.0, 2.0, 4.0, 6.0]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["ZBVZeroBubble", "InterleavedZeroBubble"]),
    st.integers(2, 8),
    st.floats(0.5, 2.5),
    st.floats(0.5, 1.5),
    st.data(),
)
def test_zero_bubble_of_few_micro_batches(
    name: ScheduleName, num_ranks: int, inner: float, weight: float, data: st.DataObject
) -> None:
    """Too few micro-batches to fill the pipeline: what its length alone costs is not forgotten. One forward
    takes 1, so that the others are what they are in transformers."""
    most = 2 * num_ranks - 1 if name == "ZBVZeroBubble" else num_ranks
    count = data.draw(st.integers(1, most))
    stages = equal_stages(2 * num_ranks, (1.0, inner, weight))
    expected = run(name, num_ranks, count, 2, stages)
    least = 0.95 if name == "ZBVZeroBubble" else 0.8
    assert least * expected <= closed(name, num_ranks, count, 2, stages) <= 1.05 * expected
