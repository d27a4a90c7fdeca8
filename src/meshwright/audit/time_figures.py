"""Figures of speed: what the step-time model gives at each sequence length, and what compute alone bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from meshwright.audit.answer import Answer, AtLength
from meshwright.audit.context import Context
from meshwright.audit.lengths import Curve, judged, sampled
from meshwright.audit.rounding import slack
from meshwright.audit.speed import (
    Step,
    interval_words,
    length_step,
    lengths_spoken_of,
    on_fewer_gpus,
    ratio_of_steps,
    ratio_words,
    step_at,
    step_time_of,
)
from meshwright.claims import Figure
from meshwright.errors import InputError
from meshwright.units import FLOPS_PER_S, FRACTION, SECONDS, format_count

STATED_SHARE = replace(FRACTION, smallest=0.0, largest=100.0)
"""A document may state 0 % bubble, and a memory utilization above 100 %: figures are judged, not refused."""
Words = Callable[[float], str]


def effective_flops(ctx: Context, figure: Figure) -> Answer:
    peak = ctx.cluster.gpu.peak_flops_per_s(ctx.workload.precision)
    share = _stated_efficiency(ctx)
    formula = "peak · compute efficiency"
    if share is None:
        return Answer(None, formula, "The description states no compute efficiency.")
    why = (
        f"{100 * share:g} % of the {FLOPS_PER_S.format(peak)} peak; a statement of intent, not a measurement."
    )
    return Answer(peak * share, formula, why)


def _stated_efficiency(ctx: Context) -> float | None:
    return ctx.cluster.efficiency.compute if ctx.cluster.efficiency else None


def step_time(ctx: Context, figure: Figure) -> Answer:
    """Seconds of a step on the audited layout; what compute alone takes longer for is impossible."""
    stated = SECONDS.parse(figure.value, figure.id)
    low, high = lengths_spoken_of(ctx, figure)
    bounds = {length: ctx.bound_s(figure, length) for length in dict.fromkeys((low, high))}
    words = " and ".join(f"{SECONDS.format(bound)} at {length:,}" for length, bound in bounds.items())
    bound = f"Compute alone takes at least {words} tokens, all GPUs at peak"
    impossible = bounds[low] > stated
    if impossible:
        bound += f": {SECONDS.format(stated)} is impossible at every length."
    else:
        bound += f"{_ruled_out(ctx, figure, stated)}."

    def curve(length: int) -> AtLength:
        return step_at(ctx, figure, length).at

    answer = _answer(ctx, figure, stated, curve, _seconds, "A step takes")
    if answer.by_length:
        answer = replace(answer, why=f"{answer.why} {_most_of(step_at(ctx, figure, high))}")
    return replace(
        answer,
        formula="tasks priced by the step-time model; model FLOPs / (GPUs · peak) <= step time",
        why=f"{answer.why} {bound}",
        impossible=impossible,
    )


_PARTS = {"bubble": "the pipeline's bubble", "host": "waiting for launches", "compute": "compute"}


def _most_of(step: Step) -> str:
    """The largest parts of a step, in words."""
    parts = sorted(step.parts.items(), key=lambda part: -part[1])[:3]
    words = [
        f"{_PARTS.get(name, name if name in ('optimizer', 'other') else f'{name} communication')} "
        f"{_seconds(seconds)}"
        for name, seconds in parts
        if seconds > 0.01 * step.at.value
    ]
    return f"Most of it at {step.at.sequence_length:,} tokens: {', '.join(words)}."


def _ruled_out(ctx: Context, figure: Figure, stated: float) -> str:
    """The lengths at which compute at peak, or at the stated efficiency, already takes longer."""
    low, high = lengths_spoken_of(ctx, figure)
    parts = []
    share = _stated_efficiency(ctx)
    for efficiency, words in ((1.0, ""), (share, f" at the stated {100 * share:g} %" if share else "")):
        if efficiency is None or ctx.bound_s(figure, high, efficiency) <= stated:
            continue
        longest = ctx.longest_length_within(figure, stated, efficiency)
        parts.append(f"at every length{words}" if longest < low else f"above {longest:,} tokens{words}")
    return f": impossible {', and '.join(parts)}" if parts else ""


def sequences_per_s(ctx: Context, figure: Figure) -> Answer:
    """Sequences of a step over its time; more than compute alone allows is impossible."""
    stated = figure.value if isinstance(figure.value, float) else 0.0
    low, _ = lengths_spoken_of(ctx, figure)
    batch = ctx.batch_of(figure)
    most = batch / ctx.bound_s(figure, low)

    def curve(length: int) -> AtLength:
        at = step_at(ctx, figure, length).at
        return AtLength(length, batch / at.value, batch / at.high, batch / at.low)

    answer = _answer(ctx, figure, stated, curve, _rate, f"Steps of {batch:,} sequences make, per second,")
    why, impossible = answer.why, stated > most
    if impossible:
        why += f" Compute alone allows at most {most:,.4g} sequences/s at {low:,} tokens."
    return replace(answer, formula="global_batch_size / step time", why=why, impossible=impossible)


def mfu(ctx: Context, figure: Figure) -> Answer:
    """Model FLOPs utilization of a whole step; above 100 % is impossible."""
    stated = _share(figure)

    def curve(length: int) -> AtLength:
        at, bound = step_at(ctx, figure, length).at, ctx.bound_s(figure, length)
        return AtLength(length, bound / at.value, bound / at.high, bound / at.low)

    answer = _answer(ctx, figure, stated, curve, _percent, "A step reaches")
    formula = "model FLOPs / (GPUs · peak · step time)"
    return replace(answer, formula=formula, impossible=stated > 1)


def bandwidth_utilization(ctx: Context, figure: Figure) -> Answer:
    """Never computed: a share of which bandwidth, while what runs, a document would have to say."""
    stated = ctx.cluster.efficiency is not None and ctx.cluster.efficiency.bandwidth is not None
    why = "Of which bandwidth, and while what runs, is not said; it cannot exceed 100 %."
    if stated:
        why = "It prices memory and links here, so nothing is left to hold it against."
    return Answer(None, "bytes moved / (bandwidth · time)", why, _share(figure) > 1)


def strong_scaling_efficiency(ctx: Context, figure: Figure) -> Answer:
    """GPU-seconds of a step on a part of the cluster over those on all of it, for the same global batch."""
    formula = "step time on few GPUs · few / (step time on all · all)"
    try:
        step_at(ctx, figure, lengths_spoken_of(ctx, figure)[1])
    except InputError as error:
        return Answer(None, formula, f"No step time: {error}.")
    plan, _ = ctx.plan_for(figure)
    fewer = on_fewer_gpus(plan)
    if fewer is None:
        why = (
            f"Nothing smaller to compare with: {ctx.layout_words} with less DP or PP fits neither a quarter "
        )
        return Answer(None, formula, f"{why}nor half of the {plan.cluster.num_gpus:,} GPUs.")
    few, all_ = fewer.cluster.num_gpus, plan.cluster.num_gpus
    steps: dict[int, Step] = {}

    def few_at(length: int) -> Step:
        if length not in steps:
            steps[length] = step_time_of(fewer, length)
        return steps[length]

    def curve(length: int) -> AtLength:
        return ratio_of_steps(plan, few_at(length), few, step_at(ctx, figure, length), all_)

    subject = f"{all_:,} GPUs against {few:,} reach"
    answer = _answer(ctx, figure, _share(figure), curve, _percent, subject, ratio_words(plan))
    changes = [
        f"{axis.upper()} {plan.layout.size(axis)} -> {fewer.layout.size(axis)}"
        for axis in ("dp", "pp", "ep")
        if plan.layout.size(axis) != fewer.layout.size(axis)
    ]
    counts = f"{fewer.num_micro_batches} micro-batches instead of {plan.num_micro_batches}"
    lengths = dict.fromkeys(lengths_spoken_of(ctx, figure))
    times = " and ".join(f"{_seconds(few_at(n).at.value)} at {n:,}" for n in lengths)
    why = f"On {few:,} GPUs ({', '.join(changes)}, {counts}) a step takes {times} tokens."
    return replace(answer, formula=formula, why=f"{answer.why} {why}")


def _answer(
    ctx: Context, figure: Figure, stated: float, curve: Curve, words: Words, subject: str, rests: str = ""
) -> Answer:
    """A value that follows from a step time: at the ends of the range and at the figure's own length, with
    the verdict over all lengths that the figure speaks of. Open where the plan breaks a rule. `rests` says
    what the interval rests on, where that is not what a step time's does."""
    low, high = lengths_spoken_of(ctx, figure)
    try:
        curve(high)
    except InputError as error:
        return Answer(None, "", f"No step time: {error}.")
    step = length_step(ctx)
    verdict, where = judged(curve, stated, slack(figure, stated), sampled(low, high, step), step)
    ends = (ctx.workload.min_sequence_length, ctx.workload.max_sequence_length)
    by_length = tuple(curve(length) for length in sorted({low, high, *ends}))
    spoken = [at for at in by_length if at.sequence_length in (low, high)]
    why = f"{subject} {_at_lengths(spoken, words)}; {words(stated)} {where}."
    why += f" {rests or interval_words(ctx, figure)}"
    return Answer(curve(high).value, "", why, by_length=by_length, verdict=verdict)


def _at_lengths(at: Sequence[AtLength], words: Words) -> str:
    texts = [f"{words(a.value)} ({_range(a.low, a.high, words)}) at {a.sequence_length:,}" for a in at]
    return f"{' and '.join(texts)} tokens"


def _range(low: float, high: float, words: Words) -> str:
    """Two values, their unit once where it is the same."""
    first, second = words(low), words(high)
    number, _, unit = first.partition(" ")
    return f"{number}–{second}" if unit == second.partition(" ")[2] else f"{first} – {second}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _rate(value: float) -> str:
    return format_count(float(f"{value:.3g}"))


def _seconds(value: float) -> str:
    return SECONDS.format(float(f"{value:.3g}"))


def _share(figure: Figure) -> float:
    return STATED_SHARE.parse(figure.value, figure.id)
