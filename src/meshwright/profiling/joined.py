"""Predicted against measured, joined by module and by collective, the largest disagreements first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.profiling.predicted import CommKey, OpKey, Predicted, starred
from meshwright.profiling.trace import RankTrace


@dataclass(frozen=True, slots=True)
class Row:
    """One module in one direction, or one kind of collective on one axis: seconds of a step on all stages
    together, the mean over the ranks of a stage. None where the other side alone has it."""

    what: str
    part: str
    predicted_s: float | None
    measured_s: float | None

    @property
    def apart_s(self) -> float:
        """How far the two are apart."""
        return abs((self.predicted_s or 0.0) - (self.measured_s or 0.0))

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "what": self.what,
            "part": self.part,
            "predicted_s": self.predicted_s,
            "measured_s": self.measured_s,
        }


def joined(predicted: Predicted, traces: Sequence[RankTrace], ranks_of_stage: int) -> list[Row]:
    """All rows, those that disagree most first."""
    comm = measured_comm(traces, ranks_of_stage)
    rows = ops_joined(predicted.ops, traces, ranks_of_stage)
    keys = {**predicted.comm, **comm}
    rows += [
        Row(f"{kind} over {axis}", "communication", *_pair(predicted.comm, comm, (axis, kind)))
        for axis, kind in keys
    ]
    return sorted(rows, key=lambda row: (-row.apart_s, row.what, row.part))


def ops_joined(
    predicted: Mapping[OpKey, float], traces: Sequence[RankTrace], ranks_of_stage: int
) -> list[Row]:
    """The rows of modules, those that disagree most first; none where none was timed."""
    ops = measured_ops(traces, ranks_of_stage)
    if not ops:
        return []
    rows = [Row(name, part, *_pair(predicted, ops, (name, part))) for name, part in {**predicted, **ops}]
    return sorted(rows, key=lambda row: (-row.apart_s, row.what, row.part))


def _pair(
    one: Mapping[tuple[str, str], float], other: Mapping[tuple[str, str], float], key: tuple[str, str]
) -> tuple[float | None, float | None]:
    return one.get(key), other.get(key)


def measured_ops(traces: Sequence[RankTrace], ranks_of_stage: int) -> dict[OpKey, float]:
    """Seconds of one step by module and direction."""
    seconds: defaultdict[OpKey, float] = defaultdict(float)
    for trace in traces:
        share = 1.0 / (ranks_of_stage * len(trace.steps))
        for direction, own in (("forward", trace.forward), ("backward", trace.backward)):
            for name, took in own.items():
                seconds[starred(name), direction] += share * took
    return dict(seconds)


def measured_comm(traces: Sequence[RankTrace], ranks_of_stage: int) -> dict[CommKey, float]:
    """Seconds of one step by axis and kind, waiting for the other ranks included."""
    seconds: defaultdict[CommKey, float] = defaultdict(float)
    for trace in traces:
        share = 1.0 / (ranks_of_stage * len(trace.steps))
        for call in trace.collectives:
            if call.kind != "recv":
                seconds[call.axis, call.kind] += share * (call.end_s - call.start_s)
    return dict(seconds)
