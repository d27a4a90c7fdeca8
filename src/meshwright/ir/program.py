"""A plan lowered to what each pipeline stage does: tasks with local shapes, and the groups they speak to.

Estimator, simulator and memory model all read this; the dry run and training are checked against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from meshwright.engines import Engine, engine_named
from meshwright.ir.blocks import embedding_block, head_block, layer_block
from meshwright.ir.dense import Shape
from meshwright.ir.graph import (
    Block,
    Collective,
    CollectiveKind,
    Degrees,
    Flops,
    Op,
    OpKind,
    Saved,
    flops,
    saved_tensors,
    traffic,
)
from meshwright.ir.parameters import (
    Param,
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from meshwright.ir.schedule import ActionKind, Schedule, build_schedule, rank_of
from meshwright.ir.sharding import local_numel, zero_degree
from meshwright.ir.step import gather_phases, reduces_each_micro_batch, step_tasks
from meshwright.ir.tasks import PHASES, CommTask, ComputeTask, Phase, Task
from meshwright.layout import Layout
from meshwright.plan import Plan

MATMULS = (OpKind.MATMUL, OpKind.GROUPED_MATMUL)


@dataclass(frozen=True, slots=True)
class LoweredBlock:
    """A block as one rank runs it for one micro-batch. `saved` maps each kept tensor to (bytes, kept for the
    weight gradient)."""

    name: str
    tasks: tuple[Task, ...]
    saved: dict[str, tuple[int, bool]]
    saved_without_recompute: dict[str, tuple[int, bool]]
    output_gradient_bytes: int

    @property
    def saved_bytes(self) -> int:
        """Bytes kept from forward to the input gradient."""
        return sum(size for size, _ in self.saved.values())

    @property
    def deferred_bytes(self) -> int:
        """Bytes kept between the input gradient and a deferred weight gradient: each matmul's input where
        forward kept it, and the gradient of its output. What recompute dropped is made again for each of the
        two passes: PyTorch's checkpoint frees it once the input gradient has used it."""
        inputs = sum(size for size, for_weight in self.saved.values() if for_weight)
        return inputs + self.output_gradient_bytes

    def flops(self) -> Flops:
        """Work by phase, recompute not counted."""
        by_phase = dict.fromkeys(PHASES, 0)
        for task in self.tasks:
            if isinstance(task, ComputeTask) and task.phase in by_phase:
                by_phase[task.phase] += task.flops
        return Flops(by_phase["forward"], by_phase["input_gradient"], by_phase["weight_gradient"])


@dataclass(frozen=True, slots=True)
class StageProgram:
    """One pipeline stage (chunk): its blocks in order, and the parameters that its ranks hold."""

    index: int
    rank: int
    layers: tuple[int, ...]
    blocks: tuple[LoweredBlock, ...]
    params: tuple[Param, ...]
    sends: tuple[CommTask, ...]

    @property
    def has_embedding(self) -> bool:
        """Whether the token embedding stands in this stage."""
        return self.blocks[0].name == "embedding"

    @property
    def has_head(self) -> bool:
        """Whether the head and the loss stand in this stage."""
        return self.blocks[-1].name == "head"

    def tasks(self, phase: Phase | None = None) -> Iterator[Task]:
        """Every task of one micro-batch, in order; of one phase where it is named."""
        for block in self.blocks:
            yield from (task for task in block.tasks if phase is None or task.phase == phase)


@dataclass(frozen=True)
class Program:
    """A lowered plan: stages, pipeline order, and what happens once per step."""

    plan: Plan
    stages: tuple[StageProgram, ...]
    step: tuple[tuple[CommTask, ...], ...]

    @property
    def schedule(self) -> Schedule:
        """The pipeline order of the plan."""
        plan = self.plan
        count = plan.num_micro_batches
        return build_schedule(plan.policy.schedule, plan.layout.pp, count, plan.layout.vpp)

    @property
    def engine(self) -> Engine:
        """Facts of the plan's engine."""
        return engine_named(self.plan.policy.engine)

    def stages_of(self, pp_rank: int) -> tuple[StageProgram, ...]:
        """The stages that a pipeline rank holds."""
        return tuple(stage for stage in self.stages if stage.rank == pp_rank)

    def collectives(self, pp_rank: int) -> Iterator[tuple[CommTask, int]]:
        """Every collective of a whole step on a pipeline rank, with how often it runs."""
        count = self.plan.num_micro_batches
        for stage in self.stages_of(pp_rank):
            gathers = self._gathers(stage)
            for task in (*stage.tasks(), *stage.sends):
                if isinstance(task, CommTask):
                    gather = task.kind is CollectiveKind.ALL_GATHER and task.axis in ("dp_cp", "edp")
                    yield task, gathers[task.phase] if gather else count
        yield from ((task, 1) for task in self.step[pp_rank])

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


