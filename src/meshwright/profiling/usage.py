"""Where the time of a rank goes: compute, communication hidden and exposed by axis, and neither.

Overlap is that of Holistic Trace Analysis (`hta/analyzers/communication_analysis.py`): time in which both
communication and compute run, over all time in which communication runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from meshwright.profiling.spans import beyond, common, length, merged, within
from meshwright.profiling.trace import RankTrace


@dataclass(frozen=True, slots=True)
class AxisUse:
    """Communication along an axis in one step: seconds in which any runs, those beside compute, and calls
    and bytes."""

    axis: str
    seconds: float
    hidden_s: float
    calls: float
    bytes: float

    @property
    def exposed_s(self) -> float:
        """Seconds of communication beside which nothing is computed."""
        return self.seconds - self.hidden_s

    @property
    def hidden_fraction(self) -> float:
        """Overlap: communication beside compute over all of it, 0 without any."""
        return self.hidden_s / self.seconds if self.seconds else 0.0

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "axis": self.axis,
            "seconds": self.seconds,
            "hidden_s": self.hidden_s,
            "exposed_s": self.exposed_s,
            "hidden_fraction": self.hidden_fraction,
            "calls": self.calls,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class RankUse:
    """One rank in one step, the mean over those that were profiled. `idle_s`: neither compute nor
    communication runs; on processors that is the host between ops."""

    rank: int
    step_s: float
    compute_s: float
    comm_s: float
    hidden_s: float
    idle_s: float
    axes: tuple[AxisUse, ...]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        fields = {**vars(self), "axes": [axis.document() for axis in self.axes]}
        return fields | {"exposed_s": self.comm_s - self.hidden_s}


def rank_use(trace: RankTrace) -> RankUse:
    """How a rank spends the mean of its profiled steps."""
    count, window = len(trace.steps), trace.window
    inside = beyond(beyond([window], []), _between(trace.steps))
    compute = common(within(trace.compute, window), inside)
    comm = common(merged((c.start_s, c.end_s) for c in trace.collectives), inside)
    total = length(inside)
    busy = length(merged([*compute, *comm]))
    axes = sorted({c.axis for c in trace.collectives})
    return RankUse(
        trace.rank,
        total / count,
        length(compute) / count,
        length(comm) / count,
        length(common(comm, compute)) / count,
        (total - busy) / count,
        tuple(_axis_use(trace, axis, compute, inside) for axis in axes),
    )


def _between(steps: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """What lies between the steps."""
    return [(one[1], other[0]) for one, other in pairwise(steps) if other[0] > one[1]]


def _axis_use(
    trace: RankTrace,
    axis: str,
    compute: list[tuple[float, float]],
    inside: list[tuple[float, float]],
) -> AxisUse:
    count = len(trace.steps)
    own = [c for c in trace.collectives if c.axis == axis]
    spans = common(merged((c.start_s, c.end_s) for c in own), inside)
    called = [c for c in own if c.kind != "recv"]
    return AxisUse(
        axis,
        length(spans) / count,
        length(common(spans, compute)) / count,
        len(called) / count,
        sum(c.bytes for c in called) / count,
    )
