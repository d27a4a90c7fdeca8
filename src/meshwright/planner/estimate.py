"""An estimate of one plan's step time, with what it is made of.

In two steps: `measure` prices a lowered plan's tasks by the curves of kernels and links; `compose` puts the
constants, the overlap and the pipeline on top. A fit of the constants repeats the second alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost.placement import Group
from meshwright.engines import engine_of
from meshwright.ir.program import LoweredBlock, Program, lower, model_flops
from meshwright.ir.tasks import Phase
from meshwright.plan import Plan
from meshwright.planner.pipeline import PipelineTime, pipeline_time
from meshwright.planner.prices import Conditions, Prices, prices
from meshwright.planner.routing import fanout_of, has_fixed_capacity, load_factor
from meshwright.planner.step import StepComm, data_of, optimizer_seconds, step_comm
from meshwright.planner.times import (
    AXES,
    MICRO_BATCH_PHASES,
    PARTS,
    KernelTimes,
    Running,
    axis_groups,
    block_times,
    kernel_times,
    price_collective,
)

Array = Any
_ROWS = (*PARTS, "pp")


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


@dataclass(frozen=True)
class Measured:
    """A lowered plan priced by curves alone.

    `kinds` are the distinct blocks and `counts[stage, kind]` how often each stage has them; `sends` is by
    stage and phase, `comm` and `optimizer_s` by pipeline rank: the step's communication, and the optimizer's
    seconds before any slowdown. For the search, numbers are arrays over layouts that share schedule, pp and
    vpp with `plan`.
    """

    plan: Plan
    num_micro_batches: Array
    running: Running
    kinds: tuple[KernelTimes, ...]
    counts: Array
    sends: tuple[Mapping[Phase, Array], ...]
    ranks: tuple[tuple[int, ...], ...]
    comm: tuple[StepComm, ...]
    optimizer_s: tuple[Array, ...]
    model_flops: int


def estimate(
    plan: Plan, conditions: Conditions | None = None, sequence_length: int | None = None
) -> StepTime:
    """The step time of a plan at one sequence length, the longest unless told."""
    stated = conditions or Conditions()
    priced = prices(plan.cluster, plan.workload.precision, plan.policy.engine, stated)
    return compose(measure(plan, priced, stated, sequence_length), priced)


def measure(
    plan: Plan, priced: Prices, conditions: Conditions, sequence_length: int | None = None
) -> Measured:
    """Price every task of a plan by the curves of kernels and links."""
    length = sequence_length or plan.workload.max_sequence_length
    return measure_program(lower(plan, length), priced, conditions, length)


def measure_program(
    program: Program, priced: Prices, conditions: Conditions, sequence_length: int
) -> Measured:
    """The same for a plan that is lowered, at this length."""
    plan = program.plan
    groups = axis_groups(plan.cluster, plan.layout.degrees())
    running = running_of(plan, priced, conditions)
    kinds, counts = distinct_blocks(program)
    ranks = range(plan.layout.pp)
    sends: list[Mapping[Phase, Array]] = [
        {send.phase: sum(price_collective(send, priced, groups, running)) for send in stage.sends}
        for stage in program.stages
    ]
    return Measured(
        plan=plan,
        num_micro_batches=plan.num_micro_batches,
        running=running,
        kinds=tuple(kernel_times(block.tasks, priced, groups, running) for block in kinds),
        counts=counts,
        sends=tuple(sends),
        ranks=tuple(tuple(stage.index for stage in program.stages_of(rank)) for rank in ranks),
        comm=tuple(_comm(program, rank, priced, groups, running) for rank in ranks),
        optimizer_s=tuple(_optimizer(program, priced, rank) for rank in ranks),
        model_flops=model_flops(plan, sequence_length),
    )


def running_of(plan: Plan, priced: Prices, conditions: Conditions) -> Running:
    """How a plan runs its blocks."""
    load = load_factor(plan, priced, conditions.balanced)
    overlap, fixed = plan.policy.expert_overlap, has_fixed_capacity(plan.model)
    fanout = fanout_of(plan.model)
    return Running(plan.policy.dispatcher, overlap, load, fanout, fixed, plan.layout.ep)


def _comm(
    program: Program, rank: int, priced: Prices, groups: Mapping[str, Group], running: Running
) -> StepComm:
    return step_comm(program.step[rank], priced, groups, running)


def distinct_blocks(program: Program) -> tuple[list[LoweredBlock], Array]:
    """The distinct blocks of a program, and how many of each stand in each stage."""
    index: dict[object, int] = {}
    blocks: list[LoweredBlock] = []
    counts = np.zeros((len(program.stages), 0))
    for position, stage in enumerate(program.stages):
        for block in stage.blocks:
            key: object = block.name
            if block.name.startswith("layers."):
                key = program.plan.model.layer_kind(int(block.name.split(".")[1]))
            if key not in index:
                index[key] = len(blocks)
                blocks.append(block)
                counts = np.hstack([counts, np.zeros((len(program.stages), 1))])
            counts[position, index[key]] += 1
    return blocks, counts


def _optimizer(program: Program, priced: Prices, rank: int) -> float:
    plan, held = program.plan, program.held[rank]
    owned: float = held.total
    if plan.policy.zero_stage:
        owned = held.dense / plan.layout.size("dp_shard") + held.experts / plan.layout.size("edp_shard")
    width = engine_of(plan.policy).gradient_bytes.value
    workload = plan.workload
    return float(
        optimizer_seconds(priced, workload.optimizer, workload.compute_bytes, owned, held.total, width)
    )


def compose(measured: Measured, priced: Prices) -> StepTime:
    """The step time of priced tasks: constants, overlap, pipeline, and the step's own work."""
    composed = compose_parts(measured, priced)
    parts = {name: float(seconds[0]) for name, seconds in composed.parts.items()}
    return StepTime(sum(parts.values()), parts, float(composed.bubble_fraction[0]), measured.model_flops)