def degrees_of(layout: Layout, sequence_parallel: bool) -> Degrees:
    """Ranks along each axis that divides an op's dims."""
    sp = layout.tp if sequence_parallel else 1
    return {"tp": layout.tp, "cp": layout.cp, "ep": layout.ep, "etp": layout.etp, "sp": sp}


def shape_of(plan: Plan, sequence_length: int | None = None) -> Shape:
    """What the blocks are built for: the plan's micro-batch at a length, the longest unless told."""
    return Shape(
        micro_batch_size=plan.policy.micro_batch_size,
        sequence_length=sequence_length or plan.workload.max_sequence_length,
        element_bytes=plan.workload.compute_bytes,
        engine=engine_named(plan.policy.engine),
        sequence_parallel=plan.policy.sequence_parallel,
        dispatcher=plan.policy.dispatcher,
        ep=plan.layout.ep,
        tp=plan.layout.tp,
    )


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
    step = tuple(_rank_step(plan, [s for s in stages if s.rank == rank]) for rank in range(plan.layout.pp))
    return Program(plan, tuple(stages), step)


def _rank_step(plan: Plan, stages: list[StageProgram]) -> tuple[CommTask, ...]:
    params = list({param.name: param for stage in stages for param in stage.params}.values())
    embedding, head = any(s.has_embedding for s in stages), any(s.has_head for s in stages)
    return tuple(step_tasks(plan, params, embedding, head))


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
        return block if known == layer else _renamed(block, f"layers.{known}", f"layers.{layer}")

    def end(self, name: Literal["embedding", "head"]) -> LoweredBlock:
        build = embedding_block if name == "embedding" else head_block
        return lower_block(self.plan, build(self.plan.model, self.shape))


def _renamed(block: LoweredBlock, old: str, new: str) -> LoweredBlock:
    def name(text: str) -> str:
        return new + text[len(old) :]

    return replace(
        block,
        name=new,
        tasks=tuple(replace(task, name=name(task.name)) for task in block.tasks),
        saved={name(tensor): kept for tensor, kept in block.saved.items()},
        saved_without_recompute={
            name(tensor): kept for tensor, kept in block.saved_without_recompute.items()
        },
    )


def _stage(
    plan: Plan, blocks: _BlockTable, index: int, layers: tuple[int, ...], num_stages: int
) -> StageProgram:
    model = plan.model
    lowered = [blocks.layer(layer) for layer in layers]
    params = [param for layer in layers for param in layer_parameters(model, layer)]
    if index == 0:
        lowered.insert(0, blocks.end("embedding"))
        params = [*embedding_parameters(model), *params]
    if index == num_stages - 1:
        lowered.append(blocks.end("head"))
        params += head_parameters(model)
        if model.tie_word_embeddings and num_stages > 1:
            params.append(next(iter(embedding_parameters(model))))
    sends = tuple(_sends(plan, blocks.shape, index, num_stages))
    rank = rank_of(plan.policy.schedule, index, plan.layout.pp)
    return StageProgram(index, rank, layers, tuple(lowered), tuple(params), sends)


def _sends(plan: Plan, shape: Shape, stage: int, num_stages: int) -> Iterator[CommTask]:
    """Activations to the next stage and gradients to the previous one, where they leave the rank."""
    degrees = degrees_of(plan.layout, plan.policy.sequence_parallel)
    size = shape.scattered.local(degrees) * plan.model.hidden_size * shape.element_bytes
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


def lower_block(plan: Plan, block: Block) -> LoweredBlock:
    """A block with the plan's degrees put in: local tasks of every phase, and what is kept for backward."""
    degrees = degrees_of(plan.layout, plan.policy.sequence_parallel)
    engine = engine_named(plan.policy.engine)
    tasks: list[Task] = []
    for node in block.nodes:
        if isinstance(node, Op):
            tasks += _compute_tasks(node, degrees)
        else:
            tasks += _comm_tasks(node, degrees)
    dropped = frozenset(engine.selective.value) if plan.policy.recompute == "selective" else frozenset()
    tasks += _repeated(plan, block, tasks, dropped)
    tasks += _parameter_gathers(plan, block)
    tasks += _gradient_reductions(plan, block.name)
    whole = _sizes(saved_tensors(block.ops), degrees)
    kept = _sizes(saved_tensors(block.ops, dropped), degrees)
    if block.name.startswith("layers.") and plan.policy.recompute == "full":
        kept = _kept_under_full_recompute(block.name, whole)
    outputs = sum(_output_bytes(op, degrees) for op in block.ops if op.kind in MATMULS)
    return LoweredBlock(block.name, tuple(tasks), kept, whole, outputs)


