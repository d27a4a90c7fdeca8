"""Figures that the model and the stated degrees decide."""

from __future__ import annotations

from collections.abc import Callable
from math import isclose

from meshwright.audit.answer import Answer
from meshwright.audit.context import Context
from meshwright.claims import Figure
from meshwright.ir.schedule import bubble_slots, build_schedule
from meshwright.plan import split_layers
from meshwright.policy import SPLIT_BACKWARD
from meshwright.units import format_count


def parameters(ctx: Context, figure: Figure) -> Answer:
    counts, stated = ctx.parameters, float(figure.value) if isinstance(figure.value, float) else 0.0
    why = f"The described dimensions give {format_count(counts.total)} parameters"
    why += f", of which {format_count(counts.active)} work on each token" if ctx.model.is_moe else ""
    width = width_for(ctx, stated)
    if width not in (None, ctx.model.moe_intermediate_size) and abs(stated / counts.total - 1) > 0.01:
        why += f"; {format_count(stated)} would need an expert FFN width of about {width:,}"
    return Answer(counts.total, "sum over all weights", why + ".")


def width_for(ctx: Context, parameters: float) -> int | None:
    """The expert FFN width, to the nearest multiple of 128, that brings the model to a parameter count."""
    model, experts = ctx.model, ctx.parameters.by_part["experts"]
    if not experts or not model.moe_intermediate_size:
        return None
    rest = ctx.parameters.total - experts
    width = (parameters - rest) / (experts / model.moe_intermediate_size)
    return round(width / 128) * 128 if width >= 64 else None


def head_dim(ctx: Context, figure: Figure) -> Answer:
    model = ctx.model
    if model.is_mla:
        return Answer(model.qk_head_dim, "qk_nope_head_dim + qk_rope_head_dim", "Width of one query head.")
    why = f"Each of {model.num_attention_heads} heads is {model.head_dim} wide."
    return Answer(model.head_dim or 0, "head_dim, else hidden_size / num_attention_heads", why)


def world_size(ctx: Context, figure: Figure) -> Answer:
    s, gpus = ctx.stated, ctx.cluster.num_gpus
    world = s["tp"] * s["cp"] * s["dp"] * s["pp"]
    why = f"TP·CP·DP·PP = {s['tp']}·{s['cp']}·{s['dp']}·{s['pp']} = {world}; the cluster has {gpus} GPUs."
    if s["ep"] > 1:
        why += " Expert parallelism re-names those ranks, it does not multiply them."
    return Answer(world, "tp·cp·dp·pp", why)


def degree(axis: str) -> Callable[[Context, Figure], Answer]:
    def answer(ctx: Context, figure: Figure) -> Answer:
        if ctx.layout is None:
            return Answer(None, axis, "No layout of this model fills this cluster.")
        value = ctx.layout.size(axis)
        return Answer(value, axis, f"{axis.upper()} is {value} in the layout {ctx.layout_words}.")

    return answer


def per(numerator: str, axis: str, what: str) -> Callable[[Context, Figure], Answer]:
    """A size of the model divided by a stated degree."""

    def answer(ctx: Context, figure: Figure) -> Answer:
        size, degree = getattr(ctx.model, numerator), ctx.stated[axis]
        if size == 0:
            return Answer(0, f"{numerator} / {axis}", f"The model has no {what}.")
        value = size / degree
        tail = "." if size % degree == 0 else ", which is not whole."
        return Answer(
            value,
            f"{numerator} / {axis}",
            f"{size:,} {what} over {axis.upper()} {degree} is {value:g} each{tail}",
        )

    return answer


def layers_per_stage(ctx: Context, figure: Figure) -> Answer:
    """Layers of the fullest stage; uneven stages are named with their least and most."""
    layers, stages = ctx.model.num_hidden_layers, ctx.stated["pp"] * ctx.stated["vpp"]
    formula = "num_hidden_layers / (pp·vpp), or layers_per_stage"
    if stages > layers:
        return Answer(None, formula, f"{stages} stages need a layer each, and the model has {layers}.", True)
    split = ctx.deployment.policy.layers_per_stage or split_layers(layers, stages)
    if len(set(split)) == 1:
        return Answer(split[0], formula, f"{layers} layers over {len(split)} stages is {split[0]} each.")
    why = f"{layers} layers over {len(split)} stages are uneven: {min(split)} to {max(split)} each."
    return Answer(max(split), formula, why)


def sequences_per_replica(ctx: Context, figure: Figure) -> Answer:
    batch, dp = ctx.workload.global_batch_size, ctx.stated["dp"]
    why = f"{batch} sequences over the stated DP {dp} is {batch / dp:g} each"
    if ctx.layout is not None and ctx.layout.dp != dp:
        why += f"; on {ctx.layout_words} it is {batch / ctx.layout.dp:g}"
    return Answer(batch / dp, "global_batch_size / dp", why + ".")


def micro_batch_size(ctx: Context, figure: Figure) -> Answer:
    per_replica, count = ctx.workload.global_batch_size / ctx.stated["dp"], ctx.num_micro_batches
    value = per_replica / count
    why = f"{per_replica:g} sequences per replica in {count} micro-batches is {value:g} per micro-batch"
    stated = figure.value if isinstance(figure.value, float) else None
    if stated is not None and isclose(stated, per_replica) and count > 1:
        why += f"; {stated:g} is the replica's whole share"
    return Answer(value, "global_batch_size / (dp · num_micro_batches)", why + ".")


def num_micro_batches(ctx: Context, figure: Figure) -> Answer:
    per_replica = ctx.workload.global_batch_size // ctx.stated["dp"]
    count = ctx.num_micro_batches
    why = f"The {per_replica} sequences of a replica are cut into {count} micro-batches."
    return Answer(count, "global_batch_size / (dp · micro_batch_size)", why)


def stage_ranks(ctx: Context, figure: Figure) -> Answer:
    world, pp = ctx.cluster.num_gpus, ctx.stated["pp"]
    formula = "stage p holds ranks p·world/pp … (p+1)·world/pp − 1"
    if world % pp:
        return Answer(None, formula, f"{world} ranks do not divide into {pp} equal stages.", True)
    size = world // pp
    ranges = tuple(f"{p * size}-{(p + 1) * size - 1}" if size > 1 else f"{p}" for p in range(pp))
    return Answer(ranges, formula, f"With PP outermost each stage holds {size} neighbouring ranks.")


def bubble_fraction(ctx: Context, figure: Figure) -> Answer:
    """Idle share of a step with equal stages and no communication time.

    Closed form for GPipe, 1F1B and interleaving; the zero-bubble orders are run action by action with
    forward, input and weight gradient taking equally long, and the mean over ranks is taken.
    """
    p, v, m = ctx.stated["pp"], ctx.stated["vpp"], ctx.num_micro_batches
    name = ctx.deployment.policy.schedule or ("1F1B" if v == 1 else "Interleaved1F1B")
    if name in SPLIT_BACKWARD:
        idle = bubble_slots(build_schedule(name, p, m, v))
        why = f"{name} over {p} ranks with {m} micro-batches, forward and both gradients equally long."
        return Answer(sum(idle) / len(idle), "mean idle share of the ranks, arXiv:2401.10241 §2", why)
    slots = v * m + p - 1
    why = f"{name} over {p} ranks with {m} micro-batches leaves each GPU idle for {p - 1} of {slots} slots."
    return Answer((p - 1) / slots, "(pp − 1) / (vpp·m + pp − 1), arXiv:2104.04473 §2.2", why)
