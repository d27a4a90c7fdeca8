"""A prediction is the median of what a row may mean, and less sure the more it leaves open."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest
from tests.validate.run_rows import EXPERTS, row_of
from tests.validate.synthetic import run_of

from meshwright.cost.constants import constants
from meshwright.planner.estimate import estimate
from meshwright.planner.interval import half_width_of
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import simulate
from meshwright.validate.predict import (
    MOST_PRICED,
    conditions_of,
    error_of,
    log_time,
    predicted,
    prepare,
    simulated_times,
    spread,
    step_times,
)
from meshwright.validate.score import Prediction

OPEN: dict[str, Any] = {"micro_batch_size": None, "recompute": "", "pp": 2, "vpp": None, "num_gpus": 16}


def test_a_row_that_states_everything_has_one_plan_and_its_time() -> None:
    run = run_of(row_of())
    prepared = prepare(run)
    times = step_times(prepared)
    assert times.shape == (1, 1)
    plain = estimate(run.candidates[0].plan, conditions_of(run)).total_s
    assert times[0, 0] == pytest.approx(plain, rel=1e-12)
    assert spread(times) == 0
    prediction = predicted(run, times, 123)
    assert (prediction.id, prediction.memory_bytes) == (run.id, 123)
    assert prediction.step_time_s == pytest.approx(plain)
    width = half_width_of("dense/hopper")
    assert log(prediction.high_s / plain) == pytest.approx(width)
    assert log(plain / prediction.low_s) == pytest.approx(width)


def test_the_prediction_is_the_median_of_the_candidates() -> None:
    run = run_of(row_of(**OPEN))
    times = step_times(prepare(run))
    assert times.shape[0] > 2
    prediction = predicted(run, times, None)
    assert prediction.step_time_s == pytest.approx(float(np.exp(np.median(np.log(times)))))
    assert times.min() < prediction.step_time_s < times.max()
    for name in ("micro_batch_size", "recompute", "vpp"):
        assert name in prediction.confidence


def test_what_is_left_open_widens_the_interval() -> None:
    def width(**given: Any) -> float:
        run = run_of(row_of(**given))
        prediction = predicted(run, step_times(prepare(run)), None, half_width=0.1)
        return log(prediction.high_s / prediction.low_s) / 2

    stated = {**OPEN, "micro_batch_size": 1, "recompute": "none", "vpp": 1}
    widths = [width(**stated), width(**{**stated, "vpp": None}), width(**OPEN)]
    assert widths[0] == pytest.approx(0.1)
    assert widths[0] < widths[1] < widths[2]


def test_a_width_that_is_given_replaces_the_groups() -> None:
    run = run_of(row_of())
    times = step_times(prepare(run))
    wide, narrow = (predicted(run, times, None, half_width=width) for width in (0.5, 0.1))
    assert wide.step_time_s == narrow.step_time_s
    assert wide.low_s < narrow.low_s < narrow.high_s < wide.high_s


def test_at_most_a_few_candidates_are_priced_and_the_ends_are_among_them() -> None:
    run = run_of(row_of(**{**OPEN, **EXPERTS, "ep": None, "etp": None}, tp=2))
    assert len(run.candidates) > MOST_PRICED
    plans = [measured.plan for measured in prepare(run).measured]
    assert len(plans) == MOST_PRICED
    assert plans[0] is run.candidates[0].plan
    assert plans[-1] is run.candidates[-1].plan


def test_constants_that_are_arrays_give_every_time_at_once() -> None:
    prepared = prepare(run_of(row_of(**OPEN)))
    values = constants()
    known = values.slowdown["hopper"].value
    points = np.array([known, 1.2 * known, 2.0 * known])
    times = step_times(prepared, values.replaced("slowdown.hopper", {"value": points}))
    assert times.shape[1] == 3
    for column, value in enumerate(points):
        alone = step_times(prepared, values.changed({"slowdown.hopper": float(value)}))[:, 0]
        assert times[:, column] == pytest.approx(alone, rel=1e-12)
    assert np.all(np.diff(times, axis=1) > 0)


def test_an_error_is_the_logarithm_of_predicted_over_measured() -> None:
    prepared = prepare(run_of(row_of()))
    seconds = float(np.exp(log_time(prepared)[0]))
    twice = replace(prepared, run=replace(prepared.run, measured_s=seconds / 2))
    assert float(error_of(twice)[0]) == pytest.approx(log(2))


def test_conditions_are_what_the_row_states() -> None:
    plain = conditions_of(run_of(row_of()))
    assert dict(plain.overlap) == {}
    assert plain.balanced
    told = row_of(dispatcher_overlap="no comm overlap; no cuda graph", routing="natural", **EXPERTS)
    stated = conditions_of(run_of(told))
    assert stated.overlap == {"tensor": False, "data": False, "pipeline": False}
    assert stated.graphs == "none"
    assert not stated.balanced
    capacity = conditions_of(run_of(row_of(routing="capacity factor 1.0", **EXPERTS)))
    assert capacity.static_experts


def test_a_simulated_time_is_that_of_the_simulator_under_the_same_constants() -> None:
    run = run_of(row_of(**EXPERTS, pp=2, num_gpus=16))
    prepared = prepare(run)
    options = Options(conditions=conditions_of(run))
    plain = simulated_times(prepared)
    assert plain == pytest.approx([simulate(one.plan, options).step_time_s for one in prepared.measured])
    slower = constants().changed({"slowdown.hopper": 2 * constants().slowdown["hopper"].value})
    assert all(one > other for one, other in zip(simulated_times(prepared, slower), plain, strict=True))


def test_the_interval_moves_with_the_simulated_time() -> None:
    found = Prediction("a", 2.0, 1.0, 4.0, None, "", simulated_s=3.0).as_simulated()
    assert (found.step_time_s, found.low_s, found.high_s) == (3.0, 1.5, 6.0)
    with pytest.raises(ValueError, match="a was not simulated"):
        Prediction("a", 2.0, 1.0, 4.0, None, "").as_simulated()