def _repeated(plan: Plan, block: Block, tasks: list[Task], dropped: frozenset[str]) -> list[Task]:
    """What recompute runs again: a whole layer with its communication, or the ops of the dropped classes."""
    if plan.policy.recompute == "none" or not block.name.startswith("layers."):
        return []
    names = {op.name for op in block.ops if op.recompute in dropped}
    whole = plan.policy.recompute == "full"
    return [
        replace(task, phase="recompute")
        for task in tasks
        if task.phase == "forward" and (whole or (isinstance(task, ComputeTask) and task.name in names))
    ]


def _output_bytes(op: Op, degrees: Degrees) -> int:
    m, n, _ = (dim.local(degrees) for dim in op.dims[-3:])
    return m * n * op.bytes_per_element


def _kept_under_full_recompute(name: str, whole: dict[str, tuple[int, bool]]) -> dict[str, tuple[int, bool]]:
    """The layer's input, and the routing choices: chosen again they could differ in a near tie."""
    kept = {f"{name}.in": (whole[f"{name}.in"][0], True)}
    kept |= {t: (size, True) for t, (size, _) in whole.items() if t.endswith((".choices", ".index"))}
    return kept


def _sizes(tensors: dict[str, Saved], degrees: Degrees) -> dict[str, tuple[int, bool]]:
    return {name: (saved.local_bytes(degrees), saved.for_weight) for name, saved in tensors.items()}


def _compute_tasks(op: Op, degrees: Degrees) -> Iterator[ComputeTask]:
    sizes = tuple(dim.local(degrees) for dim in op.dims)
    work, moved = flops(op, degrees), traffic(op, degrees)
    for phase in PHASES:
        if getattr(moved, phase):
            yield ComputeTask(op.name, phase, op.kind, sizes, getattr(work, phase), getattr(moved, phase))


def _comm_tasks(node: Collective, degrees: Degrees) -> Iterator[CommTask]:
    ranks = degrees[node.axis]
    if ranks == 1:
        return
    size = node.local_bytes(degrees)
    phases: tuple[tuple[Phase, CollectiveKind | None], ...] = (
        ("forward", node.forward),
        ("input_gradient", node.backward),
        ("weight_gradient", node.weight_gradient),
    )
    for phase, kind in phases:
        if kind is not None:
            yield CommTask(node.name, phase, kind, node.axis, ranks, size)


def _parameter_gathers(plan: Plan, block: Block) -> Iterator[CommTask]:
    """ZeRO-3: each block's parameters are gathered before forward and again before backward."""
    phases = gather_phases(plan)
    named = {param for op in block.ops for param in op.params}
    for expert in (False, True):
        params = [p for p in _block_params(plan, block.name) if p.is_expert is expert and p.name in named]
        if not params or zero_degree(params[0], plan.layout) == 1:
            continue
        size = sum(local_numel(p, plan.layout) for p in params) * plan.workload.compute_bytes
        axis, name = ("edp", "experts") if expert else ("dp_cp", "dense")
        for phase in phases:
            yield CommTask(
                f"{block.name}.gather_{name}",
                phase,
                CollectiveKind.ALL_GATHER,
                axis,
                plan.layout.size(axis),
                size,
            )


def _gradient_reductions(plan: Plan, block: str) -> Iterator[CommTask]:
    """A block's gradients, where every backward reduces them; those of a tied table with the embedding."""
    if not reduces_each_micro_batch(plan):
        return
    width = engine_named(plan.policy.engine).gradient_bytes.value
    own = [p for p in _block_params(plan, block) if block == "embedding" or p.part != "embedding"]
    for axis, name, expert in (("dp_cp", "dense", False), ("edp", "experts", True)):
        size = sum(local_numel(p, plan.layout) for p in own if p.is_expert is expert) * width
        ranks = plan.layout.size(axis)
        if size and ranks > 1:
            kind = CollectiveKind.REDUCE_SCATTER
            yield CommTask(f"{block}.reduce_{name}", "weight_gradient", kind, axis, ranks, size)


def _block_params(plan: Plan, block: str) -> list[Param]:
    if block.startswith("layers."):
        return list(layer_parameters(plan.model, int(block.split(".")[1])))
    if block == "embedding":
        return list(embedding_parameters(plan.model))
    tied = list(embedding_parameters(plan.model))[:1] if plan.model.tie_word_embeddings else []
    return [*head_parameters(plan.model), *tied]


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
