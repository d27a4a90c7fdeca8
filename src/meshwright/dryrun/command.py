"""What `meshwright dryrun` was asked: which ranks, of which plan; and the run that answers it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshwright.dryrun.answer import Answer, RankRow
from meshwright.dryrun.checks import checks_of_all, checks_of_steps
from meshwright.dryrun.expected import Expected
from meshwright.errors import InputError
from meshwright.ir.observed import Observed
from meshwright.plan import Plan
from meshwright.planner.planned import planned
from meshwright.runnable import TORCH, require_installed, require_runnable

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """The command line of `dryrun`. `ranks`: `classes`, `all`, or numbers with commas between them."""

    file: str
    overrides: tuple[str, ...] = ()
    ranks: str = "classes"


def answered(asked: Asked, progress: Progress) -> Answer:
    """Run what was asked. Raises InputError and MeshwrightError."""
    plan = planned(asked.file, asked.overrides, "native", progress)
    require_runnable(plan)
    chosen = _chosen(asked.ranks, plan)
    require_installed("a dry run", TORCH)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return dry_run(plan, chosen, progress)


def dry_run(plan: Plan, chosen: Sequence[int] | None, progress: Progress) -> Answer:
    """Every rank's short step, and the whole step of one rank of each class; `chosen` names ranks instead
    whose whole step is run. Raises MeshwrightError."""
    from meshwright.runtime.dryrun.forks import observe_all, probe_all
    from meshwright.runtime.dryrun.routes import description

    began = time.perf_counter()
    expected, world = Expected(plan), plan.layout.world_size
    probes = probe_all(plan, range(world), _counter("ranks probed", world, progress))
    first = _first_of_class(probes)
    whole = sorted(set(first)) if chosen is None else list(chosen)
    steps = observe_all(plan, whole, _counter("whole steps", len(whole), progress))
    by_rank = {step.facts.rank: step for step in steps}
    shown = range(world) if chosen is None else whole
    rows = [
        RankRow(
            probes[rank].facts,
            None if rank in by_rank else first[rank],
            by_rank.get(rank) or by_rank[first[rank]],
            expected.memory[expected.pp_rank(rank)].allocated_bytes,
        )
        for rank in shown
    ]
    all_known = len(rows) == world
    checks = [
        *checks_of_all(expected, probes),
        *checks_of_steps(expected, steps, [row.step.conduct for row in rows] if all_known else None),
    ]
    return Answer(plan, rows, checks, description(plan.workload.routing), time.perf_counter() - began)


def _first_of_class(probes: Sequence[Observed]) -> list[int]:
    """The first rank of each rank's class: those whose conduct in a short step is equal."""
    first: dict[object, int] = {}
    return [first.setdefault(seen.conduct, seen.facts.rank) for seen in probes]


def _counter(what: str, total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(what, done, total)

    return count


def _chosen(text: str, plan: Plan) -> list[int] | None:
    """The ranks that were asked for; None for one of each class."""
    world = plan.layout.world_size
    if text == "classes":
        return None
    if text == "all":
        return list(range(world))
    ranks = []
    for word in text.split(","):
        if not word.strip().isdecimal():
            rule = "`classes`, `all`, or ranks with commas between them"
            raise InputError("--ranks", text, rule, ["classes", "all", "0,1"])
        rank = int(word)
        if rank >= world:
            rule = f"a rank of this layout lies between 0 and {world - 1}"
            raise InputError("--ranks", rank, rule, [world - 1])
        ranks.append(rank)
    return sorted(set(ranks))
