"""How long a step takes, simulated as far as it changes: many micro-batches by their steady state.

A pipeline whose micro-batches are alike comes to a state in which each further round of them takes the same
time, so that a long step is a short one and so many rounds more. That is checked, not taken on trust: two
rounds in a row must take the same, and as long as the fullest rank works. The step time is a maximum of sums
that grow with the micro-batches, hence convex in their number, and a rank's own work is the steepest of them
unless ranks wait for one another in a circle. Where the check fails every micro-batch is run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshwright.errors import InputError
from meshwright.ir.orders import num_rounds
from meshwright.ir.program import Program
from meshwright.plan import Plan
from meshwright.policy import CHUNKED_SCHEDULES, V_SCHEDULES
from meshwright.simulator.engine import Run
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import lowered, run_all

SAME = 1e-9
"""Relative difference up to which two rounds take the same time."""
_FILLED = 2
"""Rounds after which a pipeline is filled."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Seconds of a simulated step: all of it, from the first start of a rank to the last end of any
    (`running_s`), what a rank works in that on average, and the work of the fullest rank."""

    step_time_s: float
    running_s: float
    busy_s: float
    fullest_s: float

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
    count, size = program.plan.num_micro_batches, _round_of(program.plan)
    first = _FILLED * size + count % size
    if count <= first + 3 * size:
        return _run(program, asked, count)
    short, longer, longest = (_run(program, asked, first + size * more) for more in range(3))
    rounds = (count - first) // size
    if _steady(short, longer, longest):
        return _extended(short, longer, rounds)
    return _run(program, asked, count)


def _round_of(plan: Plan) -> int:
    """Micro-batches of a round: as many as there are ranks, or those that interleaving takes through one
    chunk after the other, so that fewer rounds have an order too."""
    ranks, count, schedule = plan.layout.pp, plan.num_micro_batches, plan.policy.schedule
    if schedule in CHUNKED_SCHEDULES - V_SCHEDULES:
        return count // num_rounds(ranks, count)
    return ranks


def _run(program: Program, options: Options, count: int) -> Totals:
    """The totals with this many micro-batches."""
    kept = run_all(_with(program, count), options, 1)
    one, end = kept.runs[0], kept.ends[0]
    work = [one.busy_s(rank) for rank in range(one.schedule.num_ranks)]
    return Totals(end.total_s, _running_s(one), sum(work) / len(work), max(work))


def _running_s(run: Run) -> float:
    return run.total_s - min(done[0].start_s for done in run.done if done)


def _with(program: Program, count: int) -> Program:
    """The program with another number of micro-batches."""
    plan = program.plan
    if plan.num_micro_batches == count:
        return program
    size = count * plan.layout.dp * plan.policy.micro_batch_size
    workload = plan.workload.model_copy(update={"global_batch_size": size})
    return replace(program, plan=plan.model_copy(update={"workload": workload}))


def _steady(short: Totals, longer: Totals, longest: Totals) -> bool:
    """Whether two rounds in a row take the same time, and no less than the fullest rank works."""
    one, two = longer.step_time_s - short.step_time_s, longest.step_time_s - longer.step_time_s
    ran, again = longer.running_s - short.running_s, longest.running_s - longer.running_s
    least = longest.fullest_s - longer.fullest_s
    scale = longest.step_time_s * SAME
    return abs(one - two) <= scale and abs(ran - again) <= scale and two >= least - scale


def _extended(short: Totals, longer: Totals, rounds: int) -> Totals:
    """The short step and so many rounds more."""

    def at(first: float, second: float) -> float:
        return first + rounds * (second - first)

    return Totals(
        at(short.step_time_s, longer.step_time_s),
        at(short.running_s, longer.running_s),
        at(short.busy_s, longer.busy_s),
        at(short.fullest_s, longer.fullest_s),
    )
