"""What a step does once: gradients reduced, their norm agreed on, weights updated, parameters gathered.

Order and seconds are those of `planner/step.py`. A rank reduces as soon as its own last backward is done; the
norm is summed over the pipeline, so that all its ranks wait for the last; then each updates, and gathers what
it needs for the next step's first forward. Steps follow one another, so that this gathering stands before the
first forward of the simulated step, where it hides behind the wait for the first micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshwright.ir.schedule import ActionKind
from meshwright.ir.tasks import CommTask
from meshwright.planner.step import SMALL_BYTES, data_of
from meshwright.planner.times import DATA_AXES
from meshwright.simulator.engine import Beside, Run
from meshwright.simulator.parts import NO_TIER, tier_of
from meshwright.simulator.streams import Flow
from meshwright.simulator.work import Priced, rows

_GRADIENTS = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)


@dataclass(frozen=True, slots=True)
class RankStep:
    """Seconds of one pipeline rank once per step: what shows of gathering and of reducing, and how much of
    both flows beside micro-batches; scalars and what is outside the model; the update. `tier` is the
    outermost that the data axes cross."""

    gather_s: float
    gather_beside_s: float
    reduce_s: float
    reduce_beside_s: float
    scalars_s: float
    outside_s: float
    optimizer_s: float
    tier: int


@dataclass(frozen=True)
class Ending:
    """When a step's end took place, by pipeline rank: reduced, agreed, and finished."""

    started_s: tuple[float, ...]
    reduced_s: tuple[float, ...]
    agreed_s: tuple[float, ...]
    finished_s: tuple[float, ...]

    @property
    def total_s(self) -> float:
        """Seconds of the whole step."""
        return max(self.finished_s)


def rank_steps(priced: Priced, pipeline: int) -> tuple[RankStep, ...]:
    """What each pipeline rank does once per step.

    How much of reducing and gathering shows is `data_of`'s.
    """
    return tuple(_rank_step(priced, pipeline, rank) for rank in range(priced.program.plan.layout.pp))


def _rank_step(priced: Priced, pipeline: int, rank: int) -> RankStep:
    plan, rates, measured = priced.program.plan, priced.prices, priced.measured
    own, last = measured.ranks[rank], plan.num_micro_batches - 1
    backward = sum(rows(priced, kind, own, pipeline, last) for kind in _GRADIENTS)
    forward = rows(priced, ActionKind.FORWARD, own, pipeline, 0)
    comm = measured.comm[rank]
    data = data_of(comm, rates, backward, forward)
    slowdown = float(priced.slowdowns[pipeline, rank])
    return RankStep(
        gather_s=float(data.gather_s),
        gather_beside_s=float(data.gather_beside_s),
        reduce_s=float(data.reduce_s),
        reduce_beside_s=float(data.reduce_beside_s),
        scalars_s=float(comm.other_s),
        outside_s=rates.step_s,
        optimizer_s=float(rates.update * measured.optimizer_s[rank]) * slowdown,
        tier=_data_tier(priced, priced.program.step[rank]),
    )


def _data_tier(priced: Priced, tasks: Iterable[CommTask]) -> int:
    large = [task for task in tasks if task.axis in DATA_AXES and task.bytes > SMALL_BYTES]
    return max((tier_of(priced.groups[task.axis]) for task in large), default=NO_TIER)


def beside(priced: Priced, steps: Sequence[RankStep]) -> tuple[Beside, ...]:
    """What flows beside micro-batches on each rank, an equal share with each of its stages."""
    found = []
    for rank, step in enumerate(steps):
        own = priced.measured.ranks[rank]

        def shares(seconds: float, own: Sequence[int] = own, tier: int = step.tier) -> dict[int, Flow]:
            return {stage: Flow(seconds / len(own), tier) for stage in own} if seconds else {}

        found.append(Beside(shares(step.gather_beside_s), shares(step.reduce_beside_s)))
    return tuple(found)


def ending(priced: Priced, runs: Sequence[Run], steps: Sequence[Sequence[RankStep]]) -> tuple[Ending, ...]:
    """The end of a step of pipelines that reduce their gradients together; of one, or of each by itself where
    they are samples."""
    ranks = range(len(steps[0]))
    ends = [[max(_last_s(run, rank), run.drained_s(rank)) for rank in ranks] for run in runs]
    together = priced.options.every_rank
    found = []
    for own, mine in zip(ends, steps, strict=True):
        started = [max(end[rank] for end in ends) if together else own[rank] for rank in ranks]
        reduced = [start + step.reduce_s for start, step in zip(started, mine, strict=True)]
        everyone = any(task.axis == "pp" for task in priced.program.step[0])
        agreed = [max(reduced)] * len(reduced) if everyone else reduced
        finished = [
            time + step.scalars_s + step.outside_s + step.optimizer_s
            for time, step in zip(agreed, mine, strict=True)
        ]
        found.append(Ending(tuple(started), tuple(reduced), tuple(agreed), tuple(finished)))
    return tuple(found)


def _last_s(run: Run, rank: int) -> float:
    return run.done[rank][-1].end_s if run.done[rank] else 0.0
