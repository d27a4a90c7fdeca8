"""One rank's share of a plan, computed for real in one process: what it takes beside what was predicted.

The other ranks are not there. Collectives are answered on the spot, and the time of that is left out: what
remains is what the rank computes, on as little as one GPU for a plan of any size.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from meshwright.cost.memory import memory
from meshwright.errors import InputError
from meshwright.ir.program import lower
from meshwright.machine import Machine
from meshwright.plan import Plan, routed_evenly
from meshwright.profiling.joined import Row, ops_joined
from meshwright.profiling.predicted import computed_s, ops_of_rank
from meshwright.profiling.trace import RankTrace
from meshwright.profiling.usage import RankUse, rank_use
from meshwright.torchrun import is_under_torchrun


@dataclass(frozen=True)
class ShareAnswer:
    """What one rank computes in a step. `computed_s`: seconds of each step without those in which collectives
    were answered; `predicted_s`: the same by the model; `use`: a profiled step."""

    plan: Plan
    rank: int
    machine: Machine
    computed_s: tuple[float, ...]
    answered_s: tuple[float, ...]
    predicted_s: float
    peak_bytes: int
    predicted_bytes: int
    use: RankUse
    rows: tuple[Row, ...]

    @property
    def median_s(self) -> float:
        """The median step."""
        return statistics.median(self.computed_s)

    @property
    def off(self) -> float:
        """Predicted over measured, − 1."""
        return self.predicted_s / self.median_s - 1

    def document(self) -> dict[str, Any]:
        """As JSON."""
        table = self.plan.cluster.calibration
        return {
            "plan": self.plan.name,
            "digest": self.plan.digest,
            "rank": self.rank,
            "machine": self.machine.model_dump(mode="json"),
            "calibration": None if table is None else table.digest,
            "computed_s": self.median_s,
            "steps_computed_s": list(self.computed_s),
            "steps_answered_s": list(self.answered_s),
            "predicted_computed_s": self.predicted_s,
            "memory_bytes": {"measured": self.peak_bytes, "predicted": self.predicted_bytes},
            "profiled": self.use.document(),
            "disagreements": [row.document() for row in self.rows],
        }


def require_rank(plan: Plan, rank: int, nproc: int | None) -> None:
    """Raise InputError for a rank that the plan lacks, and for others that would run too."""
    world = plan.layout.world_size
    if not 0 <= rank < world:
        rule = f"a rank of this layout lies between 0 and {world - 1}"
        raise InputError("--rank", rank, rule, [min(max(rank, 0), world - 1)])
    if nproc not in (None, 1):
        raise InputError("--nproc", nproc, "--rank runs one rank alone", [1])
    if is_under_torchrun():
        raise InputError("--rank", rank, "runs one rank alone, and torchrun has started several")
    if plan.layout.world_size == 1:
        raise InputError("--rank", rank, "the plan has one rank: profile it without --rank")


def alone_on(plan: Plan) -> Plan:
    """The plan as one rank alone runs it: routed evenly, priced by what its table measured with the fewest
    ranks at work."""
    plan = routed_evenly(plan)
    table = plan.cluster.calibration
    if table is None:
        return plan
    fewest = min(kernels.ranks for kernels in table.kernels)
    kernels = tuple(one for one in table.kernels if one.ranks == fewest)
    cluster = plan.cluster.model_copy(update={"calibration": table.model_copy(update={"kernels": kernels})})
    return plan.model_copy(update={"cluster": cluster})


def share_of(
    plan: Plan,
    rank: int,
    machine: Machine,
    times: tuple[tuple[float, ...], tuple[float, ...]],
    peak_bytes: int,
    trace: RankTrace,
) -> ShareAnswer:
    """The answer from what was measured: `times` are seconds of whole steps, and of answers in them."""
    steps, answered = times
    pp_rank = rank // (plan.layout.world_size // plan.layout.pp)
    priced_plan = alone_on(plan)
    modules = {*trace.forward, *trace.backward}
    return ShareAnswer(
        plan,
        rank,
        machine,
        tuple(whole - own for whole, own in zip(steps, answered, strict=True)),
        answered,
        computed_s(priced_plan, pp_rank),
        peak_bytes,
        memory(lower(priced_plan))[pp_rank].allocated_bytes,
        rank_use(trace),
        tuple(ops_joined(ops_of_rank(priced_plan, pp_rank, modules), [trace], 1)),
    )
