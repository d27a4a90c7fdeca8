"""From a deployment to its ranked plans, with what was searched and why the rest was left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from meshwright.deployment import Deployment
from meshwright.errors import InputError
from meshwright.plan import resolve
from meshwright.planner.drafting import space_of
from meshwright.planner.interval import width_of
from meshwright.planner.lengths import Lengths, lengths_of
from meshwright.planner.prices import Prices, prices
from meshwright.planner.pricing import AtLength
from meshwright.planner.ranked import CONDITIONS, Ranked, ranked
from meshwright.planner.search import AT_LEAST, Found, Priced, Search
from meshwright.planner.space import Space
from meshwright.planner.tables import Tables
from meshwright.verify import Finding, require_valid, verify

TOP = 10
"""Plans that are shown unless told otherwise, and most finalists of a search that shows fewer."""
Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""
_PER_CENT = 100


def unwatched(what: str, done: int, of: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Answer:
    """The plans of a deployment, best first, and what the search found on the way.

    `nearest` is the plan that needs least memory, where none fits. `taken` names values that stand in the
    deployment though nobody stated them. `wall_s` and `cpu_s` are the seconds from the deployment to its
    ranked plans.
    """

    deployment: Deployment
    space: Space
    lengths: Lengths
    found: Found
    plans: tuple[Ranked, ...]
    nearest: Ranked | None
    taken: dict[str, str]
    wall_s: float
    cpu_s: float

    @property
    def best(self) -> Ranked | None:
        """The fastest plan that fits."""
        return self.plans[0] if self.plans else None

    @cached_property
    def ties(self) -> list[list[int]]:
        """Positions of plans whose intervals overlap that of the first of their group, in groups of several.

        The first group is that of the best plan.
        """
        groups: list[list[int]] = []
        for position, plan in enumerate(self.plans):
            if groups and plan.interval_s[0] <= self.plans[groups[-1][0]].interval_s[1]:
                groups[-1].append(position)
            else:
                groups.append([position])
        return [group for group in groups if len(group) > 1]

    @property
    def findings(self) -> list[Finding]:
        """Warnings about the best plan."""
        return verify(self.best.plan) if self.best else []

    @cached_property
    def defaults(self) -> dict[str, str]:
        """What was taken for what the deployment leaves open and the search does not vary."""
        shown = self.best or self.nearest
        filled = {} if shown is None else shown.plan.defaults
        found = {key: why for key, why in filled.items() if not why.endswith(": searched")}
        return self.taken | _unstated(self.deployment) | found

    @cached_property
    def assumptions(self) -> dict[str, str]:
        """Every assumption behind the plans that no measurement or source carries."""
        found = {f"engine.{name}": why for name, why in self.space.engine.assumptions().items()}
        if self.best is None or self.best.plan.policy.settings.loss != "fused":
            found.pop("engine.fused_loss", None)  # a fact of a setting that this plan does not have
        if len(self.lengths.shares) > 1:
            found["workload.sequence_length"] = f"assumed: {self.lengths.words}"
        for basis in ("interpolated", "assumed"):
            share = self.best.confidence.shares[basis] if self.best else 0.0
            if share:
                found[f"prices.{basis}"] = f"{_PER_CENT * share:.0f} % of a micro-batch's seconds"
        return found

    @cached_property
    def rejected(self) -> dict[str, int]:
        """What was left out, by reason, the most first."""
        reasons = dict(self.space.rejected)
        if self.found.memory_rejected:
            reasons["does not fit in the memory of a GPU"] = self.found.memory_rejected
        return dict(sorted(reasons.items(), key=lambda pair: -pair[1]))

    def document(self) -> dict[str, Any]:
        """The answer as JSON."""
        found = self.found
        return {
            "name": self.deployment.name,
            "gpus": self.space.cluster.num_gpus,
            "legal": found.legal,
            "memory_rejected": found.memory_rejected,
            "priced": found.priced,
            "feasible": found.feasible,
            "search_s": self.wall_s,
            "search_cpu_s": self.cpu_s,
            "plans": [plan.document() for plan in self.plans],
            "ties": self.ties,
            "tied_candidates": found.within_reach,
            "rejected": self.rejected,
            "pareto": [self._point(point) for point in found.front],
            "nearest": None if self.nearest is None else self.nearest.document(),
            "lengths": {str(length): share for length, share in self.lengths.shares},
            "defaults": self.defaults,
            "assumptions": self.assumptions,
        }

    def _point(self, point: Priced) -> dict[str, Any]:
        plan = self.space.plan_of(point.candidate)
        return {
            "layout": plan.layout.degrees(),
            "policy": plan.policy.model_dump(mode="json"),
            "estimated_s": point.step_time_s,
            "peak_memory_bytes": point.peak_memory_bytes,
        }


def _unstated(deployment: Deployment) -> dict[str, str]:
    """What the workload's own defaults stand in for."""
    workload = deployment.workload
    return {
        f"workload.{name}": f"{getattr(workload, name)}: not stated"
        for name in ("precision", "optimizer", "routing")
        if name not in workload.model_fields_set
    }


