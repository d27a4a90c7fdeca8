"""How long a pipeline takes from the times of its stages, elementwise over layouts.

P ranks, v chunks on each, m micro-batches; f, b, w are the forward, input-gradient and weight-gradient
seconds of one micro-batch on one stage. Orders are run (`order_times.py`): stages are seldom equal, and what
their differences cost follows from no short formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.ir.schedule import stage_of
from meshwright.planner.order_times import order_ends
from meshwright.planner.slots import Shape
from meshwright.policy import ScheduleName

Array = Any


@dataclass(frozen=True, slots=True)
class PipelineTime:
    """Seconds of a pipeline's micro-batches, elementwise.

    `started_s` is when the first rank starts, `ends_s` by rank when each is done, `busy_s` by rank the work
    of all its micro-batches.
    """

    started_s: Array
    ends_s: Array
    busy_s: Array

    @property
    def total_s(self) -> Array:
        """When the last rank is done."""
        return self.ends_s.max(axis=0)

    @property
    def bubble_fraction(self) -> Array:
        """Mean idle share of the ranks while micro-batches run."""
        return 1 - self.busy_s.mean(axis=0) / (self.total_s - self.started_s)


def pipeline_time(
    schedule: ScheduleName,
    num_ranks: int,
    num_chunks: int,
    num_micro_batches: Array,
    stages: Array,
    ready_s: Array = 0.0,
    lags: Array | None = None,
) -> PipelineTime:
    """Seconds of all micro-batches of a step.

    `stages` has the shape (3, P·v, N): f, b, w by stage. `num_micro_batches` may be an array of N; `ready_s`,
    when each rank may start, has the shape (P, N); `lags`, for how long what a stage makes flows to the next
    one beside compute, (2, P·v, N): forwards, and input gradients. One rank sends nothing.
    """
    ranks = range(num_ranks)
    of_rank = [[stage_of(schedule, rank, chunk, num_ranks) for chunk in range(num_chunks)] for rank in ranks]
    busy = np.asarray(num_micro_batches) * stages.sum(axis=0)[np.array(of_rank)].sum(axis=1)
    ready = np.broadcast_to(ready_s, busy.shape)
    if num_ranks == 1:
        return PipelineTime(ready[0], ready + busy, busy)
    ends = order_ends(Shape(schedule, num_ranks, num_chunks), num_micro_batches, stages, ready, lags)
    return PipelineTime(ready[0], ends, busy)
