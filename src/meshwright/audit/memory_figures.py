"""Figures that the memory model decides."""

from __future__ import annotations

from math import isclose

from meshwright.audit.answer import Answer
from meshwright.audit.context import Context
from meshwright.claims import Figure
from meshwright.cost.memory import held_params, state_bytes
from meshwright.ir.sharding import copies, local_numel
from meshwright.units import BYTES, format_count


def parameter_memory(ctx: Context, figure: Figure) -> Answer:
    return _state(ctx, figure, "weights", "bytes per weight")


def gradient_memory(ctx: Context, figure: Figure) -> Answer:
    return _state(ctx, figure, "gradients", "bytes per gradient")


def optimizer_memory(ctx: Context, figure: Figure) -> Answer:
    answer = _state(ctx, figure, "optimizer states", "(4 master + 8 moments) / ZeRO share")
    return Answer(answer.value, answer.formula, f"{answer.why} {optimizer_ratio(ctx, figure).why}")


def optimizer_ratio(ctx: Context, figure: Figure) -> Answer:
    """Bytes of optimizer state per byte of weights, before ZeRO divides them."""
    plan, program = ctx.plan_for(figure)
    policy = plan.policy.model_copy(update={"zero_stage": 0})
    totals = state_bytes(plan.model_copy(update={"policy": policy}), held_params(program.stages_of(0)))
    ratio = totals["optimizer states"] / totals["weights"]
    name = {"adamw": "AdamW", "sgd": "SGD"}[ctx.workload.optimizer]
    why = f"{name} in {ctx.workload.precision} keeps {ratio:.3g} bytes for each byte of weights"
    if ctx.workload.has_master_weights:
        why += ", FP32 master weights included"
    return Answer(ratio, "optimizer bytes / weight bytes, without ZeRO", why + ".")


def _state(ctx: Context, figure: Figure, line: str, factor: str) -> Answer:
    """A model state on the pipeline rank that holds most of it."""
    plan, program = ctx.plan_for(figure)
    held = [held_params(program.stages_of(rank)) for rank in range(plan.layout.pp)]
    totals = [state_bytes(plan, params)[line] for params in held]
    size = max(totals)
    rank = totals.index(size)
    count = sum(local_numel(param, plan.layout) for param in held[rank].values())
    why = f"{ctx.layout_words}: pipeline rank {rank} holds {format_count(count)} parameters per GPU, "
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
    rank = ctx.worst_memory(figure)
    size = rank.line("activations") + rank.line("logits") + rank.line("deferred weight gradients")
    why = f"{ctx.layout_words}, {_workload_words(ctx, figure)}: pipeline rank {rank.pp_rank} keeps "
    why += f"{rank.num_in_flight} micro-batches in flight under {plan.policy.schedule}."
    return Answer(size, "saved tensors per micro-batch · micro-batches in flight", why)


def total_memory(ctx: Context, figure: Figure) -> Answer:
    rank = ctx.worst_memory(figure)
    largest = sorted(rank.lines, key=lambda line: -line.bytes)[:3]
    parts = ", ".join(f"{line.name} {BYTES.format(line.bytes)}" for line in largest)
    why = f"{ctx.layout_words}, {_workload_words(ctx, figure)}, "
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
    """Bytes of weights and gradients on one rank that its stage holds elsewhere too: (c − 1)/c of c copies.
    States that ZeRO divides are held once."""
    plan, program = ctx.plan_for(figure)
    repeated = 0.0
    for param in held_params(program.stages_of(pp_rank)).values():
        share = 1 - 1 / copies(param, plan.layout)
        states = state_bytes(plan, {param.name: param})
        divided = {
            0: (),
            1: ("optimizer states",),
            2: ("optimizer states",),
            3: ("optimizer states", "weights"),
        }
        whole = sum(size for name, size in states.items() if name not in divided[plan.policy.zero_stage])
        repeated += share * whole
    return repeated


def _workload_words(ctx: Context, figure: Figure) -> str:
    plan, _ = ctx.plan_for(figure)
    length = figure.at.sequence_length or ctx.workload.max_sequence_length
    return f"micro-batch {plan.policy.micro_batch_size} at {length:,} tokens"
