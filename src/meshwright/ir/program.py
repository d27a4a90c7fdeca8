"""A plan lowered to what each pipeline stage does: tasks with local shapes, and the groups they speak to.

Estimator, simulator and memory model all read this; the dry run and training are checked against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from meshwright.engines import Engine, engine_of
from meshwright.ir.blocks import embedding_block, head_block, layer_block
from meshwright.ir.dense import Shape
from meshwright.ir.graph import Block, CollectiveKind, Degrees
from meshwright.ir.holding import Holding, Kind, holding, sum_of_kinds
from meshwright.ir.lowering import (
    LoweredBlock,
    RepeatedLayer,
    block_tasks,
    gradient_reductions,
    parameter_gathers,
)
from meshwright.ir.parameters import (
    Param,
    block_parameters,
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from meshwright.ir.schedule import ActionKind, Schedule, build_schedule, rank_of
from meshwright.ir.sharding import zero_axes
from meshwright.ir.step import gather_phases, reduces_by_block, reduces_each_micro_batch, step_tasks
from meshwright.ir.tasks import CommTask, Phase, Task
from meshwright.layout import Layout
from meshwright.model import Model
from meshwright.plan import Plan
from meshwright.workload import Workload

__all__ = [
    "LoweredBlock",
    "Program",
    "StageProgram",
    "block_tasks",
    "degrees_of",
    "input_bytes",
    "lower",
    "lower_block",
    "model_flops",
    "send_bytes",
    "shape_of",
]


@dataclass(frozen=True)
class StageProgram:
    """One pipeline stage (chunk): its blocks in order, and what it sends."""

    model: Model
    index: int
    rank: int
    layers: tuple[int, ...]
    blocks: tuple[LoweredBlock, ...]
    sends: tuple[CommTask, ...]

    @property
    def has_embedding(self) -> bool:
        """Whether the token embedding stands in this stage."""
        return self.blocks[0].name == "embedding"

    @property
    def has_head(self) -> bool:
        """Whether the head and the loss stand in this stage."""
        return self.blocks[-1].name == "head"

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """The parameters that its ranks hold; a tied embedding once."""
        params = [param for layer in self.layers for param in layer_parameters(self.model, layer)]
        if self.has_embedding:
            params = [*embedding_parameters(self.model), *params]
        if self.has_head:
            params += head_parameters(self.model)
            if self.model.tie_word_embeddings and not self.has_embedding:
                params.append(next(iter(embedding_parameters(self.model))))
        return tuple(params)

    def tasks(self, phase: Phase | None = None) -> Iterator[Task]:
        """Every task of one micro-batch, in order; of one phase where it is named."""
        for block in self.blocks:
            yield from (task for task in block.tasks if phase is None or task.phase == phase)


@dataclass(frozen=True)
class Program:
    """A lowered plan: stages, pipeline order, what happens once per step, and what each pipeline rank holds
    of the parameters."""

    plan: Plan
    stages: tuple[StageProgram, ...]
    step: tuple[tuple[CommTask, ...], ...]
    held: tuple[Holding, ...]

    @property
    def schedule(self) -> Schedule:
        """The pipeline order of the plan."""
        plan = self.plan
        count = plan.num_micro_batches
        return build_schedule(plan.policy.schedule, plan.layout.pp, count, plan.layout.vpp)

    @property
    def engine(self) -> Engine:
        """Facts of the plan's engine."""
        return engine_of(self.plan.policy)

    def stages_of(self, pp_rank: int) -> tuple[StageProgram, ...]:
        """The stages that a pipeline rank holds."""
        return tuple(stage for stage in self.stages if stage.rank == pp_rank)

    def collectives(self, pp_rank: int) -> Iterator[tuple[CommTask, int]]:
        """Every collective of a whole step on a pipeline rank, with how often it runs."""
        count, divided = self.plan.num_micro_batches, zero_axes(self.plan.layout)
        for stage in self.stages_of(pp_rank):
            gathers = self._gathers(stage)
            for task in (*stage.tasks(), *stage.sends):
                if isinstance(task, CommTask):
                    gather = task.kind is CollectiveKind.ALL_GATHER and task.axis in divided
                    yield task, gathers[task.phase] if gather else count
        by_block = self._reduced_by_block()
        for task in self.step[pp_rank]:
            if not task.name.startswith(tuple(f"gradients.{part}" for part in by_block)):
                yield task, 1
        for stage in self.stages_of(pp_rank):
            yield from ((task, 1) for task in self._reductions(stage) if task.name.endswith(by_block))

    def _reduced_by_block(self) -> tuple[str, ...]:
        """The parts of the parameters, dense and experts, that FSDP2 divides and reduces block by block."""
        if not reduces_by_block(self.engine, self.plan.policy.zero_stage):
            return ()
        sizes = zip(("dense", "experts"), zero_axes(self.plan.layout), strict=True)
        return tuple(part for part, axis in sizes if self.plan.layout.size(axis) > 1)

    def _reductions(self, stage: StageProgram) -> Iterator[CommTask]:
        """The reduction of each block's gradients: together what `gradients.dense` and `.experts` sum up."""
        width, layout = self.engine.gradient_bytes.value, self.plan.layout
        for block in stage.blocks:
            params = block_parameters(self.plan.model, block.name)
            has_copy = not stage.has_embedding
            yield from gradient_reductions(block.name, params, layout, width, has_copy)

    def _gathers(self, stage: StageProgram) -> Counter[str]:
        """How often ZeRO-3 gathers a stage's parameters before each phase.

        A forward divides them again. Under a pipeline a backward does not (torch 2.13, pipelining/stage.py:
        `set_reshard_after_backward(False)`), so that what follows it on the stage finds them whole.
        """
        if self.plan.layout.pp == 1:
            return Counter(dict.fromkeys(gather_phases(self.plan), self.plan.num_micro_batches))
        gathers: Counter[str] = Counter()
        whole = False
        for action in self.schedule.actions(stage.rank) if gather_phases(self.plan) else ():
            for part in action.simple_actions:
                if part.stage != stage.index:
                    continue
                forward = part.kind is ActionKind.FORWARD
                gathers["forward" if forward else "input_gradient"] += not whole
                whole = not forward
        return gathers


