"""Peak memory of every pipeline rank, line by line.

Model states follow Rajbhandari et al. (arXiv:1910.02054 §3.1), divided over dp·cp for dense parameters and
over edp for routed experts. Activations follow the pipeline order action by action: peak = states +
what is held in flight + what one backward pass needs on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from meshwright.cluster import LOCAL_GPU
from meshwright.engines import engine_named
from meshwright.ir.graph import OpKind
from meshwright.ir.parameters import Param
from meshwright.ir.program import LoweredBlock, Program, StageProgram
from meshwright.ir.schedule import ActivationPeak, live_at_peak
from meshwright.ir.sharding import local_numel, zero_degree
from meshwright.ir.step import reduces_each_micro_batch
from meshwright.ir.tasks import CommTask, ComputeTask
from meshwright.plan import Plan

LOGITS = ("head.logits", "head.probabilities")
STATES = ("weights", "gradients", "optimizer states")
ADAM_STATE_BYTES = 8
CPU_CONTEXT_BYTES = 250_000_000
CPU_CONTEXT_SOURCE = "assumed: Python, torch and gloo in a process of its own"
MASTER_BYTES = 4
ACTIVE_STAGES = 3
"""Stages of a rank that PyTorch keeps gathered at most (torch 2.13, pipelining/schedules.py:
`_add_unshard_reshard`)."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of one model state on a rank: kept whole, and kept as this rank's share under ZeRO."""

    whole: int = 0
    divided: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.whole + self.divided

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(self.whole + other.whole, self.divided + other.divided)


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One named part of a rank's memory; `assumed` when no measurement or source stands behind it."""

    name: str
    bytes: int
    why: str
    assumed: bool = False


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Peak memory of the ranks at one pipeline position."""

    pp_rank: int
    stages: tuple[int, ...]
    lines: tuple[MemoryLine, ...]
    num_in_flight: int

    @property
    def total_bytes(self) -> int:
        """Sum of all lines."""
        return sum(line.bytes for line in self.lines)

    def line(self, name: str) -> int:
        """Bytes of one line; 0 where the rank has none."""
        return sum(line.bytes for line in self.lines if line.name == name)


def memory(program: Program) -> tuple[RankMemory, ...]:
    """Peak memory of every pipeline rank of a program."""
    return tuple(rank_memory(program, rank) for rank in range(program.plan.layout.pp))


def worst(ranks: tuple[RankMemory, ...]) -> RankMemory:
    """The pipeline rank that needs most."""
    return max(ranks, key=lambda rank: rank.total_bytes)


def rank_memory(program: Program, pp_rank: int) -> RankMemory:
    """Peak memory of one pipeline rank."""
    stages = program.stages_of(pp_rank)
    peak = _peak(program, pp_rank)
    lines = [
        *_states(program, stages),
        *_held(program, stages, peak),
        *_transient(program, stages),
        *_buffers(program, stages),
    ]
    engine = program.engine
    dynamic = sum(line.bytes for line in lines if line.name not in STATES)
    slack = round(dynamic * engine.slack.value)
    share = f"{100 * engine.slack.value:g}% of activations and buffers"
    lines.append(
        MemoryLine("allocator slack", slack, f"{share}; {engine.slack.source}", engine.slack.is_assumed)
    )
    lines.append(_context(program))
    kept = tuple(line for line in lines if line.bytes)
    return RankMemory(pp_rank, tuple(stage.index for stage in stages), kept, peak.num_in_flight)


def _context(program: Program) -> MemoryLine:
    """What the runtime holds before the model: a CUDA context on a GPU, a Python process on a CPU."""
    if program.plan.cluster.gpu.name == LOCAL_GPU:
        return MemoryLine("runtime context", CPU_CONTEXT_BYTES, CPU_CONTEXT_SOURCE, True)
    fact = program.engine.context
    return MemoryLine("runtime context", fact.value, fact.source, fact.is_assumed)


def state_widths(plan: Plan) -> dict[str, int]:
    """Bytes per parameter of each state: weight (compute type, or FP32 where the engine keeps masters in
    place), gradient, and for AdamW two FP32 moments plus in mixed precision an FP32 master."""
    engine = engine_named(plan.policy.engine)
    in_place = engine.master_in_parameter.value
    master = MASTER_BYTES if plan.workload.has_master_weights and not in_place else 0
    moments = ADAM_STATE_BYTES if plan.workload.optimizer == "adamw" else 0
    weight = MASTER_BYTES if in_place else plan.workload.compute_bytes
    widths = (weight, engine.gradient_bytes.value, master + moments)
    return dict(zip(STATES, widths, strict=True))


def state_parts(plan: Plan, params: Mapping[str, Param]) -> dict[str, StateBytes]:
    """Weights, gradients and optimizer states of one rank, by what ZeRO divides and what stays whole.

    ZeRO 1 divides optimizer states, 2 also gradients, 3 also weights. Gradients that add up over
    micro-batches before one reduction are whole until then, whatever the stage (see `divides_gradients`). An
    engine that keeps masters in its parameters divides those always, and below ZeRO-3 keeps the gathered copy
    in the compute type between forward and backward.
    """
    zero, in_place = plan.policy.zero_stage, engine_named(plan.policy.engine).master_in_parameter.value
    widths = state_widths(plan)
    divided = {
        "weights": zero == 3 or in_place,
        "gradients": divides_gradients(plan),
        "optimizer states": zero >= 1,
    }
    parts = dict.fromkeys(STATES, StateBytes())
    for param in params.values():
        whole = local_numel(param, plan.layout)
        share = ceil(whole / zero_degree(param, plan.layout))
        for name, width in widths.items():
            parts[name] += StateBytes(divided=share * width) if divided[name] else StateBytes(whole * width)
        if in_place and zero < 3:
            parts["weights"] += StateBytes(whole * plan.workload.compute_bytes)
    return parts


def state_bytes(plan: Plan, params: Mapping[str, Param]) -> dict[str, int]:
    """Weights, gradients and optimizer states of one rank, in bytes."""
    return {name: part.total for name, part in state_parts(plan, params).items()}


def divides_gradients(plan: Plan) -> bool:
    """Whether a rank keeps only its share of the gradients: under ZeRO-2 and 3, where the backward that makes
    them reduces them too. A pipeline adds them up whole, and reduces after its last backward."""
    if plan.policy.zero_stage < 2 or plan.layout.pp > 1:
        return False
    return plan.num_micro_batches == 1 or reduces_each_micro_batch(plan)


def held_params(stages: tuple[StageProgram, ...]) -> dict[str, Param]:
    """The distinct parameters of a rank: a tied embedding that stands in two of its stages counts once."""
    return {param.name: param for stage in stages for param in stage.params}


def _states(program: Program, stages: tuple[StageProgram, ...]) -> Iterator[MemoryLine]:
    plan = program.plan
    zero = plan.policy.zero_stage
    totals = state_bytes(plan, held_params(stages))
    in_place = program.engine.master_in_parameter.value
    whole = "FP32 masters divided, the gathered copy whole" if in_place else f"whole under ZeRO-{zero}"
    kept = {
        "weights": "divided by ZeRO-3" if zero == 3 else whole,
        "gradients": f"divided by ZeRO-{zero} in every backward"
        if divides_gradients(plan)
        else "whole until the step's one reduction",
        "optimizer states": f"divided by ZeRO-{zero}" if zero else "whole without ZeRO",
    }
    for name, size in totals.items():
        yield MemoryLine(name, size, kept[name])


def _peak(program: Program, pp_rank: int) -> ActivationPeak:
    forward = [sum(block.saved_bytes for block in stage.blocks) for stage in program.stages]
    deferred = [sum(block.deferred_bytes for block in stage.blocks) for stage in program.stages]
    return live_at_peak(program.schedule, pp_rank, forward, deferred)


def _held(program: Program, stages: tuple[StageProgram, ...], peak: ActivationPeak) -> Iterator[MemoryLine]:
    by_index = {stage.index: stage for stage in stages}
    activations = logits = deferred = 0
    for index, held, waiting in zip(peak.stages, peak.forward_held, peak.weight_held, strict=True):
        for block in by_index[index].blocks:
            of_logits = sum(size for name, (size, _) in block.saved.items() if name in LOGITS)
            activations += held * (block.saved_bytes - of_logits)
            logits += held * of_logits
            deferred += waiting * block.deferred_bytes
    policy = program.plan.policy
    one, many = ("micro-batch", "micro-batches") if len(stages) == 1 else ("chunk", "chunks")
    unit = one if peak.num_in_flight == 1 else many
    why = f"{peak.num_in_flight} {unit} in flight under {policy.schedule}, recompute {policy.recompute}"
    yield MemoryLine("activations", activations, why)
    yield MemoryLine("logits", logits, "what the loss keeps of the logits, in FP32, where the head stands")
    yield MemoryLine("deferred weight gradients", deferred, "inputs and output gradients that wait for W")


def _transient(program: Program, stages: tuple[StageProgram, ...]) -> Iterator[MemoryLine]:
    blocks = [block for stage in stages for block in stage.blocks]
    remade = max(sum(s for s, _ in b.saved_without_recompute.values()) - b.saved_bytes for b in blocks)
    why = "assumed: one layer at a time, made again in backward"
    yield MemoryLine("recomputed activations", max(0, remade), why, True)
    unit = program.plan.workload.compute_bytes
    yield MemoryLine(
        "activation gradients",
        max(_gradient_bytes(block, unit) for block in blocks),
        "assumed: no more than the largest op's output and input gradients at once",
        True,
    )


def _gradient_bytes(block: LoweredBlock, unit: int) -> int:
    largest = 0
    for task in block.tasks:
        if isinstance(task, ComputeTask) and task.phase == "forward":
            largest = max(largest, _op_gradient_bytes(task, unit))
    return largest


def _op_gradient_bytes(task: ComputeTask, unit: int) -> int:
    sizes = task.sizes
    match task.kind:
        case OpKind.MATMUL | OpKind.GROUPED_MATMUL:
            m, n, k = sizes[-3:]
            return m * (n + k) * unit
        case OpKind.ATTENTION:
            batch, heads, queries, keys, qk_dim, v_dim = sizes
            return batch * heads * (queries * (qk_dim + v_dim) + keys * (qk_dim + v_dim)) * unit
        case OpKind.LOSS:  # FP32: the gradient of the log-probabilities and that of the logits
            return sizes[0] * sizes[1] * 8
        case _:
            return 2 * sizes[0] * sizes[1] * unit


def _buffers(program: Program, stages: tuple[StageProgram, ...]) -> Iterator[MemoryLine]:
    plan = program.plan
    sends = sum(task.bytes for stage in stages for task in stage.sends)
    yield MemoryLine(
        "pipeline buffers", 2 * sends, "assumed: one send and one receive buffer per neighbour", True
    )
    comms = [task for stage in stages for task in stage.tasks() if isinstance(task, CommTask)]
    exchanged = max((task.bytes for task in comms if task.axis in ("ep", "etp")), default=0)
    yield MemoryLine(
        "expert dispatch buffers", 2 * exchanged, "assumed: both sides of the largest exchange", True
    )
    largest = _largest_block(plan, stages)
    if plan.policy.zero_stage == 3:
        yield _gathered(plan, stages, largest)
    if plan.layout.size("dp_cp") > 1 and plan.policy.zero_stage >= 2:
        width = program.engine.gradient_bytes.value
        why = "assumed: one block's gradients while they are divided"
        yield MemoryLine("gradient bucket", largest * width, why, True)


def _gathered(plan: Plan, stages: tuple[StageProgram, ...], largest: int) -> MemoryLine:
    """What ZeRO-3 keeps whole beside the shares, in the compute type.

    Alone, a rank gathers block by block. Under a pipeline PyTorch calls `set_reshard_after_backward(False)`
    (torch 2.13, pipelining/stage.py, backward_maybe_with_nosync): what a backward has gathered stays until
    the next forward of the stage divides it again.
    """
    name, width = "gathered parameters", plan.workload.compute_bytes
    if plan.layout.pp == 1:
        why = "assumed: the block at work and the next one, whole"
        return MemoryLine(name, 2 * largest * width, why, True)
    sizes = sorted(
        sum(local_numel(p, plan.layout) for p in held_params((stage,)).values() if _is_gathered(plan, p))
        for stage in stages
    )
    why = "whole from a backward to the stage's next forward: pipelining keeps ZeRO-3 from dividing them"
    return MemoryLine(name, sum(sizes[-ACTIVE_STAGES:]) * width, why)


def _is_gathered(plan: Plan, param: Param) -> bool:
    """Whether a whole copy stands beside the share: not where the share is all, in the compute type."""
    cast = engine_named(plan.policy.engine).master_in_parameter.value
    return cast or zero_degree(param, plan.layout) > 1


def _largest_block(plan: Plan, stages: tuple[StageProgram, ...]) -> int:
    """Most local parameters that one block of a rank has: a layer, the embedding, or the head."""
    sizes: Counter[str] = Counter()
    for stage in stages:
        for param in stage.params:
            words = param.name.split(".")
            block = ".".join(words[:2]) if words[0] == "layers" else words[0]
            sizes[block] += local_numel(param, plan.layout)
    return max(sizes.values())
