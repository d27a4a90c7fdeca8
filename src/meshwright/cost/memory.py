"""Peak memory of every pipeline rank, line by line.

Model states follow Rajbhandari et al. (arXiv:1910.02054 §3.1), divided over dp·cp for dense parameters and
over edp for routed experts. Activations follow the pipeline order action by action: peak = states +
what is held in flight + what one backward pass needs on top. The arithmetic of every line stands in
`cost/parts.py` and `cost/rank.py`, which a search over many layouts shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshwright.cost.parts import (
    STATES,
    BlockBytes,
    Setting,
    StateBytes,
    block_bytes,
    head_bytes,
    states,
)
from meshwright.cost.rank import CONTEXT, SLACK, RankContent, fixed_lines
from meshwright.cost.routing import described_load
from meshwright.ir.holding import Holding, holding, sum_of_kinds
from meshwright.ir.in_flight import peak_of_rank
from meshwright.ir.parameters import Param
from meshwright.ir.program import LoweredBlock, Program, StageProgram, holdings, kinds_of
from meshwright.ir.schedule import ActivationPeak
from meshwright.plan import Plan

__all__ = [
    "STATES",
    "MemoryLine",
    "RankMemory",
    "StateBytes",
    "held_params",
    "memory",
    "rank_memory",
    "state_bytes",
    "state_parts",
    "state_widths",
    "worst",
]

CPU_CONTEXT_SOURCE = "assumed: Python, torch and gloo in a process of its own"


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
        """Sum of all lines: what the driver reports."""
        return sum(line.bytes for line in self.lines)

    @property
    def reserved_bytes(self) -> int:
        """What PyTorch's allocator has taken from the driver (torch.cuda.max_memory_reserved)."""
        return self.total_bytes - self.line(CONTEXT)

    @property
    def allocated_bytes(self) -> int:
        """What tensors hold (torch.cuda.max_memory_allocated)."""
        return self.reserved_bytes - self.line(SLACK)

    def line(self, name: str) -> int:
        """Bytes of one line; 0 where the rank has none."""
        return sum(line.bytes for line in self.lines if line.name == name)


def memory(program: Program) -> tuple[RankMemory, ...]:
    """Peak memory of every pipeline rank of a program."""
    blocks = _Blocks(program)
    return tuple(_rank_memory(blocks, rank) for rank in range(program.plan.layout.pp))


def worst(ranks: tuple[RankMemory, ...]) -> RankMemory:
    """The pipeline rank that needs most."""
    return max(ranks, key=lambda rank: rank.total_bytes)


def rank_memory(program: Program, pp_rank: int) -> RankMemory:
    """Peak memory of one pipeline rank."""
    return _rank_memory(_Blocks(program), pp_rank)


class _Blocks:
    """The bytes of a program's blocks and what is held of their parameters, each kind counted once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.setting = Setting.of(program.plan)
        self.bytes: dict[object, BlockBytes] = {}
        self.holdings = holdings(program.plan)
        plan = program.plan
        self.load = described_load(plan.model, plan.workload.routing, plan.layout.ep)

    def kind(self, name: str) -> object:
        """What a block's bytes and a parameter's owner depend on: the kind of a layer, or the name."""
        words = name.split(".")
        return self.program.plan.model.layer_kind(int(words[1])) if words[0] == "layers" else words[0]

    def of(self, block: LoweredBlock) -> BlockBytes:
        """The bytes of a block."""
        kind = self.kind(block.name)
        if kind not in self.bytes:
            plan = self.program.plan
            self.bytes[kind] = (
                head_bytes(block, self.setting, plan.layout.tp)
                if block.name == "head"
                else block_bytes(block, self.setting, plan.policy.recompute, self.load)
            )
        return self.bytes[kind]

    def held(self, stages: Sequence[StageProgram]) -> tuple[Holding, int]:
        """What a rank holds of its stages' parameters, and the elements of the largest block among them."""
        counted = kinds_of(self.program.plan.model, stages)
        largest = max(self.holdings[kind].total for kind in counted)
        return sum_of_kinds(self.holdings, counted), largest


def _rank_memory(blocks: _Blocks, pp_rank: int) -> RankMemory:
    plan, setting = blocks.program.plan, blocks.setting
    stages = blocks.program.stages_of(pp_rank)
    peak = _peak(blocks, pp_rank)
    held, largest = blocks.held(stages)
    in_flight = list(_held(blocks, stages, peak))
    content = RankContent(
        held_bytes=sum(line.bytes for line in in_flight),
        blocks=list({id(b): b for stage in stages for b in map(blocks.of, stage.blocks)}.values()),
        params=held,
        largest_block=largest,
        stages=[blocks.held((stage,))[0] for stage in stages],
        sends_bytes=sum(task.bytes for stage in stages for task in stage.sends),
    )
    shards = plan.layout.size("dp_shard"), plan.layout.size("edp_shard")
    sizes = fixed_lines(setting, content, plan.num_micro_batches, *shards)
    whys = {**_states(setting, plan), **_transient(setting), **_allocator(setting)}
    lines = [MemoryLine(name, size, *whys[name]) for name, size in sizes.items()]
    ordered = [*lines[: len(STATES)], *in_flight, *lines[len(STATES) :]]
    kept = tuple(line for line in ordered if line.bytes)
    return RankMemory(pp_rank, tuple(stage.index for stage in stages), kept, peak.num_in_flight)


