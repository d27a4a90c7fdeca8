"""One plan's step time in closed form, with what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost.placement import Group
from meshwright.engines import engine_named
from meshwright.ir.program import LoweredBlock, Program, lower, model_flops
from meshwright.ir.sharding import local_numel, zero_degree
from meshwright.ir.tasks import Phase
from meshwright.plan import Plan
from meshwright.planner.pipeline import PipelineTime, pipeline_time
from meshwright.planner.prices import Conditions, Prices, prices
from meshwright.planner.routing import load_factor
from meshwright.planner.step import exposed_data, optimizer_seconds, step_comm
from meshwright.planner.times import (
    AXES,
    PARTS,
    BlockTimes,
    Running,
    axis_groups,
    price_block,
    price_collective,
)

Array = Any


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step and of its parts, which add up to it.

    `parts`: compute, exposed communication by axis (tp, cp, ep, etp, pp; dp is gradient reduction, parameter
    gathering and ZeRO), waiting for launches (host), bubble, optimizer, and what is left of a step (other).
    """

    total_s: float
    parts: Mapping[str, float]
    bubble_fraction: float
    model_flops: int

    @property
    def exposed_comm_s(self) -> float:
        """Communication that nothing hides."""
        return sum(self.parts[axis] for axis in (*AXES, "pp"))


def estimate(
    plan: Plan, conditions: Conditions | None = None, sequence_length: int | None = None
) -> StepTime:
    """The step time of a plan at one sequence length, the longest unless told."""
    program = lower(plan, sequence_length)
    priced = prices(plan.cluster, plan.workload.precision, plan.policy.engine, conditions)
    length = sequence_length or plan.workload.max_sequence_length
    return step_time(program, priced, conditions or Conditions(), length)


def step_time(program: Program, priced: Prices, conditions: Conditions, sequence_length: int) -> StepTime:
    """The step time of a lowered plan under given prices."""
    plan = program.plan
    layout = plan.layout
    groups = axis_groups(plan.cluster, layout.degrees())
    running = Running(
        plan.policy.dispatcher,
        plan.policy.expert_overlap,
        load_factor(plan, priced, conditions.balanced),
    )
    stages = _stage_parts(program, priced, groups, running)
    phases = np.array(
        [_phase(stages, name)[:, None] for name in ("forward", "input_gradient", "weight_gradient")]
    )
    pipe = pipeline_time(plan.policy.schedule, layout.pp, layout.vpp, plan.num_micro_batches, phases)
    return _whole(program, priced, groups, running, stages, phases, pipe, sequence_length)


Parts = dict[Phase, dict[str, float]]


def _stage_parts(
    program: Program, priced: Prices, groups: Mapping[str, Group], running: Running
) -> list[Parts]:
    """Seconds by phase and part of each stage for one micro-batch; `pp` is what sending takes."""
    known: dict[object, BlockTimes] = {}
    stages: list[Parts] = []
    for stage in program.stages:
        total: Parts = {}
        for block in stage.blocks:
            key = _kind(program.plan, block)
            if key not in known:
                known[key] = price_block(block.tasks, priced, groups, running)
            for phase, parts in known[key].items():
                mine = total.setdefault(phase, dict.fromkeys((*PARTS, "pp"), 0.0))
                for part, seconds in parts.items():
                    mine[part] += float(seconds)
        interleaved = program.plan.layout.vpp > 1
        shown = 1 - (priced.hidden("pipeline") if interleaved else 0.0)
        for send in stage.sends:
            total[send.phase]["pp"] += shown * float(price_collective(send, priced, groups, running))
        stages.append(total)
    return stages


def _kind(plan: Plan, block: LoweredBlock) -> object:
    if block.name.startswith("layers."):
        return plan.model.layer_kind(int(block.name.split(".")[1]))
    return block.name


def _phase(stages: list[Parts], name: Phase) -> Array:
    phases: tuple[Phase, ...] = ("recompute", name) if name == "input_gradient" else (name,)
    return np.array([sum(sum(stage[phase].values()) for phase in phases) for stage in stages])


def _whole(
    program: Program,
    priced: Prices,
    groups: Mapping[str, Group],
    running: Running,
    stages: list[Parts],
    phases: Array,
    pipe: PipelineTime,
    sequence_length: int,
) -> StepTime:
    plan = program.plan
    m = plan.num_micro_batches
    by_rank = [[s.index for s in program.stages_of(rank)] for rank in range(plan.layout.pp)]
    tails = []
    for rank, own in enumerate(by_rank):
        comm = step_comm(program.step[rank], priced, groups, running)
        backward, forward = float(phases[1:, own].sum()), float(phases[0, own].sum())
        data = exposed_data(comm, priced, backward, forward, float(pipe.slack_s[rank, 0]))
        tails.append((float(data), float(comm.other_s), float(_optimizer(program, priced, rank))))
    data, other, optimizer = max(tails, key=sum)
    slowest = int(pipe.busy_s[:, 0].argmax())
    parts = dict.fromkeys((*PARTS, "pp"), 0.0)
    for index in by_rank[slowest]:
        for of_phase in stages[index].values():
            for part, seconds in of_phase.items():
                parts[part] += m * seconds
    total = float(pipe.total_s[0])
    parts["bubble"] = total - sum(parts.values())
    parts["dp"] += data
    parts["optimizer"] = optimizer
    parts["other"] = other + (0.0 if priced.flat else priced.constants.step.value)
    whole = sum(parts.values())
    return StepTime(whole, parts, float(pipe.bubble_fraction[0]), model_flops(plan, sequence_length))


def _optimizer(program: Program, priced: Prices, rank: int) -> float:
    plan = program.plan
    params = {p.name: p for s in program.stages_of(rank) for p in s.params}.values()
    sharded = plan.policy.zero_stage >= 1
    held = sum(local_numel(p, plan.layout) for p in params)
    owned = sum(local_numel(p, plan.layout) / (zero_degree(p, plan.layout) if sharded else 1) for p in params)
    width = engine_named(plan.policy.engine).gradient_bytes.value
    return float(
        optimizer_seconds(priced, plan.workload.optimizer, plan.workload.compute_bytes, owned, held, width)
    )
