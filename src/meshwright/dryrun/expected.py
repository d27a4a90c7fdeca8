"""What the layout and the graph say of every rank, worked out for the whole world at once.

Groups come from `Layout.groups`, which lists those of an axis, not from each rank's question after its
group: a rank that asks wrongly does not agree with it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from functools import cached_property
from math import prod

from meshwright.cost.memory import RankMemory, memory
from meshwright.ir.observed import Did, Work
from meshwright.ir.program import Program, lower
from meshwright.ir.sharding import local_shape, zero_axes, zero_degree
from meshwright.ir.tasks import ComputeTask
from meshwright.layout import GROUP_AXES, REPLICA_AXES
from meshwright.plan import Plan, routed_evenly
from meshwright.workload import RoutingCounts

_WORK = tuple(field.name for field in fields(Work))
"""Kinds of ops whose FLOPs are counted, by the names that they have in the graph."""

Groups = dict[str, list[tuple[int, ...]]]


class Expected:
    """A plan's own word on its ranks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.program: Program = lower(plan)
        self._bytes: dict[tuple[int, tuple[int, int]], int] = {}

    @property
    def is_even(self) -> bool:
        """Whether ranks route as the graph describes it: experts get equally many tokens. By a histogram they
        do not, and what experts compute and exchange is the histogram's."""
        routing: object = self.plan.workload.routing
        return not isinstance(routing, RoutingCounts)

    @cached_property
    def groups(self) -> Groups:
        """Every group of ranks that speak to one another, by axis."""
        layout = self.plan.layout
        axes = GROUP_AXES + (REPLICA_AXES if layout.dp_replicas > 1 else ())
        found: Groups = {
            axis: [tuple(group) for group in layout.groups(axis, view)]
            for axis, view in axes
            if layout.size(axis) > 1
        }
        if layout.world_size > 1:
            found["world"] = [tuple(range(layout.world_size))]
        if layout.pp > 1:
            found["embedding"] = [(group[0], group[-1]) for group in found["pp"]]
        if layout.tp > (heads := self.plan.model.kv_heads):
            copies = layout.tp // heads
            found["kv_copies"] = [
                group[first : first + copies]
                for group in found["tp"]
                for first in range(0, len(group), copies)
            ]
        return found

    @cached_property
    def memory(self) -> tuple[RankMemory, ...]:
        """What ranks hold by the memory model, by pipeline rank, as tokens are routed here: a spread that the
        workload describes without a histogram runs balanced."""
        plan = self.plan
        return memory(lower(routed_evenly(plan)) if self.is_even else self.program)

    def pp_rank(self, rank: int) -> int:
        """The pipeline rank of a rank: stages are the slowest axis of both views."""
        return rank // (self.plan.layout.world_size // self.plan.layout.pp)

    def shapes(self, pp_rank: int) -> dict[str, tuple[int, ...]]:
        """Parameters of a pipeline rank and their shapes before ZeRO divides them."""
        return self._by_pipeline_rank[pp_rank]

    @cached_property
    def _by_pipeline_rank(self) -> list[dict[str, tuple[int, ...]]]:
        layout = self.plan.layout
        return [
            {p.name: local_shape(p, layout) for s in self.program.stages_of(rank) for p in s.params}
            for rank in range(layout.pp)
        ]

    def is_divided(self, is_expert: bool) -> bool:
        """Whether FSDP2 divides a parameter: then its local part is its FP32 master."""
        dense, experts = zero_axes(self.plan.layout)
        if self.plan.policy.zero_stage < 3:
            return False
        return self.plan.layout.size(experts if is_expert else dense) > 1

    @cached_property
    def degrees(self) -> dict[str, tuple[bool, int]]:
        """Of each parameter, whether it is an expert's and over how many ranks ZeRO divides it."""
        layout = self.plan.layout
        params = (param for stage in self.program.stages for param in stage.params)
        return {param.name: (param.is_expert, zero_degree(param, layout)) for param in params}

    def parameter_bytes(self, rank: int) -> int:
        """Bytes of all parameters on a rank."""
        shapes = self.shapes(self.pp_rank(rank))
        places = self._place(False, rank), self._place(True, rank)
        key = self.pp_rank(rank), places
        if key not in self._bytes:
            self._bytes[key] = sum(self._share_bytes(name, shape, places) for name, shape in shapes.items())
        return self._bytes[key]

    def _share_bytes(self, name: str, shape: tuple[int, ...], places: tuple[int, int]) -> int:
        """Bytes of a parameter of this shape. Where FSDP2 divides it: rows in chunks of ⌈rows / n⌉,
        of which the last ranks get what is left, as their FP32 masters."""
        is_expert, degree = self.degrees[name]
        if not self.is_divided(is_expert):
            return prod(shape) * self.plan.workload.compute_bytes
        chunk = -(-shape[0] // degree)
        first = chunk * places[is_expert]
        return max(0, min(chunk, shape[0] - first)) * prod(shape[1:]) * 4

    def _place(self, is_expert: bool, rank: int) -> int:
        """A rank's place among those over which ZeRO divides a parameter."""
        axis = zero_axes(self.plan.layout)[is_expert]
        return self.plan.layout.group_of(rank, axis, "expert" if is_expert else "dense").index(rank)

    def element(self, name: str) -> str:
        """The type in which a rank holds a parameter."""
        return "fp32" if self.is_divided(self.degrees[name][0]) else self.plan.workload.precision

    def calls(self, pp_rank: int) -> Counter[tuple[str, str, int]]:
        """How often each kind of collective runs in a step, by kind, axis and bytes."""
        found: Counter[tuple[str, str, int]] = Counter()
        for task, count in self.program.collectives(pp_rank):
            found[task.kind.value, task.axis, task.bytes] += count
        return found

    def work(self, pp_rank: int) -> Work:
        """FLOPs of a step, what recompute repeats included."""
        sums = dict.fromkeys(_WORK, 0)
        for stage in self.program.stages_of(pp_rank):
            for task in stage.tasks():
                if isinstance(task, ComputeTask) and task.kind.value in _WORK:
                    sums[task.kind.value] += task.flops * self.plan.num_micro_batches
        return Work(**sums)

    def order(self, pp_rank: int) -> tuple[Did, ...]:
        """The actions of a pipeline rank; none where there is no pipeline."""
        if self.plan.layout.num_stages == 1:
            return ()
        return tuple(
            Did(part.kind.value, part.stage, part.micro_batch or 0)
            for action in self.program.schedule.actions(pp_rank)
            for part in action.simple_actions
        )