Why = tuple[str, bool]
"""Where a line comes from, and whether that is an assumption."""


def _allocator(setting: Setting) -> dict[str, Why]:
    """The allocator's slack, and what the runtime holds before the model: a CUDA context on a GPU, a Python
    process on a CPU."""
    slack, context = setting.engine.slack, setting.engine.context
    share = f"{100 * slack.value:g}% of what tensors hold"
    local = (CPU_CONTEXT_SOURCE, True)
    return {
        SLACK: (f"{share}; {slack.source}", slack.is_assumed),
        CONTEXT: local if setting.is_local else (context.source, context.is_assumed),
    }


def state_widths(plan: Plan) -> dict[str, int]:
    """Bytes per parameter of each state."""
    return Setting.of(plan).widths()


def state_parts(plan: Plan, params: Mapping[str, Param]) -> dict[str, StateBytes]:
    """Weights, gradients and optimizer states of one rank, by what ZeRO divides and what stays whole."""
    return states(Setting.of(plan), holding(params.values(), plan.layout), plan.num_micro_batches)


def state_bytes(plan: Plan, params: Mapping[str, Param]) -> dict[str, int]:
    """Weights, gradients and optimizer states of one rank, in bytes."""
    return {name: part.total for name, part in state_parts(plan, params).items()}


def held_params(stages: tuple[StageProgram, ...]) -> dict[str, Param]:
    """The distinct parameters of a rank: a tied embedding that stands in two of its stages counts once."""
    return {param.name: param for stage in stages for param in stage.params}


def _states(setting: Setting, plan: Plan) -> dict[str, Why]:
    zero, count = setting.zero_stage, plan.num_micro_batches
    in_place = setting.masters_in_place
    whole = "FP32 masters divided, the gathered copy whole" if in_place else f"whole under ZeRO-{zero}"
    kept = {
        "weights": "divided by ZeRO-3" if zero == 3 else whole,
        "gradients": f"divided by ZeRO-{zero} in every backward"
        if setting.divides_gradients(count)
        else "whole until the step's one reduction",
        "optimizer states": f"divided by ZeRO-{zero}" if zero else "whole without ZeRO",
    }
    return {name: (why, False) for name, why in kept.items()}


def _peak(blocks: _Blocks, pp_rank: int) -> ActivationPeak:
    plan, stages = blocks.program.plan, blocks.program.stages
    forward = [sum(blocks.of(block).saved for block in stage.blocks) for stage in stages]
    deferred = [sum(blocks.of(block).deferred for block in stage.blocks) for stage in stages]
    layout, count = plan.layout, plan.num_micro_batches
    return peak_of_rank(plan.policy.schedule, layout.pp, layout.vpp, count, pp_rank, forward, deferred)


def _held(blocks: _Blocks, stages: tuple[StageProgram, ...], peak: ActivationPeak) -> Iterator[MemoryLine]:
    by_index = {stage.index: stage for stage in stages}
    activations = logits = deferred = 0
    for index, held, waiting in zip(peak.stages, peak.forward_held, peak.weight_held, strict=True):
        for block in map(blocks.of, by_index[index].blocks):
            activations += held * (block.saved - block.logits)
            logits += held * block.logits
            deferred += waiting * block.deferred
    policy = blocks.program.plan.policy
    one, many = ("micro-batch", "micro-batches") if len(stages) == 1 else ("chunk", "chunks")
    unit = one if peak.num_in_flight == 1 else many
    why = f"{peak.num_in_flight} {unit} in flight under {policy.schedule}, recompute {policy.recompute}"
    yield MemoryLine("activations", activations, why)
    yield MemoryLine("logits", logits, "what the loss keeps of the logits, in FP32, where the head stands")
    yield MemoryLine("deferred weight gradients", deferred, "inputs and output gradients that wait for W")


def _transient(setting: Setting) -> dict[str, Why]:
    alone = ("assumed: the block at work and the next one, whole", True)
    kept = "whole from a backward to the stage's next forward: pipelining keeps ZeRO-3 from dividing them"
    return {
        "recomputed activations": ("assumed: one layer at a time, made again in backward", True),
        "activation gradients": (
            "assumed: no more than the largest op's output and input gradients at once",
            True,
        ),
        "expert dispatch buffers": ("assumed: both sides of the largest exchange", True),
        "gradient placeholders": ("empty weight gradients, one for each shape of a layer's weights", False),
        "gradient shares": ("reduced gradients, in a buffer beside the whole ones", False),
        "pipeline buffers": (
            ("receive buffers of all micro-batches, made before the first", False)
            if setting.engine.receives_ahead.value
            else ("assumed: one send and one receive buffer per neighbour", True)
        ),
        "gathered parameters": alone if setting.pp == 1 else (kept, False),
        "gradient bucket": ("assumed: one block's gradients while they are divided", True),
    }
