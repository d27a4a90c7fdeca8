"""Figures of speed: what compute alone bounds, and what needs a step-time model."""

from __future__ import annotations

from collections.abc import Callable

from meshwright.audit.answer import Answer
from meshwright.audit.context import Context
from meshwright.claims import Figure
from meshwright.units import FLOPS_PER_S, SECONDS


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
    low, high = ctx.workload.min_sequence_length, ctx.workload.max_sequence_length
    if figure.at.sequence_length:
        low = high = figure.at.sequence_length
    bounds = {length: ctx.compute_bound_s(length) for length in dict.fromkeys((low, high))}
    words = " and ".join(f"{SECONDS.format(bound)} at {length:,}" for length, bound in bounds.items())
    why = f"Compute alone takes at least {words} tokens, all GPUs at peak"
    impossible = bounds[low] > stated
    if impossible:
        why += f": {SECONDS.format(stated)} is impossible at every length."
    elif bounds[high] > stated:
        why += f": impossible above {ctx.longest_length_within(stated, 1.0):,} tokens"
        why += _above_stated_efficiency(ctx, stated, high) + "."
    else:
        why += _above_stated_efficiency(ctx, stated, high, ": impossible") + "."
    why += "" if impossible else " The rest needs a step-time model."
    return Answer(None, "model FLOPs / (GPUs · peak) <= step time", why, impossible)


def _above_stated_efficiency(ctx: Context, stated: float, high: int, lead: str = "") -> str:
    share = _stated_efficiency(ctx)
    if share is None or ctx.compute_bound_s(high, share) <= stated:
        return ""
    length = ctx.longest_length_within(stated, share)
    return (
        f"{lead} above {length:,} at the stated {100 * share:g} %"
        if lead
        else f" (above {length:,} at the stated {100 * share:g} %)"
    )


def sequences_per_s(ctx: Context, figure: Figure) -> Answer:
    step, batch, formula = (
        ctx.stated_step_time_s(),
        ctx.workload.global_batch_size,
        "global_batch_size / step time",
    )
    if step is None:
        return Answer(None, formula, "It follows from the step time, which needs a step-time model.")
    why = (
        f"{batch} sequences per step / the stated {SECONDS.format(step)} = {batch / step:,.6g} sequences/s, "
    )
    return Answer(batch / step, formula, why + "as good as that step time is.")


def mfu(ctx: Context, figure: Figure) -> Answer:
    formula = "model FLOPs / (GPUs · peak · step time)"
    step = ctx.stated_step_time_s()
    if step is None:
        return Answer(None, formula, "It needs a step-time model; compute alone only bounds it by 100 %.")
    low, high = ctx.workload.min_sequence_length, ctx.workload.max_sequence_length
    implied = {length: ctx.compute_bound_s(length) / step for length in dict.fromkeys((low, high))}
    words = " and ".join(f"{100 * share:.3g} % at {length:,} tokens" for length, share in implied.items())
    why = f"The stated {SECONDS.format(step)} would mean {words}; the true step time needs a step-time model."
    return Answer(None, formula, why)


def undetermined(formula: str, why: str) -> Callable[[Context, Figure], Answer]:
    def answer(ctx: Context, figure: Figure) -> Answer:
        return Answer(None, formula, why)

    return answer
