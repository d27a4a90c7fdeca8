"""How long a pipeline takes from the times of its stages, elementwise over layouts.

P ranks, v chunks on each, m micro-batches; f, b, w are the forward, input-gradient and weight-gradient
seconds of one micro-batch on one stage. GPipe has a closed form; the other orders are run
(`order_times.py`), as stages are seldom equal and what their differences cost follows from no short formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.ir.schedule import stage_of
from meshwright.planner.order_times import order_seconds
from meshwright.policy import ScheduleName

Array = Any


@dataclass(frozen=True, slots=True)
class PipelineTime:
    """Seconds of a pipeline's micro-batches, elementwise.

    `busy_s` by rank is the work of all micro-batches; `slack_s` by rank is how long before the pipeline's
    end the rank's last backward is done, as far as the stages before it still need their own.
    """

    total_s: Array
    busy_s: Array
    slack_s: Array

    @property
    def bubble_fraction(self) -> Array:
        """Mean idle share of the ranks."""
        return 1 - self.busy_s.mean(axis=0) / self.total_s


def pipeline_time(
    schedule: ScheduleName, num_ranks: int, num_chunks: int, num_micro_batches: Array, stages: Array
) -> PipelineTime:
    """Seconds of all micro-batches of a step.

    `stages` has the shape (3, P·v, N): f, b, w by stage. `num_micro_batches` may be an array of N.
    """
    f, b, w = (_by_rank(schedule, num_ranks, num_chunks, phase) for phase in stages)
    m = np.asarray(num_micro_batches)
    busy = m * (f + b + w).sum(axis=0)
    backward = (b + w)[0]
    slack = np.cumsum(backward, axis=0) - backward
    if num_ranks == 1:
        total = busy[0]
    elif schedule == "GPipe":
        total = _gpipe(f[0], (b + w)[0], m)
    else:
        total = order_seconds(schedule, num_ranks, num_chunks, m, stages)
    return PipelineTime(total, busy, slack)


def _by_rank(schedule: ScheduleName, num_ranks: int, num_chunks: int, stages: Array) -> Array:
    """Stage times as (chunk, rank, N)."""
    order = [
        [stage_of(schedule, rank, chunk, num_ranks) for rank in range(num_ranks)]
        for chunk in range(num_chunks)
    ]
    return stages[np.array(order)]


def _gpipe(f: Array, b: Array, m: Array) -> Array:
    """All forwards, then all backwards, each a flow shop of equal jobs: Σt + (m − 1)·max t. Exact."""
    return sum(t.sum(axis=0) + (m - 1) * t.max(axis=0) for t in (f, b))
