"""Pipelines timed by arrays against the action lists, run action by action, and against their papers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planner.orders import ends_of_ranks

from meshwright.errors import InputError
from meshwright.plan import split_layers
from meshwright.planner.pipeline import pipeline_time
from meshwright.planner.slots import Shape, slotted_order
from meshwright.policy import SCHEDULES, ScheduleName


def run(name: ScheduleName, num_ranks: int, count: int, chunks: int, stages: np.ndarray) -> float:
    """Seconds from the first start to the last end when every action of the order is run."""
    number = num_ranks * chunks
    ends = ends_of_ranks(
        name, (num_ranks, chunks, count), stages.tolist(), [0.0] * num_ranks, [[0.0] * number] * 2
    )
    return max(ends)


def time_of(name: ScheduleName, num_ranks: int, count: int, chunks: int, stages: np.ndarray) -> float:
    return float(pipeline_time(name, num_ranks, chunks, count, stages[..., None]).total_s[0])


def equal_stages(number: int, seconds: Sequence[float]) -> np.ndarray:
    return np.repeat(np.array(seconds)[:, None], number, axis=1)


def drawn_stages(data: st.DataObject, number: int, low: float, high: float) -> np.ndarray:
    row = st.lists(st.floats(low, high), min_size=number, max_size=number)
    return np.array([data.draw(row) for _ in range(3)])


times = st.floats(0.05, 3.0)


def chunks_of(name: ScheduleName, data: st.DataObject) -> int:
    if name in ("GPipe", "1F1B"):
        return 1
    return 2 if "V" in name else data.draw(st.integers(2, 4), "chunks")


def count_of(name: ScheduleName, num_ranks: int, data: st.DataObject) -> int:
    """A number of micro-batches that has an order: few, and many rounds of them."""
    if "Interleaved" in name:
        few = list(range(1, num_ranks))
        return data.draw(st.sampled_from([*few, *(num_ranks * k for k in (1, 2, 3, 5, 9, 14))]), "count")
    return data.draw(st.integers(2 * num_ranks if name == "DualPipeV" else 1, 60), "count")


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 6), st.floats(1.0, 4.0), st.data())
def test_every_schedule_is_exact_for_any_stages(
    name: ScheduleName, num_ranks: int, spread: float, data: st.DataObject
) -> None:
    """Stages that differ by up to a factor of sixteen, few micro-batches and many; ranks that may start at
    different times, and what is sent under way for some time."""
    chunks = chunks_of(name, data)
    count, number = count_of(name, num_ranks, data), num_ranks * chunks
    stages = drawn_stages(data, number, 1 / spread, spread)
    rows = [data.draw(st.lists(st.floats(0, 3), min_size=n, max_size=n)) for n in (num_ranks, number, number)]
    sends = num_ranks > 1 and data.draw(st.booleans(), "sends")
    lags = np.array(rows[1:]) * sends
    expected = ends_of_ranks(name, (num_ranks, chunks, count), stages.tolist(), rows[0], lags.tolist())
    columns = [array[..., None] for array in (stages, np.array(rows[0]), lags)]
    found = pipeline_time(
        name, num_ranks, chunks, count, columns[0], columns[1], columns[2] if sends else None
    )
    assert found.ends_s[:, 0].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_stages_that_are_nearly_equal_are_not_taken_for_equal(name: ScheduleName) -> None:
    """A hundred thousandth apart, ranks catch up with one another over hundreds of micro-batches: rounds
    before that grow by nearly, and not by exactly, as much as those after."""
    chunks = 1 if name == "1F1B" else 2
    stages = 1 + 1e-5 * np.random.default_rng(5).uniform(size=(3, 4 * chunks))
    expected = run(name, 4, 400, chunks, stages)
    assert time_of(name, 4, 400, chunks, stages) == pytest.approx(expected, rel=1e-11)


def test_what_has_no_order_is_refused() -> None:
    """30 micro-batches are no whole number of rounds over four ranks."""
    with pytest.raises(InputError, match="equal rounds"):
        time_of("Interleaved1F1B", 4, 30, 2, equal_stages(8, (1.0, 1.0, 1.0)))


def test_nothing_is_run_for_ever() -> None:
    """Not even what is no number."""
    stages = equal_stages(4, (1.0, float("nan"), 1.0))
    assert np.isnan(time_of("1F1B", 4, 100, 1, stages))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(2, 5), st.integers(1, 12), st.floats(0.0, 1.5), st.data())
def test_interleaving_is_exact_for_layers_split_as_evenly_as_they_go(
    num_ranks: int, chunks: int, rounds: int, head: float, data: st.DataObject
) -> None:
    """And a head of up to one and a half layers behind the last: the splits that plans have."""
    count = num_ranks * chunks
    layers = np.array(split_layers(data.draw(st.integers(count, 3 * count)), count), float)
    layers[-1] += head
    stages = np.stack([layers, 2 * layers, 0 * layers])
    expected = run("Interleaved1F1B", num_ranks, num_ranks * rounds, chunks, stages)
    found = time_of("Interleaved1F1B", num_ranks, num_ranks * rounds, chunks, stages)
    assert found == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), times, times, times)
def test_1f1b_fills_and_drains_once(
    num_ranks: int, count: int, forward: float, inner: float, weight: float
) -> None:
    """(m + P − 1)(f + b + w) for equal stages (arXiv:2104.04473 §2.2.1), whatever m is."""
    stages = equal_stages(num_ranks, (forward, inner, weight))
    expected = (count + num_ranks - 1) * (forward + inner + weight)
    assert time_of("1F1B", num_ranks, count, 1, stages) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 9), times, times, times)
def test_interleaving_fills_and_drains_a_chunk(
    num_ranks: int, chunks: int, rounds: int, forward: float, inner: float, weight: float
) -> None:
    """(v·m + P − 1)(f + b + w) for equal stages (arXiv:2104.04473 §2.2.2)."""
    stages = equal_stages(num_ranks * chunks, (forward, inner, weight))
    count = num_ranks * rounds
    expected = (chunks * count + num_ranks - 1) * (forward + inner + weight)
    assert time_of("Interleaved1F1B", num_ranks, count, chunks, stages) == pytest.approx(expected, rel=1e-9)


def test_a_long_order_is_laid_out_short() -> None:
    """A thousand rounds of layers split unevenly, with a head behind them: at most
    eight are laid out and run."""
    layers = np.array([2, 2, 2, 1, 2, 2, 1, 1.7])
    stages = np.stack([layers, 1.1 * layers, 0.9 * layers])[..., None]
    slotted_order.cache_clear()
    long = pipeline_time("Interleaved1F1B", 4, 2, 4 * 1000, stages).total_s
    laid_out = slotted_order.cache_info().currsize
    for rounds in (4, 8):
        slotted_order(Shape("Interleaved1F1B", 4, 2), 4 * rounds)
    assert laid_out <= slotted_order.cache_info().currsize == 2
    short, shorter = (run("Interleaved1F1B", 4, 4 * m, 2, stages[..., 0]) for m in (40, 30))
    assert long[0] == pytest.approx(short + 96 * (short - shorter), rel=1e-9)


def test_arrays_give_what_numbers_give() -> None:
    rng = np.random.default_rng(7)
    stages = rng.uniform(0.5, 1.5, (3, 8, 5))
    count = np.array([8, 12, 16, 20, 24])
    whole = pipeline_time("Interleaved1F1B", 4, 2, count, stages).total_s
    for column in range(5):
        alone = time_of("Interleaved1F1B", 4, int(count[column]), 2, stages[..., column])
        assert whole[column] == pytest.approx(alone, rel=1e-12)


def test_bubble_and_ends_of_1f1b() -> None:
    """(P − 1)/(m + P − 1) of the time is idle; a rank has done its last backward before the ranks above.
    Where the first rank may start later all do, and what waits anyway costs nothing."""
    stages = equal_stages(4, (1.0, 1.0, 1.0))[..., None]
    time = pipeline_time("1F1B", 4, 1, 8, stages)
    assert float(time.bubble_fraction[0]) == pytest.approx(3 / 11)
    assert (time.total_s - time.ends_s)[:, 0].tolist() == [0.0, 2.0, 4.0, 6.0]
    later = pipeline_time("1F1B", 4, 1, 8, stages, np.array([[0.5], [1.5], [0.0], [0.0]]))
    assert (later.ends_s - time.ends_s)[:, 0].tolist() == [0.5] * 4
    assert float(later.bubble_fraction[0]) == pytest.approx(3 / 11)