def plan_deployment(
    deployment: Deployment,
    top: int = TOP,
    progress: Progress = unwatched,
    at_least: int | None = AT_LEAST,
    taken: dict[str, str] | None = None,
) -> Answer:
    """The best plans of a deployment: those that the estimate finds fastest, ranked by simulation. `taken`
    names values of it that nobody stated. Raises InputError, with the rule, where nothing is legal."""
    wall, cpu = time.perf_counter(), time.process_time()
    cluster, _ = deployment.cluster.resolve()
    space, lengths = space_of(deployment, cluster), lengths_of(deployment.workload)
    if not space.legal:
        raise nothing_legal(deployment, space)
    found = searched(space, lengths, max(top, TOP), progress, at_least)
    plans = _by_simulation(space, lengths, found, top, progress)
    near = None if found.nearest is None else ranked(space.plan_of(found.nearest.candidate), lengths)
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return Answer(deployment, space, lengths, found, plans, near, taken or {}, wall_s, cpu_s)


def _by_simulation(
    space: Space, lengths: Lengths, found: Found, top: int, progress: Progress
) -> tuple[Ranked, ...]:
    """All finalists of a search, simulated and ranked by what that says, and the first of them: the same
    whatever number is shown, since a simulation may be faster than its estimate or slower."""
    finalists: list[Ranked] = []
    for position, point in enumerate(found.best):
        progress("finalists simulated", position, len(found.best))
        finalists.append(ranked(space.plan_of(point.candidate), lengths))
    return tuple(sorted(finalists, key=lambda plan: plan.step_time_s)[:top])


def searched(
    space: Space,
    lengths: Lengths,
    wanted: int,
    progress: Progress = unwatched,
    at_least: int | None = AT_LEAST,
) -> Found:
    """The search of a space. What is within reach of the best is what its interval overlaps."""
    priced = prices(space.cluster, space.workload.precision, space.engine_name, CONDITIONS)
    tied = width_of(space.model, space.cluster, space.engine_name).factor ** 2

    def report(share: float) -> None:
        progress("searching", round(_PER_CENT * share), _PER_CENT)

    return Search(space, priced, tables_at(space, priced, lengths), wanted, tied, at_least, report).run()


def tables_at(space: Space, priced: Prices, lengths: Lengths) -> list[AtLength]:
    """Tables at every length, the longest first: memory is that of the longest, ranked on or not."""
    longest, shares = space.workload.max_sequence_length, dict(lengths.shares)
    first = AtLength(Tables(space, priced, longest), shares.pop(longest, 0.0))
    return [first, *(AtLength(Tables(space, priced, n, needs_bytes=False), s) for n, s in shares.items())]


def nothing_legal(deployment: Deployment, space: Space) -> InputError:
    """Why no plan of a deployment is legal: the rule that what is fixed breaks, else the one met most."""
    try:
        require_valid(resolve(deployment))
    except InputError as error:
        return error
    reasons = space.rejected.most_common(3)
    rule = "no layout and policy that the file leaves open is legal: " + "; ".join(
        rule for rule, _ in reasons
    )
    return InputError("layout", deployment.layout.model_dump(exclude_none=True), rule)
