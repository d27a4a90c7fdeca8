"""What the planner's prices and the simulator say of a step, in the terms of a profile: by module and by
collective."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshwright.cost.memory import memory
from meshwright.ir.program import Program, lower
from meshwright.ir.tasks import CommTask, ComputeTask
from meshwright.plan import Plan
from meshwright.planner.estimate import Measured, measure_program
from meshwright.planner.prices import Conditions, Prices, prices
from meshwright.planner.times import (
    AXES,
    KERNELS,
    Running,
    axis_groups,
    block_times,
    compute_in_step,
    launch_wait_s,
    outside,
    price_collective,
    price_op,
)
from meshwright.simulator.simulate import Simulated, simulate

OPTIMIZER = "optimizer"
REST = "rest of the stage"
"""What stands in no module of its own: head, loss, and what the stage does itself."""

OpKey = tuple[str, str]
"""A module's name with `*` for the layer, and `forward` or `backward`."""
CommKey = tuple[str, str]
"""Axis and kind."""


@dataclass(frozen=True)
class Predicted:
    """A step by the model. `ops`: seconds of all stages by module and phase; `comm`: seconds of all pipeline
    ranks by axis and kind; `tensor_bytes`: what tensors hold at the peak, by pipeline rank."""

    step: Simulated
    ops: Mapping[OpKey, float]
    comm: Mapping[CommKey, float]
    tensor_bytes: tuple[int, ...]

    @property
    def idle_s(self) -> float:
        """Seconds that a rank waits, the mean over ranks."""
        return sum(use.idle_s for use in self.step.ranks) / len(self.step.ranks)


def computed_s(plan: Plan, pp_rank: int) -> float:
    """Seconds in which a pipeline rank computes in a step, if nobody keeps it waiting: ops, launches that
    the device waits for, the update, and a step's own time."""
    program = lower(plan)
    priced = prices(plan.cluster, plan.workload.precision, plan.policy.engine)
    measured = measure_program(program, priced, Conditions(), plan.workload.max_sequence_length)
    total = priced.step_s + float(priced.update * measured.optimizer_s[pp_rank])
    silent = dict.fromkeys([*AXES, *map(outside, AXES), "proxied"], 0.0)
    for kind, kernels in enumerate(measured.kinds):
        count = sum(measured.counts[stage, kind] for stage in measured.ranks[pp_rank])
        without = {phase: {**parts, **silent} for phase, parts in kernels.items()}
        times = block_times(without, priced, measured.running)
        seconds = sum(float(parts["compute"] + parts["host"]) for parts in times.values())
        total += float(count) * plan.num_micro_batches * seconds
    return total


def ops_of_rank(plan: Plan, pp_rank: int, modules: Iterable[str]) -> dict[OpKey, float]:
    """Seconds of one pipeline rank's step by module and direction."""
    program = lower(plan)
    priced = prices(plan.cluster, plan.workload.precision, plan.policy.engine)
    measured = measure_program(program, priced, Conditions(), plan.workload.max_sequence_length)
    return _ops(program, priced, measured, frozenset(modules), (pp_rank,))


def predicted(plan: Plan, modules: Iterable[str]) -> Predicted:
    """The step of a plan; ops go to the deepest of the modules that are named."""
    program = lower(plan)
    priced = prices(plan.cluster, plan.workload.precision, plan.policy.engine)
    length = plan.workload.max_sequence_length
    measured = measure_program(program, priced, Conditions(), length)
    names = frozenset(modules)
    return Predicted(
        simulate(program),
        _ops(program, priced, measured, names, range(plan.layout.pp)),
        _comm(program, priced, measured.running),
        tuple(rank.allocated_bytes for rank in memory(program)),
    )


def _ops(
    program: Program,
    priced: Prices,
    measured: Measured,
    modules: frozenset[str],
    pp_ranks: Iterable[int],
) -> dict[OpKey, float]:
    """Seconds by module and direction of all stages that these pipeline ranks hold."""
    count, own = program.plan.num_micro_batches, list(pp_ranks)
    seconds: defaultdict[OpKey, float] = defaultdict(float)
    for stage in (stage for rank in own for stage in program.stages_of(rank)):
        for block in stage.blocks:
            has_experts = any(".moe." in task.name for task in block.tasks)
            launch_s = _launch_s(has_experts, priced, measured.running)
            for task in block.tasks:
                if isinstance(task, ComputeTask):
                    key = (module_of(task.name, modules), _direction(task.phase))
                    seconds[key] += count * (_op_s(task, priced, measured.running) + launch_s)
    update = sum(float(priced.update * measured.optimizer_s[rank]) for rank in own)
    seconds[OPTIMIZER, "forward"] += update
    return dict(seconds)


def _launch_s(has_experts: bool, priced: Prices, running: Running) -> float:
    """What launching adds to one op; nothing where a GPU runs beside its host."""
    if not priced.is_serial:
        return 0.0
    one = {"launches": 1.0, "launches_experts": 0.0}
    return float(launch_wait_s(one, has_experts, priced, running))


def _op_s(task: ComputeTask, priced: Prices, running: Running) -> float:
    return float(compute_in_step({**dict.fromkeys(KERNELS, 0.0), **price_op(task, priced, running)}, priced))


def _direction(phase: str) -> str:
    """Recompute runs modules forward, within a backward pass."""
    return "forward" if phase in ("forward", "recompute") else "backward"


def module_of(name: str, modules: frozenset[str]) -> str:
    """The deepest module that an op's name stands in, with `*` for its layer."""
    words = name.split(".")
    for count in range(len(words), 0, -1):
        found = ".".join(words[:count])
        if found in modules:
            return starred(found)
    return REST


def starred(name: str) -> str:
    """A module's name with `*` for its layer: equal layers are one row."""
    words = name.split(".")
    if words[0] == "layers" and len(words) > 1:
        words[1] = "*"
    return ".".join(words) or REST


def _comm(program: Program, priced: Prices, running: Running) -> dict[CommKey, float]:
    groups = axis_groups(program.plan.cluster, program.plan.layout.degrees())
    seconds: defaultdict[CommKey, float] = defaultdict(float)
    for rank in range(program.plan.layout.pp):
        for task, count in program.collectives(rank):
            group = groups.get(_group_name(task))
            if group is not None:
                near, far = price_collective(task, priced, {task.axis: group}, running)
                seconds[task.axis, task.kind.value] += count * float(near + far)
    return dict(seconds)


def _group_name(task: CommTask) -> str:
    """Sums over a pipeline join all of it; sends join two neighbours."""
    return "pipeline" if (task.axis, task.phase) == ("pp", "step") else task.axis
