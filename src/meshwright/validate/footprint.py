"""The memory that a run's plans would have shown to the instrument that measured it."""

from __future__ import annotations

from statistics import median

from meshwright.cost.memory import memory, worst
from meshwright.ir.program import lower
from meshwright.validate.described import Run
from meshwright.validate.measured import seen_bytes


def memory_bytes(run: Run) -> int | None:
    """Peak bytes of the worst rank as the run's source counts them: the median over its plausible plans. None
    for a run whose memory was not measured."""
    if run.memory is None:
        return None
    view = run.memory.view
    return round(
        median(seen_bytes(worst(memory(lower(candidate.plan))), view) for candidate in run.candidates)
    )