def shape_of(plan: Plan, sequence_length: int | None = None) -> Shape:
    """What the blocks are built for: the plan's micro-batch at a length, the longest unless told."""
    return Shape(
        micro_batch_size=plan.policy.micro_batch_size,
        sequence_length=sequence_length or plan.workload.max_sequence_length,
        element_bytes=plan.workload.compute_bytes,
        engine=engine_of(plan.policy),
        sequence_parallel=plan.policy.sequence_parallel,
        dispatcher=plan.policy.dispatcher,
        ep=plan.layout.ep,
        tp=plan.layout.tp,
        input_bytes=input_bytes(plan.workload, engine_of(plan.policy)),
    )


def input_bytes(workload: Workload, engine: Engine) -> int | None:
    """Bytes of one element of the inputs that a layer's matmuls keep, where they keep them in 8 bits."""
    return 1 if workload.precision in ("fp8", "fp4") and engine.fp8_inputs.value else None


def lower(plan: Plan, sequence_length: int | None = None) -> Program:
    """The program of a plan. The plan must hold every rule of `verify`."""
    shape = shape_of(plan, sequence_length)
    blocks = _BlockTable(plan, shape)
    stages = []
    first = 0
    num_stages = plan.layout.num_stages
    for index, count in enumerate(plan.policy.layers_per_stage):
        layers = tuple(range(first, first + count))
        first += count
        stages.append(_stage(plan, blocks, index, layers, num_stages))
    kinds = holdings(plan)
    owned = [[stage for stage in stages if stage.rank == rank] for rank in range(plan.layout.pp)]
    held = tuple(sum_of_kinds(kinds, kinds_of(plan.model, own)) for own in owned)
    step = tuple(_rank_step(plan, own, holds) for own, holds in zip(owned, held, strict=True))
    return Program(plan, tuple(stages), step, held)


def _rank_step(plan: Plan, stages: list[StageProgram], held: Holding) -> tuple[CommTask, ...]:
    embedding, head = any(s.has_embedding for s in stages), any(s.has_head for s in stages)
    return tuple(step_tasks(plan, held, embedding, head))


def holdings(plan: Plan) -> dict[Kind, Holding]:
    """What one rank holds of the parameters of each kind of block."""
    model = plan.model
    first = {model.layer_kind(layer): layer for layer in reversed(range(model.num_hidden_layers))}
    params: dict[Kind, list[Param]] = {
        kind: list(layer_parameters(model, layer)) for kind, layer in first.items()
    }
    params["embedding"] = list(embedding_parameters(model))
    params["head"] = list(head_parameters(model))
    params["table"] = params["embedding"][:1]
    return {kind: holding(own, plan.layout) for kind, own in params.items()}


def kinds_of(model: Model, stages: Sequence[StageProgram]) -> Counter[Kind]:
    """How often each kind of block has its parameters in these stages of one rank."""
    counted: Counter[Kind] = Counter(model.layer_kind(layer) for stage in stages for layer in stage.layers)
    embedding, head = any(s.has_embedding for s in stages), any(s.has_head for s in stages)
    counted.update({"embedding": int(embedding), "head": int(head)})
    counted["table"] = int(model.tie_word_embeddings and head and not embedding)
    return +counted


