"""What the layout and the graph say of every rank, worked out for the whole world at once.

Groups come from `Layout.groups`, which lists those of an axis, not from each rank's question after its
group: a rank that asks wrongly does not agree with it.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from meshwright.ir.observed import Did, Work
from meshwright.ir.program import Program, lower
from meshwright.ir.sharding import local_shape, zero_axes, zero_degree
from meshwright.ir.tasks import CommTask, ComputeTask
from meshwright.layout import View
from meshwright.plan import Plan
from meshwright.workload import RoutingCounts

_AXES: tuple[tuple[str, View], ...] = (
    ("tp", "dense"),
    ("dp_cp", "dense"),
    ("pp", "dense"),
    ("etp", "expert"),
    ("ep", "expert"),
    ("edp", "expert"),
)
_REPLICAS: tuple[tuple[str, View], ...] = (
    ("dp_shard", "dense"),
    ("dp_replica", "dense"),
    ("edp_shard", "expert"),
    ("edp_replica", "expert"),
)
_WORK = {"matmul": "matmul", "grouped_matmul": "grouped_matmul", "attention": "attention"}

Groups = dict[str, list[tuple[int, ...]]]


class Expected:
    """A plan's own word on its ranks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.program: Program = lower(plan)

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
        axes = _AXES + (_REPLICAS if layout.dp_replicas > 1 else ())
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
        sums = dict.fromkeys(_WORK.values(), 0)
        for stage in self.program.stages_of(pp_rank):
            for task in stage.tasks():
                if isinstance(task, ComputeTask) and task.kind.value in _WORK:
                    sums[_WORK[task.kind.value]] += task.flops * self.plan.num_micro_batches
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

    def sends(self, pp_rank: int) -> tuple[CommTask, ...]:
        """What a pipeline rank sends to its neighbours."""
        return tuple(task for stage in self.program.stages_of(pp_rank) for task in stage.sends)
