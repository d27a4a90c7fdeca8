"""Predictions held against measurements: errors, rankings, intervals and memory, by group.

Every error is (predicted − measured) / measured. A pair is two rows of one group and source with the same
model, GPU, count, batch, length and precision whose measurements differ by more than 2 %.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean, median
from typing import Any

from meshwright.validate.described import GROUPS, Run
from meshwright.validate.refusal import Refusal

DIFFERENT = 0.02
"""Least relative difference of two measurements that a ranking is asked about."""
TIE = 1e-9
"""Relative difference of two predictions within which they are a tie."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is predicted of one run: estimated seconds of a step with an 80 % interval, and peak bytes of
    the worst GPU in the measurement's own view; seconds of the simulated step where it was asked for."""

    id: str
    step_time_s: float
    low_s: float
    high_s: float
    memory_bytes: int | None
    confidence: str
    simulated_s: float | None = None

    def as_simulated(self) -> Prediction:
        """The simulated step time in place of the estimate, in an interval of the same width in
        logarithms. One that was not simulated raises ValueError."""
        if self.simulated_s is None:
            raise ValueError(f"{self.id} was not simulated")
        ratio = self.simulated_s / self.step_time_s
        low, high = self.low_s * ratio, self.high_s * ratio
        return replace(self, step_time_s=self.simulated_s, low_s=low, high_s=high)


@dataclass(frozen=True, slots=True)
class Scored:
    """A run with its prediction."""

    run: Run
    prediction: Prediction


def score(
    runs: Sequence[Run], refusals: Sequence[Refusal], predictions: Iterable[Prediction]
) -> dict[str, Any]:
    """The answer of `validate`, ready for JSON. A run without a prediction raises KeyError."""
    by_id = {prediction.id: prediction for prediction in predictions}
    scored = [Scored(run, by_id[run.id]) for run in runs]
    return {
        "rows": len(runs) + len(refusals),
        "scored": len(scored),
        "refused": dict(Counter(refusal.reason for refusal in refusals).most_common()),
        "groups": {group: group_score([s for s in scored if s.run.group == group]) for group in GROUPS},
        "predictions": [_record(s) for s in scored],
    }


def group_score(scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """Time and memory of one group, and time by simulation where every run was simulated; None where no row
    stands behind a figure."""
    found = {"time": _time(scored), "memory": _memory(scored)}
    if scored and all(s.prediction.simulated_s is not None for s in scored):
        found["simulated"] = _time([Scored(s.run, s.prediction.as_simulated()) for s in scored])
    return found


def _time(scored: Sequence[Scored]) -> dict[str, Any]:
    timed = [(s.prediction, s.run.measured_s) for s in scored if s.run.measured_s]
    errors = [(p.step_time_s - measured) / measured for p, measured in timed]
    every, equal = pairs(scored), pairs(scored, _same_micro_batch)
    return {
        **errors_of(errors),
        "pair_ranking": ranking(every),
        "pairs": len(every),
        "pair_ranking_equal_micro_batch": ranking(equal),
        "pairs_equal_micro_batch": len(equal),
        "coverage_80": _mean([float(p.low_s <= measured <= p.high_s) for p, measured in timed]),
        "interval_half_width": _median([(p.high_s - p.low_s) / 2 / p.step_time_s for p, _ in timed]),
    }


def _memory(scored: Sequence[Scored]) -> dict[str, Any]:
    weighed = [
        (s.prediction.memory_bytes, s.run.memory.bytes)
        for s in scored
        if s.run.memory is not None and s.prediction.memory_bytes is not None
    ]
    return errors_of([(predicted - measured) / measured for predicted, measured in weighed])


def errors_of(errors: Sequence[float]) -> dict[str, Any]:
    """Mean, median and largest absolute error, and the mean signed one, as fractions."""
    sizes = [abs(error) for error in errors]
    return {
        "rows": len(errors),
        "mape": _mean(sizes),
        "median_ape": _median(sizes),
        "max_ape": max(sizes, default=None),
        "bias": _mean(errors),
    }


def pairs(
    scored: Sequence[Scored], also: Callable[[Run, Run], bool] = lambda one, other: True
) -> list[tuple[Scored, Scored]]:
    """Pairs of rows that a ranking is asked about, the measured faster one first."""
    alike: dict[tuple[object, ...], list[Scored]] = defaultdict(list)
    for s in scored:
        if s.run.row.global_batch_size is not None:
            alike[_shared(s.run)].append(s)
    return list(_ordered(alike, also))


def _ordered(
    alike: Mapping[tuple[object, ...], list[Scored]], also: Callable[[Run, Run], bool]
) -> Iterator[tuple[Scored, Scored]]:
    for members in alike.values():
        for one, other in combinations(members, 2):
            speeds = _speeds(one.run, other.run)
            if speeds is None or not also(one.run, other.run):
                continue
            if max(speeds) > (1 + DIFFERENT) * min(speeds):
                yield (one, other) if speeds[0] > speeds[1] else (other, one)


def _shared(run: Run) -> tuple[object, ...]:
    row = run.row
    return (
        row.model,
        row.gpu,
        row.num_gpus,
        row.global_batch_size,
        row.sequence_length,
        row.precision.lower(),
        row.source,
    )


def _speeds(one: Run, other: Run) -> tuple[float, float] | None:
    """How fast two runs of the same work went: by their times, else by one definition of throughput."""
    if one.measured_s and other.measured_s:
        return 1 / one.measured_s, 1 / other.measured_s
    if one.throughput is None or other.throughput is None:
        return None
    if one.throughput.definition != other.throughput.definition:
        return None
    return one.throughput.value, other.throughput.value


def _same_micro_batch(one: Run, other: Run) -> bool:
    return one.row.micro_batch_size is not None and one.row.micro_batch_size == other.row.micro_batch_size


def ranking(found: Sequence[tuple[Scored, Scored]]) -> float | None:
    """Share of pairs that predictions put in the measured order; a predicted tie counts one half."""
    return _mean([_rank(faster.prediction, slower.prediction) for faster, slower in found])


def _rank(faster: Prediction, slower: Prediction) -> float:
    if abs(faster.step_time_s - slower.step_time_s) <= TIE * max(faster.step_time_s, slower.step_time_s):
        return 0.5
    return float(faster.step_time_s < slower.step_time_s)


def _record(s: Scored) -> dict[str, Any]:
    return {
        "id": s.run.id,
        "group": s.run.group,
        "step_time_s": s.prediction.step_time_s,
        "low_s": s.prediction.low_s,
        "high_s": s.prediction.high_s,
        "measured_s": s.run.measured_s,
        "memory_bytes": s.prediction.memory_bytes,
        "measured_memory_bytes": s.run.memory.bytes if s.run.memory else None,
        "confidence": s.prediction.confidence,
        **({} if s.prediction.simulated_s is None else {"simulated_step_time_s": s.prediction.simulated_s}),
    }


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
