"""Figures that the memory model decides."""

from __future__ import annotations

from math import isclose

from meshwright.audit.answer import Answer
from meshwright.audit.context import Context
from meshwright.claims import Figure
from meshwright.cost.memory import RankMemory, held_params, state_bytes, state_parts, state_widths
from meshwright.ir.sharding import copies, local_numel, zero_degree
from meshwright.units import BYTES, format_count


def parameter_memory(ctx: Context, figure: Figure) -> Answer:
    return _state(ctx, figure, "weights", "bytes per weight")


def gradient_memory(ctx: Context, figure: Figure) -> Answer:
    return _state(ctx, figure, "gradients", "bytes per gradient")


def optimizer_memory(ctx: Context, figure: Figure) -> Answer:
    plan, _ = ctx.plan_for(figure)
    width = state_widths(plan)["optimizer states"]
    answer = _state(ctx, figure, "optimizer states", f"{width} bytes / ZeRO share")
    return Answer(answer.value, answer.formula, f"{answer.why} {optimizer_ratio(ctx, figure).why}")


def optimizer_ratio(ctx: Context, figure: Figure) -> Answer:
    """Bytes of optimizer state per byte of weights, before ZeRO divides them."""
    plan, program = ctx.plan_for(figure)
    widths = state_widths(plan)
    ratio = widths["optimizer states"] / widths["weights"]
    name = {"adamw": "AdamW", "sgd": "SGD"}[ctx.workload.optimizer]
    why = f"{name} in {ctx.workload.precision} keeps {ratio:.3g} bytes for each byte of weights"
    if ctx.workload.has_master_weights:
        in_place = program.engine.master_in_parameter.value
        why += ", which are their own FP32 masters" if in_place else ", FP32 master weights included"
    return Answer(ratio, "optimizer bytes / weight bytes, without ZeRO", why + ".")


def _state(ctx: Context, figure: Figure, line: str, factor: str) -> Answer:
    """A model state on the pipeline rank that holds most of it."""
    plan, program = ctx.plan_for(figure)
    held = [held_params(program.stages_of(rank)) for rank in range(plan.layout.pp)]
    totals = [state_bytes(plan, params)[line] for params in held]
    size = max(totals)
    rank = totals.index(size)
    count = sum(local_numel(param, plan.layout) for param in held[rank].values())
    why = f"A GPU of pipeline rank {rank} holds {format_count(count)} parameters, "
    why += f"{size / count:.3g} bytes of {line} for each (ZeRO-{plan.policy.zero_stage})."
    why += _counted_as_bytes(ctx, figure) if line != "optimizer states" else ""
    return Answer(size, f"sum of local parameters · {factor}", why)


def _counted_as_bytes(ctx: Context, figure: Figure) -> str:
    """Whether the stated bytes are really a count of parameters per GPU: a common slip."""
    stated = BYTES.parse(figure.value, figure.id)
    gpus, width = ctx.cluster.num_gpus, ctx.workload.compute_bytes
    claimed = [
        float(f.value) for f in ctx.claims.figures if f.id == "parameters" and isinstance(f.value, float)
    ]
    for total in (*claimed, float(ctx.parameters.total)):
        if isclose(stated, total / gpus, rel_tol=0.005):
            count, size = format_count(total / gpus), BYTES.format(total / gpus * width)
            return (
                f" The document takes {format_count(total)} / {gpus} = {count} parameters for bytes; "
                f"at {width} bytes each, {size}."
            )
    return ""


def activation_memory(ctx: Context, figure: Figure) -> Answer:
    plan, _ = ctx.plan_for(figure)
    rank = max(ctx.memory_for(figure), key=_kept_bytes)
    count = rank.num_in_flight
    unit = "micro-batch" if len(rank.stages) == 1 else "chunk"
    unit += "" if count == 1 else "es" if unit == "micro-batch" else "s"
    why = f"With {_workload_words(ctx, figure)} pipeline rank {rank.pp_rank} keeps "
    why += f"{count} {unit} in flight under {plan.policy.schedule}"
    if rank.line("logits"):
        why += f", logits of {BYTES.format(rank.line('logits'))} included"
    return Answer(_kept_bytes(rank), "saved tensors per micro-batch · micro-batches in flight", why + ".")


def _kept_bytes(rank: RankMemory) -> int:
    return sum(rank.line(name) for name in ("activations", "logits", "deferred weight gradients"))


def total_memory(ctx: Context, figure: Figure) -> Answer:
    rank = ctx.worst_memory(figure)
    largest = sorted(rank.lines, key=lambda line: -line.bytes)[:3]
    parts = ", ".join(f"{line.name} {BYTES.format(line.bytes)}" for line in largest)
    why = f"With {_workload_words(ctx, figure)} "
    why += f"pipeline rank {rank.pp_rank} needs most: {parts}."
    return Answer(rank.total_bytes, "states + activations + buffers + slack + context", why)


def memory_utilization(ctx: Context, figure: Figure) -> Answer:
    rank, memory = ctx.worst_memory(figure), ctx.cluster.gpu.memory
    why = f"The fullest GPU needs {BYTES.format(rank.total_bytes)} of its {BYTES.format(memory)}."
    return Answer(rank.total_bytes / memory, "total memory / GPU memory", why)


def memory_efficiency(ctx: Context, figure: Figure) -> Answer:
    """Share of the fullest GPU's memory that is neither a copy of what other GPUs hold nor overhead."""
    rank = ctx.worst_memory(figure)
    repeated = _repeated_bytes(ctx, figure, rank.pp_rank)
    overhead = sum(line.bytes for line in rank.lines if line.name in _OVERHEAD)
    share = 1 - (repeated + overhead) / rank.total_bytes
    why = (
        f"{BYTES.format(repeated)} of the {BYTES.format(rank.total_bytes)} repeat model states of other GPUs "
    )
    why += f"and {BYTES.format(overhead)} are buffers, slack and runtime context."
    return Answer(share, "1 − (copies of other GPUs' states + overhead) / total memory", why)


_OVERHEAD = frozenset(
    (
        "pipeline buffers",
        "expert dispatch buffers",
        "gathered parameters",
        "gradient bucket",
        "allocator slack",
        "runtime context",
        "recomputed activations",
    )
)


def _repeated_bytes(ctx: Context, figure: Figure, pp_rank: int) -> float:
    """Bytes of model states on one rank that its stage holds elsewhere too: (c − 1)/c of what is there c
    times. A share under ZeRO is held once, unless tp does not cut the parameter (a norm)."""
    plan, program = ctx.plan_for(figure)
    repeated = 0.0
    for param in held_params(program.stages_of(pp_rank)).values():
        number = copies(param, plan.layout)
        of_share = number / zero_degree(param, plan.layout)
        for state in state_parts(plan, {param.name: param}).values():
            repeated += (1 - 1 / number) * state.whole + (1 - 1 / of_share) * state.divided
    return repeated


def _workload_words(ctx: Context, figure: Figure) -> str:
    plan, _ = ctx.plan_for(figure)
    length = figure.at.sequence_length or ctx.workload.max_sequence_length
    return f"micro-batch {plan.policy.micro_batch_size} at {length:,} tokens"
