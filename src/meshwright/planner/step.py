"""What a step costs outside its micro-batches: gradient reduction, parameter gathering, the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost.placement import Group
from meshwright.ir.tasks import CommTask
from meshwright.planner.prices import Prices
from meshwright.planner.times import DATA_AXES, Running, exposed, price_collective

Array = Any

SMALL_BYTES = 1024
"""Collectives up to this size carry scalars: they cost their latency and hide behind nothing."""


@dataclass(frozen=True, slots=True)
class StepComm:
    """Seconds of one rank's communication once per step: gathers of parameters and reductions of gradients
    over the data axes, inside a node and outside, and the rest."""

    gathers_s: Array
    gathers_outside_s: Array
    reductions_s: Array
    reductions_outside_s: Array
    other_s: Array


def step_comm(
    tasks: Iterable[CommTask], prices: Prices, groups: Mapping[str, Group], running: Running
) -> StepComm:
    """Seconds of what one rank communicates once per step."""
    gathers: list[Array] = [0.0, 0.0]
    reductions: list[Array] = [0.0, 0.0]
    other: list[Array] = [0.0, 0.0]
    for task in tasks:
        axis = "pipeline" if task.axis == "pp" else task.axis
        seconds = price_collective(task, prices, {**groups, task.axis: groups[axis]}, running)
        kind = other
        if task.axis in DATA_AXES and np.max(task.bytes) > SMALL_BYTES:
            kind = gathers if task.name.startswith("parameters.") else reductions
        kind[:] = [known + more for known, more in zip(kind, seconds, strict=True)]
    return StepComm(gathers[0], gathers[1], reductions[0], reductions[1], sum(other))


@dataclass(frozen=True, slots=True)
class Data:
    """Seconds of one rank's data axes once per step: what shows of gathering before the first forward and of
    reducing behind the last backward, and what of each flows beside micro-batches."""

    gather_s: Array
    reduce_s: Array
    gather_beside_s: Array
    reduce_beside_s: Array


def data_of(comm: StepComm, prices: Prices, backward_s: Array, forward_s: Array) -> Data:
    """Gathers and reductions by what hides them.

    Overlapped, they run beside the last micro-batch's backward and the next step's first forward; of the
    whole, gathers and reductions show the same share.
    """
    gathers = comm.gathers_s + prices.network * comm.gathers_outside_s
    whole = gathers + comm.reductions_s + prices.network * comm.reductions_outside_s
    shown = exposed(whole, backward_s + forward_s, prices.hidden("data"))
    share = gathers / np.where(whole > 0, whole, 1.0)
    beside = whole - shown
    return Data(share * shown, (1 - share) * shown, share * beside, (1 - share) * beside)


OPTIMIZER_READS_AND_WRITES = {"adamw": 28, "sgd": 8}
"""Bytes that an update moves for each FP32 master: gradient, master and moments read, all but the gradient
written (Adam, 4 + 12 + 12), and the compute-type weight on top."""


def moved_bytes(optimizer: str, weight_bytes: int, owned: Array, held: Array, gradient_bytes: int) -> Array:
    """Bytes that an update moves: of the `owned` share, and of clearing and norming the `held` gradients."""
    return owned * (OPTIMIZER_READS_AND_WRITES[optimizer] + weight_bytes) + 2 * held * gradient_bytes


def optimizer_seconds(
    prices: Prices, optimizer: str, weight_bytes: int, owned: Array, held: Array, gradient_bytes: int
) -> Array:
    """Seconds of an update: memory traffic of the `owned` share, and of clearing and norming the `held`
    gradients, at the memory bandwidth that kernels reach; before any slowdown."""
    moved = moved_bytes(optimizer, weight_bytes, owned, held, gradient_bytes)
    known = None if prices.measured is None else prices.measured.update_seconds(moved)
    return moved / prices.memory_bytes_per_s if known is None else known