@dataclass(frozen=True, slots=True)
class Composed:
    """Step times of N layouts that share schedule, pp and vpp: `parts` as in StepTime, arrays of N."""

    parts: Mapping[str, Array]
    bubble_fraction: Array

    @property
    def total_s(self) -> Array:
        """Seconds of a step."""
        return sum(self.parts.values())


def compose_parts(measured: Measured, priced: Prices) -> Composed:
    """`compose` for arrays: every number in `measured` may be an array over N layouts."""
    plan = measured.plan
    stages = _stages(measured, priced)
    recompute, whole = MICRO_BATCH_PHASES.index("recompute"), stages.sum(axis=2)
    phases = np.stack([whole[:, 0], whole[:, recompute] + whole[:, 2], whole[:, 3]])
    m, layout = measured.num_micro_batches, plan.layout
    once = once_per_step(measured.ranks, measured.comm, measured.optimizer_s, priced, phases)
    lags = _lags(measured, priced, phases.shape[-1])
    pipe = pipeline_time(plan.policy.schedule, layout.pp, layout.vpp, m, phases, once.gather_s, lags)
    by_rank = np.stack([stages[list(own)].sum(axis=(0, 1)) for own in measured.ranks])  # rank, part, N
    slowest = pipe.busy_s.argmax(axis=0)
    work = m * np.take_along_axis(by_rank, slowest[None, None, :], axis=0)[0]
    parts = dict(zip(_ROWS, work, strict=True))
    parts["bubble"] = pipe.total_s - pipe.started_s - work.sum(axis=0)
    data, parts["other"], parts["optimizer"] = step_ends(pipe, once, priced)
    parts["dp"] = parts["dp"] + data
    return Composed(parts, pipe.bubble_fraction)


@dataclass(frozen=True, slots=True)
class Once:
    """Seconds of what ranks do once per step, as (P, N): gathers of parameters and reductions of gradients as
    far as they show, scalars, and the update."""

    gather_s: Array
    reduce_s: Array
    scalars_s: Array
    optimizer_s: Array


def once_per_step(
    ranks: Sequence[Sequence[int]],
    comm: Sequence[StepComm],
    optimizer_s: Sequence[Array],
    priced: Prices,
    phases: Array,
) -> Once:
    """What ranks do once per step, from `phases` (3, stages, N). `ranks` lists stages by rank."""
    rows = []
    for own, mine, update in zip(ranks, comm, optimizer_s, strict=True):
        backward, forward = phases[1:, list(own)].sum(axis=(0, 1)), phases[0, list(own)].sum(axis=0)
        data = data_of(mine, priced, backward, forward)
        row = np.broadcast_arrays(data.gather_s, data.reduce_s, mine.other_s, priced.update * update, forward)
        rows.append(row[:-1])
    return Once(*np.moveaxis(np.array(rows), 1, 0))


def step_ends(pipe: PipelineTime, once: Once, priced: Prices) -> tuple[Array, Array, Array]:
    """What a step takes beside its micro-batches: communication over the data axes, what is left of it, and
    the update.

    A rank reduces when its own last backward is done. The gradients' norm is agreed on by all when the last
    of them has reduced (`simulator/ending.py`), and then each updates.
    """
    agreed = (pipe.ends_s + once.reduce_s).max(axis=0)
    data = pipe.started_s + agreed - pipe.total_s
    after = np.stack([once.scalars_s, once.optimizer_s])
    longest = after.sum(axis=0).argmax(axis=0)
    scalars, optimizer = np.take_along_axis(after, longest[None, None, :], axis=1)[:, 0]
    return data, priced.step_s + scalars, optimizer


def shown_sends(priced: Prices, vpp: int) -> float:
    """Share of a send between stages that shows: interleaving hides some of it, where the era does."""
    return 1 - (priced.hidden("pipeline") if vpp > 1 else 0.0)


def _lags(measured: Measured, priced: Prices, columns: int) -> Array | None:
    """For how long sends flow beside compute, by forward and gradient, stage and layout."""
    hidden = 1 - shown_sends(priced, measured.plan.layout.vpp)
    if not np.any(hidden):
        return None
    phases: tuple[Phase, Phase] = ("forward", "input_gradient")
    flowing = [[hidden * of.get(phase, 0.0) * np.ones(columns) for of in measured.sends] for phase in phases]
    return np.array(flowing)


def _stages(measured: Measured, priced: Prices) -> Array:
    """Seconds by stage, phase, part and layout of one micro-batch."""
    settled = [block_times(kernels, priced, measured.running) for kernels in measured.kinds]
    cells = [block[phase][part] for block in settled for phase in MICRO_BATCH_PHASES for part in PARTS]
    shown = shown_sends(priced, measured.plan.layout.vpp)
    sends = [shown * of.get(phase, 0.0) for of in measured.sends for phase in MICRO_BATCH_PHASES]
    flat = np.array(np.broadcast_arrays(*cells, *sends, np.zeros(1))[:-1], dtype=float)
    shape = (len(settled), len(MICRO_BATCH_PHASES), len(PARTS), flat.shape[-1])
    stages = np.tensordot(measured.counts, flat[: len(cells)].reshape(shape), axes=1)
    sent = flat[len(cells) :].reshape(len(measured.sends), len(MICRO_BATCH_PHASES), 1, flat.shape[-1])
    return np.concatenate([stages, sent], axis=2)
