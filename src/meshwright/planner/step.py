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
    """Seconds of one rank's communication once per step: over the data axes inside a node and outside, and
    the rest."""

    data_s: Array
    data_outside_s: Array
    other_s: Array


def step_comm(
    tasks: Iterable[CommTask], prices: Prices, groups: Mapping[str, Group], running: Running
) -> StepComm:
    """Seconds of what one rank communicates once per step."""
    data: Array = 0.0
    data_outside: Array = 0.0
    other: Array = 0.0
    for task in tasks:
        axis = "pipeline" if task.axis == "pp" else task.axis
        near, far = price_collective(task, prices, {**groups, task.axis: groups[axis]}, running)
        if task.axis in DATA_AXES and np.max(task.bytes) > SMALL_BYTES:
            data, data_outside = data + near, data_outside + far
        else:
            other = other + near + far
    return StepComm(data, data_outside, other)


def exposed_data(
    comm: StepComm, prices: Prices, backward_s: Array, forward_s: Array, slack_s: Array
) -> Array:
    """Gradient reduction and parameter gathering that nothing hides, on one rank.

    Overlapped, they run beside the last micro-batch's backward and the next step's first forward; a rank
    whose last backward ends before the pipeline does has that slack besides.
    """
    beside = backward_s + forward_s
    seconds = comm.data_s + prices.network * comm.data_outside_s
    return np.maximum(exposed(seconds, beside, prices.hidden("data")) - slack_s, 0.0)


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
