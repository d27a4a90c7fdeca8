"""Figures of speed: what compute alone bounds, and what needs a step-time model."""

from __future__ import annotations

from dataclasses import replace

from meshwright.audit.answer import Answer
from meshwright.audit.context import Context
from meshwright.claims import Figure
from meshwright.units import FLOPS_PER_S, FRACTION, SECONDS

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
    stated = SECONDS.parse(figure.value, figure.id)
    low, high = _lengths(ctx, figure)
    bounds = {length: ctx.compute_bound_s(length) for length in dict.fromkeys((low, high))}
    words = " and ".join(f"{SECONDS.format(bound)} at {length:,}" for length, bound in bounds.items())
    why = f"Compute alone takes at least {words} tokens, all GPUs at peak"
    impossible = bounds[low] > stated
    if impossible:
        why += f": {SECONDS.format(stated)} is impossible at every length."
    else:
        why += f"{_ruled_out(ctx, stated, low, high)}. The rest needs a step-time model."
    return Answer(None, "model FLOPs / (GPUs · peak) <= step time", why, impossible)


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
    formula, batch = "global_batch_size / step time", ctx.workload.global_batch_size
    low, _ = _lengths(ctx, figure)
    most = batch / ctx.compute_bound_s(low)
    step = ctx.stated_step_time_s()
    value = None if step is None else batch / step
    if step is None:
        why = "It follows from the step time, which needs a step-time model"
    else:
        why = f"{batch} sequences per step / the stated {SECONDS.format(step)} = {value:,.6g} sequences/s"
        why += ", as good as that step time is"
    impossible = isinstance(figure.value, float) and figure.value > most
    if impossible:
        why += f"; compute alone allows at most {most:,.4g} sequences/s at {low:,} tokens"
    return Answer(value, formula, why + ".", impossible)


def mfu(ctx: Context, figure: Figure) -> Answer:
    """Model FLOPs utilization that the stated step time means; with one length it decides the figure."""
    formula = "model FLOPs / (GPUs · peak · step time)"
    impossible = _share(figure) > 1
    step = ctx.stated_step_time_s()
    if step is None:
        why = "It needs a step-time model; it cannot exceed 100 %."
        return Answer(None, formula, why, impossible)
    lengths = dict.fromkeys(_lengths(ctx, figure))
    implied = {length: ctx.compute_bound_s(length) / step for length in lengths}
    words = " and ".join(f"{100 * share:.3g} % at {length:,} tokens" for length, share in implied.items())
    why = f"The stated {SECONDS.format(step)} would mean {words}; the true step time needs a step-time model."
    value = next(iter(implied.values())) if len(implied) == 1 else None
    return Answer(value, formula, why, impossible)


def bandwidth_utilization(ctx: Context, figure: Figure) -> Answer:
    why = "It needs measured or modelled communication times; it cannot exceed 100 %."
    return Answer(None, "bytes moved / (bandwidth · time)", why, _share(figure) > 1)


def strong_scaling_efficiency(ctx: Context, figure: Figure) -> Answer:
    why = "It compares step times, which need a step-time model."
    return Answer(None, "step time on few GPUs · few / (step time on many · many)", why)


def _share(figure: Figure) -> float:
    return STATED_SHARE.parse(figure.value, figure.id)
