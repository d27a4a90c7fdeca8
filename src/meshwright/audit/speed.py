"""Step times of the layout that an audit judges, by the step-time model of `plan`.

The model needs numpy, which takes a while to load: it is imported where a figure asks for a step time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from meshwright.audit.answer import AtLength
from meshwright.claims import Figure
from meshwright.cost.memory import memory, worst
from meshwright.errors import InputError
from meshwright.files import decode
from meshwright.ir.program import lower
from meshwright.layout import Layout
from meshwright.plan import Plan, split_layers
from meshwright.verify import require_valid

if TYPE_CHECKING:
    from meshwright.audit.context import Context


@dataclass(frozen=True, slots=True)
class Step:
    """The step time of a plan at one length, in seconds, with its 80 % interval and its parts."""

    at: AtLength
    parts: Mapping[str, float]


def step_time_of(plan: Plan, sequence_length: int, at_least_s: float = 0.0) -> Step:
    """The step time of a plan at a sequence length; no interval reaches below `at_least_s`, which is what the
    FLOPs alone take."""
    from meshwright.planner.estimate import estimate
    from meshwright.planner.interval import interval

    step = estimate(plan, sequence_length=sequence_length)
    low, high = interval(plan, step.total_s)
    at = AtLength(sequence_length, step.total_s, min(max(low, at_least_s), step.total_s), high)
    return Step(at, step.parts)


def step_at(ctx: Context, figure: Figure, sequence_length: int) -> Step:
    """The step time that a figure speaks of, at a length. Raises InputError where no layout can exist, or
    its rules do not hold."""
    key = (figure.at.model_copy(update={"sequence_length": None}), sequence_length)
    if key not in ctx.steps:
        plan, _ = ctx.plan_for(figure)
        require_valid(plan)
        ctx.steps[key] = step_time_of(plan, sequence_length, ctx.bound_s(figure, sequence_length))
    return ctx.steps[key]


def ratio_of_steps(plan: Plan, few: Step, few_gpus: int, all_: Step, all_gpus: int) -> AtLength:
    """Strong-scaling efficiency from two step times of one model. Its interval is that of a ratio: what the
    model gets wrong in both cancels."""
    from meshwright.planner.interval import ratio_factor

    share = few.at.value * few_gpus / (all_.at.value * all_gpus)
    factor = ratio_factor(plan.model, plan.cluster)
    return AtLength(all_.at.sequence_length, share, share / factor, share * factor)


def ratio_words(plan: Plan) -> str:
    """What the interval of a ratio rests on, in a sentence."""
    from meshwright.planner.interval import ratio_factor

    factor = ratio_factor(plan.model, plan.cluster)
    return f"The ratio is sure to a factor {factor:.2f}: what the model gets wrong in both cancels."


def interval_words(ctx: Context, figure: Figure) -> str:
    """What step times and their intervals rest on, in sentences."""
    from meshwright.planner.interval import width_of

    plan, _ = ctx.plan_for(figure)
    flat = plan.cluster.efficiency.compute if plan.cluster.efficiency else None
    text = f"Priced on {ctx.layout_words}, micro-batch {plan.policy.micro_batch_size}"
    text += "" if flat is None else f", kernels at the stated {100 * flat:g} % of peak and launches on top"
    return f"{text}. In brackets: {width_of(plan.model, plan.cluster, plan.policy.engine).words}."


def lengths_spoken_of(ctx: Context, figure: Figure) -> tuple[int, int]:
    """Shortest and longest sequence that a figure speaks of."""
    own = figure.at.sequence_length
    return (own, own) if own else (ctx.workload.min_sequence_length, ctx.workload.max_sequence_length)


def length_step(ctx: Context) -> int:
    """What every length that is looked at is a multiple of, as both ends are: layouts cut those evenly."""
    return gcd(ctx.workload.min_sequence_length, ctx.workload.max_sequence_length)


SHARES = (4, 2)
"""Parts of the cluster that strong scaling is held against, the smallest first."""


def on_fewer_gpus(plan: Plan) -> Plan | None:
    """The plan for the same global batch on a quarter of the GPUs, or on half of them.

    dp is reduced, or where it cannot be, pp; tp and etp stay, and ep as far as it folds. None where no such
    plan keeps every rule and fits.
    """
    for axis in ("dp", "pp"):
        for share in SHARES:
            if plan.layout.size(axis) % share == 0:
                with suppress(InputError):
                    fewer = _reduced(plan, axis, share)
                    require_valid(fewer)
                    if worst(memory(lower(fewer))).total_bytes <= fewer.cluster.gpu.memory:
                        return fewer
    return None


def _reduced(plan: Plan, axis: str, share: int) -> Plan:
    layout, cluster = plan.layout, plan.cluster
    degrees = {name: layout.size(name) for name in ("tp", "cp", "dp", "pp", "vpp", "ep", "etp")}
    degrees[axis] //= share
    stage = degrees["tp"] * degrees["cp"] * degrees["dp"]
    degrees["ep"] = gcd(degrees["ep"], stage // degrees["etp"]) if stage % degrees["etp"] == 0 else 0
    gpus = layout.world_size // share
    nodes, per_node = max(1, gpus // cluster.gpus_per_node), min(gpus, cluster.gpus_per_node)
    if nodes * per_node != gpus:
        raise InputError("cluster.nodes", gpus, f"whole nodes of {cluster.gpus_per_node} GPUs")
    policy = plan.policy
    if axis == "pp":
        stages = split_layers(plan.model.num_hidden_layers, degrees["pp"] * degrees["vpp"])
        policy = policy.model_copy(update={"layers_per_stage": stages})
    machine = {**dict(cluster), "nodes": nodes, "gpus_per_node": per_node}
    return plan.model_copy(
        update={
            "cluster": decode(type(cluster), machine, "cluster"),
            "layout": decode(Layout, degrees, "layout"),
            "policy": policy,
        }
    )
