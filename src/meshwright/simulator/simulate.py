"""One training step of a plan, simulated: how long it takes, what it waits for, and what happens when."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshwright.errors import InputError
from meshwright.ir.program import Program, lower
from meshwright.ir.schedule import ActionKind
from meshwright.plan import Plan
from meshwright.simulator.ending import Ending, RankStep, beside, ending, rank_steps
from meshwright.simulator.engine import Run, Work, run
from meshwright.simulator.events import Inside, exposed_of, timeline_of
from meshwright.simulator.options import Options
from meshwright.simulator.path import CriticalPath, critical_path
from meshwright.simulator.work import Priced, coupled_ranks, priced_program
from meshwright.timeline import Timeline

EVENTS_ONCE = 5
"""Events of a rank once per step: gathering, reducing, scalars, optimizer, what is outside the model."""


@dataclass(frozen=True, slots=True)
class RankUse:
    """How one simulated rank spends a step. It stands for `stands_for` ranks that do the same: all of a
    stage, or those of a pipeline where each pipeline is run. What it waits for its own communication is
    busy."""

    pipeline: int
    rank: int
    stands_for: int
    busy_s: float
    idle_s: float


@dataclass(frozen=True)
class Simulated:
    """A simulated step.

    `bubble_fraction` is the mean idle share of the ranks while micro-batches run, from 0 to 1;
    `exposed_comm_s` what the busiest rank waits for communication, by axis; `phases` the start and end of
    warm-up, steady state, cool-down, reduction, optimizer (with scalars, and what is outside the model) and
    gathering, where 0 is the start of the gathering that the first forward waits for; `events` counts all
    that was simulated, `wall_s` is how long that took.
    """

    step_time_s: float
    bubble_fraction: float
    exposed_comm_s: Mapping[str, float]
    critical_path: CriticalPath
    events: int
    wall_s: float
    ranks: tuple[RankUse, ...]
    phases: Mapping[str, tuple[float, float]]
    _kept: Kept = field(repr=False, compare=False)

    def timeline(self) -> Timeline:
        """Every event of the pipeline that ends last."""
        kept, last = self._kept, self._kept.last
        return timeline_of(
            kept.priced, kept.runs[last], kept.insides[last], kept.steps[last], kept.ends[last]
        )


@dataclass(frozen=True)
class Kept:
    """All that ran, by pipeline; `last` is the one that ends last."""

    priced: Priced
    runs: tuple[Run, ...]
    insides: tuple[Inside, ...]
    steps: tuple[tuple[RankStep, ...], ...]
    ends: tuple[Ending, ...]

    @property
    def last(self) -> int:
        return max(range(len(self.ends)), key=lambda one: self.ends[one].total_s)


@dataclass(frozen=True)
class Sampled:
    """Step times and bubbles of many draws of a step; `wall_s` is how long all of them took."""

    step_time_s: tuple[float, ...]
    bubble_fraction: tuple[float, ...]
    wall_s: float

    def quantile(self, fraction: float) -> float:
        """The step time that this share of draws does not pass: the nearest draw, fraction 0 to 1."""
        ordered = sorted(self.step_time_s)
        return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]


def simulate(plan: Plan | Program, options: Options | None = None) -> Simulated:
    """Simulate one step of a plan, or of a program that is lowered already at the options' sequence length.

    Raises InputError where the batch has no micro-batch for every rank, or no order exists.
    """
    began = time.perf_counter()
    asked = options or Options()
    kept = run_all(lowered(plan, asked), asked, 1)
    return _simulated(kept, began)


def sample_steps(plan: Plan | Program, options: Options, samples: int) -> Sampled:
    """Many draws of one step: imbalance and stragglers drawn anew for each. Raises as `simulate` does."""
    began = time.perf_counter()
    if samples < 1:
        raise InputError("samples", samples, "at least one draw", [1])
    if options.every_rank:
        rule = "many draws are taken of one pipeline that stands for all"
        raise InputError("every_rank", True, rule, [False])
    kept = run_all(lowered(plan, options), options, samples)
    seconds = tuple(end.total_s for end in kept.ends)
    bubbles = tuple(_bubble([one]) for one in kept.runs)
    return Sampled(seconds, bubbles, time.perf_counter() - began)


def lowered(plan: Plan | Program, options: Options) -> Program:
    program = lower(plan, options.sequence_length) if isinstance(plan, Plan) else plan
    if program.plan.num_micro_batches < 1:
        ranks = program.plan.layout.dp * program.plan.policy.micro_batch_size
        rule = f"a step needs a micro-batch on each data-parallel rank: at least {ranks} sequences"
        given = program.plan.workload.global_batch_size
        raise InputError("workload.global_batch_size", given, rule, [ranks])
    return program


def run_all(program: Program, options: Options, samples: int) -> Kept:
    """Run every pipeline that is asked for, or so many draws of one that stands for all."""
    priced = priced_program(program, options, samples)
    schedule = program.schedule
    runs, insides, steps = [], [], []
    for pipeline in range(priced.num_pipelines):
        inside = Inside(priced, pipeline)
        own = rank_steps(priced, pipeline)
        contending = options.contention
        work = Work(
            priced.seconds(pipeline),
            priced.sends,
            [step.gather_s for step in own],
            beside(priced, own) if contending else (),
            inside.stretches if contending else None,
        )
        runs.append(run(schedule, work))
        insides.append(inside)
        steps.append(own)
    return Kept(priced, tuple(runs), tuple(insides), tuple(steps), ending(priced, runs, steps))


def _simulated(kept: Kept, began: float) -> Simulated:
    last = kept.last
    end, one, inside = kept.ends[last], kept.runs[last], kept.insides[last]
    step_time_s = end.total_s
    cluster = kept.priced.program.plan.cluster
    path = critical_path(cluster, kept.runs, kept.insides, kept.ends, kept.steps, last)
    events = sum(
        sum(inside.count(done) for done in all_done) + EVENTS_ONCE
        for run_, inside in zip(kept.runs, kept.insides, strict=True)
        for all_done in run_.done
    ) + sum(len(windows) for run_ in kept.runs for windows in run_.data_s)
    return Simulated(
        step_time_s=step_time_s,
        bubble_fraction=_bubble(kept.runs),
        exposed_comm_s=_exposed(one, inside, kept.steps[last], end),
        critical_path=path,
        events=events,
        wall_s=time.perf_counter() - began,
        ranks=_uses(kept, step_time_s),
        phases=_phases(one, kept.steps[last], end),
        _kept=kept,
    )


def _bubble(runs: Sequence[Run]) -> float:
    """Mean idle share over the time from the first start of a rank to the last end of any."""
    shares = []
    for one in runs:
        start = min(done[0].start_s for done in one.done if done)
        total = one.total_s - start
        ranks = range(one.schedule.num_ranks)
        idle = 1 - sum(one.busy_s(rank) for rank in ranks) / (len(ranks) * total) if total else 0.0
        shares.append(max(idle, 0.0))
    return sum(shares) / len(shares)


def _exposed(one: Run, inside: Inside, steps: Sequence[RankStep], end: Ending) -> dict[str, float]:
    """What the rank with most work waits for communication, by axis."""
    rank = max(range(one.schedule.num_ranks), key=one.busy_s)
    shown = dict.fromkeys(("tp", "cp", "ep", "etp", "dp", "pp"), 0.0)
    for done in one.done[rank]:
        for axis, seconds in exposed_of(done, inside).items():
            shown[axis] += seconds
    over = max(one.drained_s(rank) - one.done[rank][-1].end_s, 0.0)
    shown["dp"] += steps[rank].gather_s + over + end.reduced_s[rank] - end.started_s[rank]
    return shown


def _uses(kept: Kept, step_time_s: float) -> tuple[RankUse, ...]:
    layout = kept.priced.program.plan.layout
    every = kept.priced.options.every_rank
    stands_for = coupled_ranks(layout) if every else layout.tp * layout.cp * layout.dp
    uses = []
    for pipeline, (one, steps) in enumerate(zip(kept.runs, kept.steps, strict=True)):
        for rank, step in enumerate(steps):
            once = step.gather_s + step.reduce_s + step.scalars_s + step.optimizer_s + step.outside_s
            busy = one.busy_s(rank) + once
            uses.append(RankUse(pipeline, rank, stands_for, busy, step_time_s - busy))
    return tuple(uses)


def _phases(one: Run, steps: Sequence[RankStep], end: Ending) -> dict[str, tuple[float, float]]:
    """Warm-up lasts until the first backward starts, cool-down from the end of the last forward; where all
    forwards come first there is no steady state."""
    forwards, backwards = [], []
    for all_done in one.done:
        for done in all_done:
            for part in done.action.simple_actions:
                if part.kind is ActionKind.FORWARD:
                    forwards.append(done.end_s)
                else:
                    backwards.append(done.start_s)
    total = one.total_s
    warm = min(backwards, default=total)
    cool = max(max(forwards, default=0.0), warm)
    first = min(done[0].start_s for done in one.done if done)
    agreed = max(end.agreed_s)
    return {
        "gathering": (0.0, first),
        "warm-up": (first, warm),
        "steady": (warm, cool),
        "cool-down": (cool, total),
        "reduction": (total, max(agreed, total)),
        "optimizer": (max(agreed, total), end.total_s),
    }
