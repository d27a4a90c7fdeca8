"""A block cut into parts: groups of ops between collectives, and the collectives, each with its price.

Prices are those of the estimator: `price_op` and `price_collective` of `planner/times.py`, with the constants
put on by `compute_in_step` and `comm_in_step`. Loads may be arrays, for one price by layer and micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.cost.placement import Group
from meshwright.ir.graph import CollectiveKind
from meshwright.ir.lowering import LoweredBlock
from meshwright.ir.tasks import CommTask, ComputeTask, Phase, Task
from meshwright.planner.prices import Prices
from meshwright.planner.times import (
    DATA_AXES,
    KERNELS,
    MICRO_BATCH_PHASES,
    KernelTimes,
    Running,
    comm_in_step,
    compute_in_step,
    has_experts,
    hidden_share,
    launch_wait_s,
    outside,
    price_collective,
    price_op,
    proxied,
)

Array = Any
"""A number or a numpy array of numbers."""

COMPUTE = "compute"
NO_TIER = -1


@dataclass(frozen=True, slots=True)
class Part:
    """What one event of a block does: its ops' names within the block; `compute` or a kind of collective; of
    communication the axis, and the outermost link tier it crosses, as a position in the cluster's links."""

    name: str
    kind: str
    axis: str | None = None
    tier: int = NO_TIER


@dataclass(frozen=True, slots=True)
class PricedPhase:
    """The parts of a block in one phase with their seconds at even speed, none of it hidden.

    `hidden` is the share of communication that may run beside compute, by axis; `launching_s` what the host
    needs to launch the phase, and `is_serial` that every op waits for its own launch.
    """

    phase: Phase
    parts: tuple[Part, ...]
    seconds: tuple[Array, ...]
    hidden: Mapping[str, float]
    launching_s: float
    is_serial: bool = False


def tier_of(group: Group) -> int:
    """The outermost link tier that a group crosses: the innermost one whose domain holds all its members."""
    reach = [bool(np.all(np.greater_equal(within, group.ranks))) for within in group.within]
    return reach.index(True)


def priced_phases(
    block: LoweredBlock,
    kernels: KernelTimes,
    prices: Prices,
    groups: Mapping[str, Group],
    running: Running,
) -> dict[Phase, PricedPhase]:
    """Every phase of a block by parts. `kernels` are the block's own, from which launches are counted."""
    with_experts = has_experts(kernels)
    phases = {}
    for phase in MICRO_BATCH_PHASES:
        parts, seconds = [], []
        for tasks in _cut(_in_order(block.tasks, phase)):
            part, price = _priced(tasks, block.name, prices, groups, running)
            parts.append(part)
            seconds.append(price)
        axes = {part.axis for part in parts if part.axis is not None}
        hidden = {axis: float(hidden_share(axis, prices, running)) for axis in sorted(axes)}
        launching_s = float(launch_wait_s(kernels[phase], with_experts, prices, replace(running, load=1.0)))
        found = (tuple(parts), tuple(seconds), hidden, launching_s, prices.is_serial)
        phases[phase] = PricedPhase(phase, *found)
    return phases


def _in_order(tasks: Iterable[Task], phase: Phase) -> list[Task]:
    """The tasks of a phase as they run: backward from the last op on; parameters are gathered before, and
    gradients reduced after, what uses and makes them."""
    own = [task for task in tasks if task.phase == phase]
    data = [task for task in own if isinstance(task, CommTask) and task.axis in DATA_AXES]
    others = [task for task in own if task not in data]
    if phase in ("input_gradient", "weight_gradient"):
        others.reverse()
    gathers = [task for task in data if task.kind is CollectiveKind.ALL_GATHER]
    return [*gathers, *others, *(task for task in data if task not in gathers)]


def _cut(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Runs of ops between collectives, and each collective alone."""
    run: list[Task] = []
    for task in tasks:
        if isinstance(task, ComputeTask):
            run.append(task)
            continue
        if run:
            yield run
        yield [task]
        run = []
    if run:
        yield run


def _priced(
    tasks: list[Task], block: str, prices: Prices, groups: Mapping[str, Group], running: Running
) -> tuple[Part, Array]:
    first = tasks[0]
    if isinstance(first, CommTask):
        axis = "dp" if first.axis in DATA_AXES else first.axis
        near, far = price_collective(first, prices, groups, running)
        sent = {axis: near, outside(axis): far, "proxied": proxied(first, groups, running)}
        seconds = comm_in_step(sent, axis, prices)
        tier = tier_of(groups[first.axis])
        return Part(_within(block, first.name), first.kind.value, axis, tier), seconds
    kernels: dict[str, Array] = dict.fromkeys(KERNELS, 0.0)
    for task in tasks:
        assert isinstance(task, ComputeTask)
        for name, seconds in price_op(task, prices, running).items():
            kernels[name] = kernels[name] + seconds
    ends = dict.fromkeys((_within(block, first.name), _within(block, tasks[-1].name)))
    return Part(" … ".join(ends), COMPUTE), compute_in_step(kernels, prices)


def _within(block: str, name: str) -> str:
    """A task's name without that of its block, so that equal layers share their parts."""
    return name.removeprefix(f"{block}.")
