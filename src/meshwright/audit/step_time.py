"""Step times of the audited layout, by sequence length, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from meshwright.audit.answer import Computed
from meshwright.audit.context import Context
from meshwright.claims import Figure
from meshwright.errors import InputError
from meshwright.plan import Plan
from meshwright.verify import verify

SHARES = (4, 2)
"""Parts of the cluster that strong scaling is measured against, the smallest first."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step at some lengths, and what their interval rests on."""

    at: tuple[Computed, ...]
    words: str

    def mapped(self, value: Callable[[int, float], float]) -> tuple[Computed, ...]:
        """A figure that follows from length and step time, with the ends of its interval in order."""
        found = []
        for one in self.at:
            length = one.sequence_length
            low, high = sorted((value(length, one.low), value(length, one.high)))
            found.append(Computed(length, value(length, one.value), low, high))
        return tuple(found)


def step_times(ctx: Context, figure: Figure, lengths: Iterable[int]) -> StepTimes:
    """Step times under a figure's own conditions. Raises InputError where the layout breaks a rule."""
    from meshwright.planner.estimate import estimate  # here, because only these figures need numpy
    from meshwright.planner.interval import width_of

    plan = required(ctx.plan_for(figure)[0])
    width = width_of(plan.model, plan.cluster, plan.policy.engine)
    at = []
    for length in dict.fromkeys(lengths):
        key = (figure.at, length)
        if key not in ctx.times_s:
            ctx.times_s[key] = estimate(plan, sequence_length=length).total_s
        seconds = ctx.times_s[key]
        at.append(Computed(length, seconds, seconds / width.factor, seconds * width.factor))
    return StepTimes(tuple(at), width.words)


def required(plan: Plan) -> Plan:
    """The plan itself. Raises InputError for the first rule that it breaks."""
    for finding in verify(plan):
        if finding.level == "error":
            raise finding.raised()
    return plan


def smaller_plan(plan: Plan) -> Plan | None:
    """The plan on a quarter of its nodes, or on half of them: data parallelism alone shrinks. None where that
    breaks a rule."""
    for share in SHARES:
        nodes, dp = plan.cluster.nodes, plan.layout.dp
        if nodes % share or dp % share:
            continue
        cluster = plan.cluster.model_copy(update={"nodes": nodes // share})
        try:
            layout = plan.layout.model_validate({**plan.layout.model_dump(), "dp": dp // share})
            return required(plan.model_copy(update={"cluster": cluster, "layout": layout}))
        except InputError:
            continue
    return None


def longest_reached(ctx: Context, figure: Figure, within: Callable[[Computed], bool]) -> int:
    """The longest sequence at which a figure may still hold, to one per cent; 0 where none does."""
    low, high = 0, ctx.workload.max_sequence_length
    while high - low > max(1, low // 100):
        middle = (low + high + 1) // 2
        fits = within(step_times(ctx, figure, (middle,)).at[0])
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
