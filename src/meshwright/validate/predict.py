"""What the step-time and memory models say of a run, before it is held against its measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from typing import Any

import numpy as np

from meshwright.cost.constants import Constants
from meshwright.planner.estimate import Measured, compose_parts, measure
from meshwright.planner.interval import closest, half_width_of
from meshwright.planner.prices import Conditions, prices
from meshwright.simulator.options import Options
from meshwright.simulator.steady import totals
from meshwright.validate.described import Run
from meshwright.validate.score import Prediction

Array = Any
MOST_PRICED = 8
"""Candidates of a run that are priced: the first, the last and evenly between."""
_SPREAD_80 = 1.2816
"""Standard deviations of a normal distribution on either side that hold 80 % of it."""


@dataclass(frozen=True)
class Prepared:
    """A run whose candidates are priced by curves, so that only the constants are left to choose.

    `beyond` is the logarithm of what a simulation takes over the estimate, by candidate, under constants
    near those to be chosen: with it a fit is one to simulated step times, which it could not afford to run.
    """

    run: Run
    conditions: Conditions
    measured: tuple[Measured, ...]
    beyond: tuple[float, ...] = ()


def conditions_of(run: Run) -> Conditions:
    """What a row states about how it was executed."""
    stated = run.stated
    overlap: Mapping[str, bool] = {}
    if stated.communication_overlap is not None:
        overlap = dict.fromkeys(("tensor", "data", "pipeline"), stated.communication_overlap)
    return Conditions(
        era=stated.era,
        overlap=overlap,
        graphs=stated.graphs,
        fp8_recipe=stated.fp8_recipe,
        balanced=stated.routing != "natural",
        static_experts=stated.static_experts,
    )


def prepare(run: Run) -> Prepared:
    """Price a run's candidates by the curves of kernels and links."""
    stated = conditions_of(run)
    candidates = run.candidates
    if len(candidates) > MOST_PRICED:
        kept = np.linspace(0, len(candidates) - 1, MOST_PRICED).round().astype(int)
        candidates = tuple(candidates[index] for index in kept)
    measured = []
    for candidate in candidates:
        plan = candidate.plan
        priced = prices(plan.cluster, plan.workload.precision, plan.policy.engine, stated)
        measured.append(measure(plan, priced, stated))
    return Prepared(run, stated, tuple(measured))


def step_times(prepared: Prepared, values: Constants | None = None) -> Array:
    """Seconds of a step by priced candidate and set of constants: one set, unless their values are arrays."""
    times = []
    for measured in prepared.measured:
        plan = measured.plan
        priced = prices(
            plan.cluster, plan.workload.precision, plan.policy.engine, prepared.conditions, values
        )
        times.append(compose_parts(measured, priced).total_s)
    return np.stack(np.broadcast_arrays(*times))


def simulated_times(prepared: Prepared, values: Constants | None = None) -> list[float]:
    """Seconds of a simulated step by priced candidate, with one set of constants."""
    options = Options(conditions=prepared.conditions, constants=values)
    return [totals(measured.plan, options).step_time_s for measured in prepared.measured]


def log_time(prepared: Prepared, values: Constants | None = None) -> Array:
    """Natural logarithm of the median candidate's step time, by set of constants; simulated where it is known
    how far that lies beyond the estimate."""
    logs = np.log(step_times(prepared, values))
    if prepared.beyond:
        logs = logs + np.array(prepared.beyond)[:, None]
    return np.median(logs, axis=0)


def simulated(prepared: Prepared, values: Constants | None = None) -> Prepared:
    """The run with how far its simulated steps lie beyond the estimate."""
    estimated = step_times(prepared, values)[:, 0]
    found = np.log(simulated_times(prepared, values)) - np.log(estimated)
    return replace(prepared, beyond=tuple(found.tolist()))


def predicted(
    run: Run, times: Array, memory_bytes: int | None, half_width: float | None = None
) -> Prediction:
    """A run's prediction from its candidates' step times: the median, and an interval that is as wide as the
    residuals of its group and the spread of the candidates together (independent, in logarithms)."""
    logs = np.log(times)
    centre = float(np.median(logs))
    like = closest(run.group, run.generation)
    width = half_width_of(like) if half_width is None else half_width
    width = sqrt(width**2 + spread(times) ** 2)
    open_ = sorted({name for candidate in run.candidates for name in candidate.assumed})
    words = f"80 % of {like} rows lie within a factor {exp(width):.2f}"
    if open_:
        words += f"; not stated: {', '.join(open_)}"
    return Prediction(run.id, exp(centre), exp(centre - width), exp(centre + width), memory_bytes, words)


def spread(times: Array) -> float:
    """What the candidates of a run add to half of its 80 % interval, in logarithms."""
    return _SPREAD_80 * float(np.std(np.log(times)))


def error_of(prepared: Prepared, values: Constants | None = None) -> Array:
    """Logarithm of predicted over measured time, by set of constants. The run must have a measured time."""
    assert prepared.run.measured_s is not None
    return log_time(prepared, values) - log(prepared.run.measured_s)
