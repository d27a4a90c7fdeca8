"""How sure a plan's step time is: its interval, and what no measurement stands behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshwright.calibration import Basis
from meshwright.cost.collectives import collective_basis
from meshwright.cost.compute import compute_basis
from meshwright.cost.placement import Group
from meshwright.ir.program import Program
from meshwright.ir.tasks import CommTask, ComputeTask, Task
from meshwright.plan import Plan
from meshwright.planner.estimate import distinct_blocks
from meshwright.planner.interval import Width, width_of
from meshwright.planner.prices import Prices
from meshwright.planner.times import Running, axis_groups, price_collective, price_op, rates_of

BASES: tuple[Basis, ...] = ("measured", "interpolated", "assumed")


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A shape or a link whose price no measurement of its own stands behind, and its share of a micro-batch's
    seconds, before anything overlaps."""

    what: str
    basis: Basis
    share_fraction: float


@dataclass(frozen=True)
class Confidence:
    """How wide the interval is and what that rests on, the shares of a micro-batch's seconds by basis, and
    what is not measured, longest first."""

    width: Width
    shares: Mapping[Basis, float]
    unmeasured: tuple[Unmeasured, ...]

    def document(self) -> dict[str, Any]:
        """The confidence as JSON."""
        return {
            "interval": self.width.words,
            **{f"{basis}_fraction": self.shares[basis] for basis in BASES},
            "unmeasured": [
                {"what": u.what, "basis": u.basis, "share_fraction": u.share_fraction}
                for u in self.unmeasured
            ],
        }


def confidence_of(program: Program, priced: Prices, running: Running) -> Confidence:
    """The confidence of a lowered plan under given prices."""
    plan = program.plan
    groups = axis_groups(plan.cluster, plan.layout.degrees())
    seconds: dict[tuple[str, Basis], float] = {}
    blocks, counts = distinct_blocks(program)
    for block, count in zip(blocks, counts.sum(axis=0).tolist(), strict=True):
        for task in block.tasks:
            what, basis, time_s = _of(task, plan, priced, groups, running)
            seconds[what, basis] = seconds.get((what, basis), 0.0) + count * time_s
    total = sum(seconds.values()) or 1.0
    shares = {basis: sum(s for (_, b), s in seconds.items() if b == basis) / total for basis in BASES}
    open_ = [
        Unmeasured(what, basis, s / total) for (what, basis), s in seconds.items() if basis != "measured"
    ]
    width = width_of(plan.model, plan.cluster, plan.policy.engine)
    ordered = sorted(open_, key=lambda u: (-u.share_fraction, u.what))
    return Confidence(width, shares, tuple(ordered))


def _of(
    task: Task, plan: Plan, priced: Prices, groups: Mapping[str, Group], running: Running
) -> tuple[str, Basis, float]:
    """A task's shape or link in words, where its price comes from, and its seconds."""
    if isinstance(task, ComputeTask):
        basis = _op_basis(task, priced)
        sizes = "×".join(f"{size:,}" for size in task.sizes)
        parts: Any = price_op(task, priced, running)
        return f"{task.kind.value} {sizes} ({_short(task.name)})", basis, float(sum(parts.values()))
    assert isinstance(task, CommTask)
    group = groups[task.axis]
    basis = _collective_basis(task, priced, group, running)
    where = _link(plan, group)
    near, far = price_collective(task, priced, groups, running)
    return f"{task.kind.value} over {task.axis} of {task.num_ranks} on {where}", basis, float(near + far)


def _op_basis(task: ComputeTask, priced: Prices) -> Basis:
    """By the machine's own table where it has the op, else by the curves."""
    found = "assumed" if priced.measured is None else priced.measured.op_basis(task)
    if found != "assumed":
        return found
    return compute_basis(rates_of(task, priced), task.kind, task.phase, task.sizes)


def _collective_basis(task: CommTask, priced: Prices, group: Group, running: Running) -> Basis:
    """By the machine's own table in groups that stay in a node, where it has the collective."""
    known = priced.measured
    inside = group.inner >= group.ranks
    if known is not None and inside and known.covers(task.kind, group.ranks):
        return known.collective_basis(task.kind, task.bytes, task.num_ranks)
    return collective_basis(priced.links, task.kind, task.bytes, group, running.dispatcher)


def _short(name: str) -> str:
    words = name.split(".")
    return ".".join(words[2:]) if words[0] == "layers" else name


def _link(plan: Plan, group: Group) -> str:
    """The outermost tier that a group crosses."""
    inner = 1.0
    crossed = plan.cluster.links[0] if plan.cluster.links else None
    for link, within in zip(plan.cluster.links, group.within, strict=True):
        if float(within) > inner:
            crossed = link
        inner = float(within)
    return f"{crossed.name} ({crossed.kind})" if crossed else "no link"
