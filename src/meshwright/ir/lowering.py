"""A block with degrees put in: the tasks of one rank in every phase, and what it keeps for backward.

Everything here is elementwise: a degree, or a size in the block's dims, may be a whole number, or a NumPy
array of them that stands for many layouts at once. With numbers a collective over one rank is left out;
with arrays it stays, and costs nothing where its axis has one rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from meshwright.engines import Engine
from meshwright.ir.elementwise import is_nothing, is_one
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
from meshwright.ir.parameters import Param
from meshwright.ir.recompute import kept_tensors, repeated_ops
from meshwright.ir.sharding import AxisSizes, local_numel, replica_axis, zero_axes, zero_degree
from meshwright.ir.tasks import PHASES, CommTask, ComputeTask, Phase, Task
from meshwright.policy import Recompute

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


class RepeatedLayer(LoweredBlock):
    """A lowered layer under the name of another layer of its kind. Names are put in when they are read: few
    readers need more than one layer of each kind."""

    def __init__(self, template: LoweredBlock, name: str) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "output_gradient_bytes", template.output_gradient_bytes)
        object.__setattr__(self, "template", template)

    template: LoweredBlock

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The template's tasks, renamed."""
        return tuple(replace(task, name=self._renamed(task.name)) for task in self.template.tasks)

    @cached_property
    def saved(self) -> dict[str, tuple[int, bool]]:
        """The template's kept tensors, renamed."""
        return {self._renamed(name): kept for name, kept in self.template.saved.items()}

    @cached_property
    def saved_without_recompute(self) -> dict[str, tuple[int, bool]]:
        """The same without recompute."""
        return {self._renamed(name): kept for name, kept in self.template.saved_without_recompute.items()}

    def __eq__(self, other: object) -> bool:
        """Whether the other block holds the same, lowered under its own name or not."""
        if not isinstance(other, LoweredBlock):
            return NotImplemented
        names = LoweredBlock.__dataclass_fields__
        return all(getattr(self, name) == getattr(other, name) for name in names)

    __hash__ = None  # type: ignore[assignment]  # it holds dictionaries, as every block does

    def _renamed(self, text: str) -> str:
        return self.name + text[len(self.template.name) :]


def block_tasks(
    block: Block, degrees: Degrees, engine: Engine, recompute: Recompute, parameter_tasks: Iterable[Task] = ()
) -> LoweredBlock:
    """A block with these degrees put in: local tasks of every phase, and what is kept for backward.

    `parameter_tasks` are those that ZeRO adds to the block (see `parameter_gathers`). Elementwise.
    """
    return block_at_levels(block, degrees, engine, (recompute,), parameter_tasks)[recompute]


def block_at_levels(
    block: Block,
    degrees: Degrees,
    engine: Engine,
    levels: Iterable[Recompute],
    parameter_tasks: Iterable[Task] = (),
) -> dict[Recompute, LoweredBlock]:
    """The same at several levels of recompute, with what they have in common made once."""
    tasks: list[Task] = []
    for node in block.nodes:
        if isinstance(node, Op):
            tasks += _compute_tasks(node, degrees)
        else:
            tasks += _comm_tasks(node, degrees)
    selective, added = engine.selective.value, list(parameter_tasks)
    every = saved_tensors(block.ops)
    whole = _sizes(every, degrees)
    outputs = sum(_output_bytes(op, degrees) for op in block.ops if op.kind in MATMULS)
    lowered: dict[Recompute, LoweredBlock] = {}
    for level in levels:
        repeated = _repeated(block, tasks, level, selective)
        kept = kept_tensors(block, level, selective)
        known = {name for name, saved in kept.items() if name in every and saved.dims is every[name].dims}
        new = _sizes({name: saved for name, saved in kept.items() if name not in known}, degrees)
        sizes = {
            name: (whole[name][0], saved.for_weight) if name in known else new[name]
            for name, saved in kept.items()
        }
        lowered[level] = LoweredBlock(block.name, (*tasks, *repeated, *added), sizes, whole, outputs)
    return lowered


def _repeated(
    block: Block, tasks: list[Task], recompute: Recompute, selective: tuple[str, ...]
) -> list[Task]:
    """What recompute runs again: a whole layer with its communication, or the ops that it selects."""
    if recompute == "none" or not block.name.startswith("layers."):
        return []
    names = repeated_ops(block, selective)
    whole = recompute == "full"
    return [
        replace(task, phase="recompute")
        for task in tasks
        if task.phase == "forward" and (whole or (isinstance(task, ComputeTask) and task.name in names))
    ]


def _output_bytes(op: Op, degrees: Degrees) -> int:
    m, n, _ = (dim.local(degrees) for dim in op.dims[-3:])
    return m * n * op.bytes_per_element


def _sizes(tensors: dict[str, Saved], degrees: Degrees) -> dict[str, tuple[int, bool]]:
    return {name: (saved.local_bytes(degrees), saved.for_weight) for name, saved in tensors.items()}


def _compute_tasks(op: Op, degrees: Degrees) -> Iterator[ComputeTask]:
    sizes = tuple(dim.local(degrees) for dim in op.dims)
    work, moved = flops(op, degrees, sizes), traffic(op, degrees, sizes)
    for phase in PHASES:
        if not is_nothing(getattr(moved, phase)):
            yield ComputeTask(op.name, phase, op.kind, sizes, getattr(work, phase), getattr(moved, phase))


def _comm_tasks(node: Collective, degrees: Degrees) -> Iterator[CommTask]:
    ranks = degrees[node.axis]
    if is_one(ranks):
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


def parameter_gathers(
    block: Block, params: Iterable[Param], sizes: AxisSizes, phases: Iterable[Phase], element_bytes: int
) -> Iterator[CommTask]:
    """What ZeRO-3 gathers of a block's parameters before each of these phases, in the compute type."""
    named = {param for op in block.ops for param in op.params}
    held = [param for param in params if param.name in named]
    dense, experts = zero_axes(sizes)
    for axis, name, expert in ((dense, "dense", False), (experts, "experts", True)):
        own = [param for param in held if param.is_expert is expert]
        if not own or is_one(zero_degree(own[0], sizes)):
            continue
        size = sum(local_numel(param, sizes) for param in own) * element_bytes
        for phase in phases:
            kind = CollectiveKind.ALL_GATHER
            yield CommTask(f"{block.name}.gather_{name}", phase, kind, axis, sizes.size(axis), size)


def gradient_reductions(
    block: str, params: Iterable[Param], sizes: AxisSizes, element_bytes: int, has_copy: bool = False
) -> Iterator[CommTask]:
    """The reduction of a block's gradients, where every backward reduces them; those of a tied table go with
    the embedding, unless the head `has_copy`, on a stage of its own."""
    own = [param for param in params if has_copy or block == "embedding" or param.part != "embedding"]
    dense, experts = zero_axes(sizes)
    for axis, name, expert in ((dense, "dense", False), (experts, "experts", True)):
        mine = [param for param in own if param.is_expert is expert]
        ranks = sizes.size(axis)
        size = sum(local_numel(param, sizes) for param in mine) * element_bytes
        if mine and not is_one(ranks):
            kind = CollectiveKind.REDUCE_SCATTER
            yield CommTask(f"{block}.reduce_{name}", "weight_gradient", kind, axis, ranks, size)
        replicas = sizes.size("dp_replica")
        if mine and replicas > 1:
            over, share = replica_axis(axis), -(-size // ranks)
            kind = CollectiveKind.ALL_REDUCE
            yield CommTask(f"{block}.add_{name}", "weight_gradient", kind, over, replicas, share)
