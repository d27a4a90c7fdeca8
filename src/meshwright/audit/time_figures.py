"""Figures of speed: what compute alone bounds, and what the step-time model gives with its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from meshwright.audit.answer import Answer, Computed, Verdict
from meshwright.audit.context import Context
from meshwright.audit.step_time import longest_reached, smaller_plan, step_times
from meshwright.claims import Figure
from meshwright.units import FLOPS_PER_S, FRACTION, SECONDS, format_count

STATED_SHARE = replace(FRACTION, smallest=0.0, largest=100.0)
"""A document may state 0 % bubble, and a memory utilization above 100 %: figures are judged, not refused."""


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
    """Seconds of a step: the model's, and before it what compute alone rules out."""
    stated = SECONDS.parse(figure.value, figure.id)
    low, high = _lengths(ctx, figure)
    bounds = {length: ctx.compute_bound_s(length) for length in dict.fromkeys((low, high))}
    words = " and ".join(f"{SECONDS.format(bound)} at {length:,}" for length, bound in bounds.items())
    bound = f"Compute alone takes at least {words} tokens, all GPUs at peak"
    impossible = bounds[low] > stated
    if impossible:
        bound += f": {SECONDS.format(stated)} is impossible at every length."
    else:
        bound += f"{_ruled_out(ctx, stated, low, high)}."
    found = step_times(ctx, figure, (low, high))
    answer = _judged(ctx, figure, stated, found.at, SECONDS.format, f"{_priced(ctx)} {found.words}. {bound}")
    if answer.verdict == "undetermined":
        longest = longest_reached(ctx, figure, lambda one: one.low <= stated)
        answer = replace(answer, why=f"{answer.why} It can be reached up to about {longest:,} tokens.")
    return replace(
        answer,
        formula="the step-time model on the audited layout; model FLOPs / (GPUs · peak) <= step time",
        impossible=impossible,
    )


def _priced(ctx: Context) -> str:
    flat = " with the efficiencies that the file states," if _stated_efficiency(ctx) is not None else ""
    return f"Priced on {ctx.layout_words}{flat} launches of ops included:"


def _judged(
    ctx: Context,
    figure: Figure,
    stated: float,
    at: tuple[Computed, ...],
    form: Callable[[float], str],
    why: str,
) -> Answer:
    """A figure with an interval at each of its lengths: it holds inside all of them, fails outside all, and
    is open where that depends on the length."""
    inside = [one.holds(stated) for one in at]
    verdict: Verdict = "holds" if all(inside) else "undetermined" if any(inside) else "fails"
    words = "; ".join(
        f"{form(one.value)} ({form(one.low)} to {form(one.high)}) at {one.sequence_length:,} tokens"
        for one in at
    )
    if verdict == "undetermined":
        words += f", so that {form(stated)} depends on the length"
    return Answer(at[-1].value, "", f"{words}. {why}", by_length=at, verdict=verdict)


def _lengths(ctx: Context, figure: Figure) -> tuple[int, int]:
    """Shortest and longest sequence that a figure speaks of."""
    own = figure.at.sequence_length
    return (own, own) if own else (ctx.workload.min_sequence_length, ctx.workload.max_sequence_length)


def _ruled_out(ctx: Context, stated: float, low: int, high: int) -> str:
    """The lengths at which compute at peak, or at the stated efficiency, already takes longer."""
    parts = []
    share = _stated_efficiency(ctx)
    for efficiency, words in ((1.0, ""), (share, f" at the stated {100 * share:g} %" if share else "")):
        if efficiency is None or ctx.compute_bound_s(high, efficiency) <= stated:
            continue
        longest = ctx.longest_length_within(stated, efficiency)
        parts.append(f"at every length{words}" if longest < low else f"above {longest:,} tokens{words}")
    return f": impossible {', and '.join(parts)}" if parts else ""


def sequences_per_s(ctx: Context, figure: Figure) -> Answer:
    """Sequences per second: the batch over the model's step time."""
    formula, batch = "global_batch_size / step time", ctx.workload.global_batch_size
    stated = float(figure.value) if isinstance(figure.value, int | float) else 0.0
    lengths = _lengths(ctx, figure)
    most = batch / ctx.compute_bound_s(lengths[0])
    found = step_times(ctx, figure, lengths)
    why = f"{batch} sequences per step over the step time. {_priced(ctx)} {found.words}."
    if stated > most:
        why += f" Compute alone allows at most {most:,.4g} sequences/s at {lengths[0]:,} tokens."
    at = found.mapped(lambda length, seconds: batch / seconds)
    answer = _judged(ctx, figure, stated, at, format_count, why)
    return replace(answer, formula=formula, impossible=stated > most)


def mfu(ctx: Context, figure: Figure) -> Answer:
    """Model FLOPs utilization that the model's step time means."""
    formula = "model FLOPs / (GPUs · peak · step time)"
    stated = _share(figure)
    found = step_times(ctx, figure, _lengths(ctx, figure))
    at = found.mapped(lambda length, seconds: ctx.compute_bound_s(length) / seconds)
    answer = _judged(ctx, figure, stated, at, _percent, f"{_priced(ctx)} {found.words}.")
    claimed = ctx.stated_step_time_s()
    if claimed is not None:
        shares = {n: ctx.compute_bound_s(n) / claimed for n in (one.sequence_length for one in at)}
        words = " and ".join(f"{_percent(share)} at {n:,} tokens" for n, share in shares.items())
        answer = replace(answer, why=f"{answer.why} The stated {SECONDS.format(claimed)} would mean {words}.")
    return replace(answer, formula=formula, impossible=stated > 1)


def bandwidth_utilization(ctx: Context, figure: Figure) -> Answer:
    why = "It is an input of the step-time model here, not a result; it cannot exceed 100 %."
    return Answer(None, "bytes moved / (bandwidth · time)", why, _share(figure) > 1)


def strong_scaling_efficiency(ctx: Context, figure: Figure) -> Answer:
    """GPU-seconds of the same batch on fewer GPUs over those on all: data parallelism alone shrinks.

    Both are priced by one model, so that their ratio is surer than each of them: half of the interval's width
    is taken for it, which is assumed.
    """
    from meshwright.planner.estimate import estimate
    from meshwright.planner.interval import width_of

    formula = "step time on few GPUs · few / (step time on many · many)"
    plan = ctx.plan_for(figure)[0]
    fewer = smaller_plan(plan)
    if fewer is None:
        return Answer(None, formula, "No smaller cluster keeps the layout with less data parallelism.")
    factor = width_of(plan.model, plan.cluster, plan.policy.engine).factor ** 0.5
    few, many = fewer.cluster.num_gpus, plan.cluster.num_gpus
    at = []
    for length in dict.fromkeys(_lengths(ctx, figure)):
        times = [estimate(one, sequence_length=length).total_s for one in (fewer, plan)]
        share = times[0] * few / (times[1] * many)
        at.append(Computed(length, share, share / factor, share * factor))
    why = f"From {few} to {many} GPUs with the same batch of {plan.workload.global_batch_size} sequences, "
    why += f"DP {fewer.layout.dp} to {plan.layout.dp} and {fewer.num_micro_batches} to "
    why += (
        f"{plan.num_micro_batches} micro-batches. One model prices both: half the interval's width, assumed."
    )
    return replace(_judged(ctx, figure, _share(figure), tuple(at), _percent, why), formula=formula)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _share(figure: Figure) -> float:
    return STATED_SHARE.parse(figure.value, figure.id)
