"""What a dry run answers: every rank with what it holds and does, its class, and the checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.dryrun.checks import Check
from meshwright.ir.observed import Conduct, Observed, RankFacts
from meshwright.plan import Plan


@dataclass(frozen=True)
class RankRow:
    """One rank: what is its own, and the whole step that was run for it, by itself or by the rank that it is
    the `same_as`. `model_bytes`: what its tensors hold at their peak by the memory model."""

    facts: RankFacts
    same_as: int | None
    step: Observed
    model_bytes: int

    def document(self) -> dict[str, Any]:
        """As JSON."""
        conduct, peak = self.step.conduct, self.step.peak
        return {
            "rank": self.facts.rank,
            "coordinates": self.facts.coordinates,
            "same_as": self.same_as,
            "parameters": sum(held.elements for held in conduct.parameters),
            "parameter_bytes": conduct.parameter_bytes,
            "peak_bytes": None if peak is None else peak.bytes,
            "peak_by_class": None if peak is None else peak.by_class,
            "peak_moment": None if peak is None else peak.moment,
            "model_bytes": self.model_bytes,
            "build_bytes": self.step.build_bytes,
            "collectives": collectives(conduct),
            "flops": conduct.work.total,
            "flops_by_kind": {
                "matmul": conduct.work.matmul,
                "grouped_matmul": conduct.work.grouped_matmul,
                "attention": conduct.work.attention,
            },
            **({"failed": conduct.failed} if conduct.failed else {}),
        }


def collectives(conduct: Conduct) -> list[dict[str, Any]]:
    """Every kind of collective of a step with its axis, how often it runs, and the bytes of each."""
    return [
        {"axis": axis, "kind": kind, "count": count, "bytes": size}
        for (kind, axis, size), count in sorted(
            conduct.counted().items(), key=lambda item: (item[0][1], item[0][0], -item[0][2])
        )
    ]


@dataclass(frozen=True)
class Answer:
    """All of it. `notes`: how tokens were routed."""

    plan: Plan
    rows: Sequence[RankRow]
    checks: Sequence[Check]
    notes: Mapping[str, str]
    wall_s: float

    @property
    def holds(self) -> bool:
        """Whether no check failed; one that was not run has not."""
        return all(check.holds is not False for check in self.checks)

    @property
    def run(self) -> list[RankRow]:
        """The ranks whose whole step was run."""
        return [row for row in self.rows if row.same_as is None]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "ranks": [row.document() for row in self.rows],
            "checks": [check.document() for check in self.checks],
            "notes": dict(self.notes),
            "wall_s": self.wall_s,
        }
