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
from meshwright.ir.tasks import CommTask, ComputeTask
from meshwright.plan import Plan

LOGITS = ("head.logits", "head.probabilities")
STATES = ("weights", "gradients", "optimizer states")
ADAM_STATE_BYTES = 8
CPU_CONTEXT_BYTES = 250_000_000
CPU_CONTEXT_SOURCE = "assumed: Python, torch and gloo in a process of its own"
MASTER_BYTES = 4


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


def state_bytes(plan: Plan, params: Mapping[str, Param]) -> dict[str, int]:
    """Weights, gradients and optimizer states of one rank, in bytes.

    Per parameter: weight (compute type, or FP32 where the engine keeps masters in place), gradient, and for
    AdamW two FP32 moments plus an FP32 master in mixed precision. ZeRO 1 divides optimizer states, 2 also
    gradients, 3 also weights. Under ZeRO 2 and 3 with several micro-batches gradients stay whole until the
    one reduction at the end of the step.
    """
    engine, zero = engine_named(plan.policy.engine), plan.policy.zero_stage
    in_place = engine.master_in_parameter.value
    weight_width = MASTER_BYTES if in_place else plan.workload.compute_bytes
    master = MASTER_BYTES if plan.workload.has_master_weights and not in_place else 0
    optimizer_width = master + (ADAM_STATE_BYTES if plan.workload.optimizer == "adamw" else 0)
    gradients_divided = zero >= 2 and plan.num_micro_batches == 1
    totals = {"weights": 0, "gradients": 0, "optimizer states": 0}
    for param in params.values():
        whole, ranks = local_numel(param, plan.layout), zero_degree(param, plan.layout)
        share = ceil(whole / ranks)
        totals["weights"] += (share if zero >= 3 or in_place else whole) * weight_width
        if in_place and zero < 3:  # the gathered copy in the compute type stays between forward and backward
            totals["weights"] += whole * plan.workload.compute_bytes
        totals["gradients"] += (share if gradients_divided else whole) * engine.gradient_bytes.value
        totals["optimizer states"] += (share if zero >= 1 else whole) * optimizer_width
    return totals


def held_params(stages: tuple[StageProgram, ...]) -> dict[str, Param]:
    """The distinct parameters of a rank: a tied embedding that stands in two of its stages counts once."""
    return {param.name: param for stage in stages for param in stage.params}


def _states(program: Program, stages: tuple[StageProgram, ...]) -> Iterator[MemoryLine]:
    plan = program.plan
    zero = plan.policy.zero_stage
    totals = state_bytes(plan, held_params(stages))
    kept = {
        "weights": "divided by ZeRO-3" if zero == 3 else f"whole under ZeRO-{zero}",
        "gradients": "whole until the step's one reduction"
        if zero < 2 or plan.num_micro_batches > 1
        else f"divided by ZeRO-{zero}",
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
    unit = "micro-batches" if len(stages) == 1 else "micro-batch chunks"
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
        size = 2 * largest * plan.workload.compute_bytes
        yield MemoryLine(
            "gathered parameters", size, "assumed: the block at work and the next one, whole", True
        )
    if plan.layout.size("dp_cp") > 1 and plan.policy.zero_stage >= 2:
        width = program.engine.gradient_bytes.value
        why = "assumed: one block's gradients while they are divided"
        yield MemoryLine("gradient bucket", largest * width, why, True)


def _largest_block(plan: Plan, stages: tuple[StageProgram, ...]) -> int:
    """Most local parameters that one block of a rank has: a layer, the embedding, or the head."""
    sizes: Counter[str] = Counter()
    for stage in stages:
        for param in stage.params:
            words = param.name.split(".")
            block = ".".join(words[:2]) if words[0] == "layers" else words[0]
            sizes[block] += local_numel(param, plan.layout)
    return max(sizes.values())
