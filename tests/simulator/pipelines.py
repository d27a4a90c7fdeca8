"""Random pipelines: schedules with seconds of every action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from hypothesis import strategies as st

from meshwright.ir.schedule import Action, ActionKind, Schedule, build_schedule
from meshwright.policy import ScheduleName
from meshwright.simulator.engine import Send, Work

F, B, I, W = (  # noqa: E741
    ActionKind.FORWARD,
    ActionKind.BACKWARD,
    ActionKind.INPUT_GRADIENT,
    ActionKind.WEIGHT_GRADIENT,
)
NAMES: tuple[ScheduleName, ...] = get_args(ScheduleName)
SECONDS = st.floats(0.05, 3.0)


@dataclass(frozen=True)
class Pipeline:
    """A schedule and what its actions take."""

    schedule: Schedule
    work: Work

    def seconds(self, action: Action) -> float:
        """What an action takes, without sends."""
        total = 0.0
        for part in action.simple_actions:
            for kind in (I, W) if part.kind is B else (part.kind,):
                total += self.work.seconds[kind][part.stage][part.micro_batch or 0]
        return total

    def shown(self, action: Action) -> float:
        """What its sends keep the rank for."""
        total = 0.0
        for part in action.simple_actions:
            kind = F if part.kind is F else I
            send = self.work.sends[kind][part.stage] if kind in self.work.sends else None
            total += send.shown_s if send is not None and part.kind is not W else 0.0
        return total


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule over at most five ranks."""
    name = draw(st.sampled_from(NAMES))
    ranks = draw(st.integers(1, 5))
    chunks = {"GPipe": 1, "1F1B": 1, "ZBVZeroBubble": 2, "DualPipeV": 2}.get(name) or draw(st.integers(1, 3))
    count = draw(st.integers(1, 8))
    if name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        count = ranks * draw(st.integers(1, 3))
    if name == "DualPipeV":
        count += 2 * ranks
    return build_schedule(name, ranks, count, chunks)


def uniform(schedule: Schedule, f: float, i: float, w: float) -> Work:
    """The same seconds for every stage and micro-batch."""
    return by_stage([[seconds] * schedule.num_stages for seconds in (f, i, w)], schedule.num_micro_batches)


def by_stage(stages: Sequence[Sequence[float]], count: int) -> Work:
    """The same seconds for every micro-batch."""
    rows = [[[seconds] * count for seconds in kind] for kind in stages]
    return Work(dict(zip((F, I, W), rows, strict=True)))


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Any schedule with seconds of its own for every stage and micro-batch, and sends between ranks."""
    schedule = draw(schedules())
    size = schedule.num_micro_batches
    row = st.lists(SECONDS, min_size=size, max_size=size)
    seconds = {kind: [draw(row) for _ in range(schedule.num_stages)] for kind in (F, I, W)}
    home = {stage: rank for rank, own in enumerate(schedule.stages_of_rank) for stage in own}
    shown, hidden = draw(st.floats(0, 1)), draw(st.floats(0, 1))

    def send(stage: int, other: int) -> Send | None:
        leaves = 0 <= other < schedule.num_stages and home[other] != home[stage]
        return Send(shown, hidden, 0) if leaves else None

    stages = range(schedule.num_stages)
    sends = {F: [send(s, s + 1) for s in stages], I: [send(s, s - 1) for s in stages]}
    return Pipeline(schedule, Work(seconds, sends if draw(st.booleans()) else {}))
