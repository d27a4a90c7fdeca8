"""How long a step takes, simulated as far as it changes: many micro-batches by their steady state.

A pipeline whose micro-batches are alike comes to a state in which each further round of them takes the same
time, so that a long step is a short one and so many rounds more. That is checked, not taken on trust: of two
repetitions of the order in a row (`planner/slots.py`) every action of the second must end, and everything
that it sends arrive, later than in the first by one and the same time. Then so does a third, and all that
follows. Where the check fails more micro-batches are run, in the end every one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meshwright.errors import InputError
from meshwright.ir.program import Program
from meshwright.plan import Plan
from meshwright.planner.slots import SAME, Shape, SlottedOrder, slotted_order
from meshwright.simulator.engine import Run
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import lowered, run_all

_FIRST_ROUNDS = 5
"""Rounds that are run at first. In four, shared links have often not come to a steady state."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Seconds of a simulated step: all of it, from the first start of a rank to the last end of any
    (`running_s`), and what a rank works in that on average."""

    step_time_s: float
    running_s: float
    busy_s: float

    @property
    def bubble_fraction(self) -> float:
        """Mean idle share of the ranks while micro-batches run."""
        return max(1 - self.busy_s / self.running_s, 0.0) if self.running_s else 0.0


def totals(plan: Plan | Program, options: Options | None = None) -> Totals:
    """A step's totals, equal to those of `simulate` to 1e-9.

    `options` must leave imbalance at its mean and draw no stragglers: only then are micro-batches alike.
    Raises InputError otherwise, and as `simulate` does.
    """
    asked = options or Options()
    if asked.imbalance != "mean" or asked.stragglers is not None or asked.every_rank:
        rule = "micro-batches that are drawn are not alike: every one of them has to be run"
        raise InputError("options", "drawn", rule, ["simulate", "sample_steps"])
    program = lowered(plan, asked)
    shape, count = _shape(program.plan), program.plan.num_micro_batches
    shape.require_order(count)
    rounds = _FIRST_ROUNDS
    while True:
        run = shape.shorter(count, rounds)
        found, further = _run(_with(program, run), asked, whole=run == count)
        if further is not None:
            return _extended(found, further, (count - run) // shape.period(count))
        rounds *= 2


def _shape(plan: Plan) -> Shape:
    return Shape(plan.policy.schedule, plan.layout.pp, plan.layout.vpp)


def _run(program: Program, options: Options, whole: bool) -> tuple[Totals, Totals | None]:
    """The totals of a program, and what each further repetition adds to them: nothing needs to be known of it
    where the step is `whole`, and None where it is not steady."""
    kept = run_all(program, options, 1)
    one, end = kept.runs[0], kept.ends[0]
    ranks = range(one.schedule.num_ranks)
    running_s = one.total_s - min(done[0].start_s for done in one.done if done)
    found = Totals(end.total_s, running_s, sum(map(one.busy_s, ranks)) / len(ranks))
    if whole:
        return found, Totals(0.0, 0.0, 0.0)
    order = slotted_order(_shape(program.plan), program.plan.num_micro_batches)
    repeat, longer = order.repeat, _further_s(one, order)
    if repeat is None or longer is None:
        return found, None
    works = np.zeros(len(order.previous))
    for own, done in zip(order.by_rank, one.done, strict=True):
        works[own] = [each.end_s - each.start_s for each in done]
    return found, Totals(longer, longer, float(works[repeat.second].sum()) / len(ranks))


def _further_s(run: Run, order: SlottedOrder) -> float | None:
    """Seconds by which everything of the second repetition stands behind the first, if it is the same for
    all: ends of actions, and arrivals of the forward and of the gradient that each makes."""
    if order.repeat is None:
        return None
    times = np.zeros((3, len(order.previous)))
    for own, done in zip(order.by_rank, run.done, strict=True):
        times[0, own] = [each.end_s for each in done]
    gradients = run.schedule.num_stages * run.schedule.num_micro_batches
    for key, (rank, position) in run.made_by.items():
        times[1 + (key >= gradients), order.by_rank[rank][position]] = run.arrived_s[key]
    longer = times[:, order.repeat.second] - times[:, order.repeat.first]
    made = times[:, order.repeat.second] > 0
    least, most = float(longer[made].min()), float(longer[made].max())
    return most if most - least <= SAME * run.total_s else None


def _with(program: Program, count: int) -> Program:
    """The program with another number of micro-batches."""
    plan = program.plan
    if plan.num_micro_batches == count:
        return program
    size = count * plan.layout.dp * plan.policy.micro_batch_size
    workload = plan.workload.model_copy(update={"global_batch_size": size})
    return replace(program, plan=plan.model_copy(update={"workload": workload}))


def _extended(short: Totals, further: Totals, rounds: int) -> Totals:
    """The short step and so many repetitions more."""
    return Totals(
        short.step_time_s + rounds * further.step_time_s,
        short.running_s + rounds * further.running_s,
        short.busy_s + rounds * further.busy_s,
    )