class _BlockTable:
    """Lowered blocks, each kind of layer lowered once and then renamed for its layer."""

    def __init__(self, plan: Plan, shape: Shape) -> None:
        self.plan, self.shape = plan, shape
        self.kinds: dict[tuple[bool, bool], tuple[int, LoweredBlock]] = {}

    def layer(self, layer: int) -> LoweredBlock:
        kind = self.plan.model.layer_kind(layer)
        if kind not in self.kinds:
            whole = layer_block(self.plan.model, layer, self.shape)
            self.kinds[kind] = (layer, lower_block(self.plan, whole))
        known, block = self.kinds[kind]
        return block if known == layer else RepeatedLayer(block, f"layers.{layer}")

    def end(self, name: Literal["embedding", "head"]) -> LoweredBlock:
        build = embedding_block if name == "embedding" else head_block
        return lower_block(self.plan, build(self.plan.model, self.shape))


def _stage(
    plan: Plan, blocks: _BlockTable, index: int, layers: tuple[int, ...], num_stages: int
) -> StageProgram:
    lowered = [blocks.layer(layer) for layer in layers]
    if index == 0:
        lowered.insert(0, blocks.end("embedding"))
    if index == num_stages - 1:
        lowered.append(blocks.end("head"))
    sends = tuple(_sends(plan, blocks.shape, index, num_stages))
    rank = rank_of(plan.policy.schedule, index, plan.layout.pp)
    return StageProgram(plan.model, index, rank, layers, tuple(lowered), sends)


def _sends(plan: Plan, shape: Shape, stage: int, num_stages: int) -> Iterator[CommTask]:
    """Activations to the next stage and gradients to the previous one, where they leave the rank."""
    degrees = degrees_of(plan.layout, plan.policy.sequence_parallel)
    size = send_bytes(plan.model, shape, degrees)
    rank = rank_of(plan.policy.schedule, stage, plan.layout.pp)
    directions: tuple[tuple[str, Phase, int], ...] = (
        ("activation", "forward", stage + 1),
        ("gradient", "input_gradient", stage - 1),
    )
    for name, phase, other in directions:
        if not 0 <= other < num_stages:
            continue
        if rank_of(plan.policy.schedule, other, plan.layout.pp) != rank:
            yield CommTask(
                f"stages.{stage}.send_{name}",
                phase,
                CollectiveKind.SEND_RECV,
                "pp",
                plan.layout.pp,
                size,
            )


def send_bytes(model: Model, shape: Shape, degrees: Degrees) -> int:
    """Bytes of the residual stream that one rank sends to a neighbouring stage. Elementwise.

    Without sequence parallelism each rank of tp holds all of it; some engines send a share each.
    """
    whole = shape.scattered.local(degrees) * model.hidden_size * shape.element_bytes
    if not shape.engine.partitions_sends.value:
        return whole
    return -(-whole * degrees["sp"] // degrees["tp"])


def degrees_of(layout: Layout, sequence_parallel: bool) -> Degrees:
    """Ranks along each axis that divides an op's dims."""
    sp = layout.tp if sequence_parallel else 1
    return {"tp": layout.tp, "cp": layout.cp, "ep": layout.ep, "etp": layout.etp, "sp": sp}


def lower_block(plan: Plan, block: Block) -> LoweredBlock:
    """A block with the plan's degrees put in: local tasks of every phase, and what is kept for backward."""
    degrees = degrees_of(plan.layout, plan.policy.sequence_parallel)
    engine = engine_of(plan.policy)
    params = block_parameters(plan.model, block.name)
    phases, unit = gather_phases(plan), plan.workload.compute_bytes
    added = [*parameter_gathers(block, params, plan.layout, phases, unit)]
    if reduces_each_micro_batch(plan):
        added += gradient_reductions(block.name, params, plan.layout, engine.gradient_bytes.value)
    return block_tasks(block, degrees, engine, plan.policy.recompute, added)


def model_flops(plan: Plan, sequence_length: int) -> int:
    """Model FLOPs of one training step: three times those of forward, because each gradient costs as much.

    The convention of MFU (Chowdhery et al., arXiv:2204.02311 appendix B) with causal attention counted once:
    neither recompute nor the scores that FlashAttention makes again are work that a step must do.
    """
    update = {"micro_batch_size": 1, "sequence_parallel": False, "zero_stage": 0}
    policy = plan.policy.model_copy(update={**update, "engine": "native"})  # which pads no vocabulary
    alone = plan.model_copy(update={"layout": Layout(), "policy": policy})
    blocks = _BlockTable(alone, shape_of(alone, sequence_length))
    kinds = Counter(plan.model.layer_kind(layer) for layer in range(plan.model.num_hidden_layers))
    first = {plan.model.layer_kind(layer): layer for layer in reversed(range(plan.model.num_hidden_layers))}
    forward = sum(number * blocks.layer(first[kind]).flops().forward for kind, number in kinds.items())
    forward += blocks.end("embedding").flops().forward + blocks.end("head").flops().forward
    return 3 * plan.workload.global_batch_size * forward
