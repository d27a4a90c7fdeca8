"""The best plan at other numbers of GPUs: strong scaling, and the fewest GPUs that meet a target.

Strong scaling keeps the global batch. A target is looked for at 1, 2, 4, … nodes, then at the eighths between
the last count that missed it and the first that meets it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meshwright.deployment import Deployment
from meshwright.errors import InputError
from meshwright.layout import MAX_WORLD_SIZE
from meshwright.planner.answer import Answer, Progress, plan_deployment, unwatched
from meshwright.planner.ranked import Ranked
from meshwright.planner.variants import on_gpus
from meshwright.units import SECONDS

MOST_COUNTS = 64
_MISSES_IN_A_ROW = 3
"""Doublings that make the best no faster, after which more nodes are not tried."""


@dataclass(frozen=True, slots=True)
class AtCount:
    """The best plan on a number of GPUs, or why there is none; `efficiency_fraction` is against the smallest
    count that has one."""

    gpus: int
    plan: Ranked | None
    why: str = ""
    efficiency_fraction: float | None = None

    def document(self) -> dict[str, Any]:
        """The count as JSON."""
        return {
            "gpus": self.gpus,
            "step_time_s": None if self.plan is None else self.plan.step_time_s,
            "efficiency_fraction": self.efficiency_fraction,
            "why": self.why,
            "plan": None if self.plan is None else self.plan.document(),
        }


def parse_counts(text: str, key: str = "--scaling") -> list[int]:
    """The numbers of `64,128,256`, ascending. Raises InputError."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,7}", word) and int(word) for word in words):
        raise InputError(key, text, "numbers of GPUs, with commas between", ["64,128,256,512"])
    counts = sorted({int(word) for word in words})
    if len(counts) > MOST_COUNTS or counts[-1] > MAX_WORLD_SIZE:
        rule = f"at most {MOST_COUNTS} numbers of at most {MAX_WORLD_SIZE:,} GPUs"
        raise InputError(key, text, rule, ["64,128,256,512"])
    return counts


def scaling(deployment: Deployment, counts: Sequence[int], progress: Progress = unwatched) -> list[AtCount]:
    """The best plan at each number of GPUs for the same global batch, with its strong-scaling efficiency:
    GPU-seconds of the smallest count over its own."""
    variants = [on_gpus(deployment, gpus, "--scaling") for gpus in counts]
    rows: list[AtCount] = []
    base: AtCount | None = None
    for position, (gpus, variant) in enumerate(zip(counts, variants, strict=True)):
        progress("scaling", position, len(counts))
        row = _best_on(variant, gpus)
        if row.plan is not None and base is None:
            base = row
        if row.plan is not None and base is not None and base.plan is not None:
            share = base.gpus * base.plan.step_time_s / (gpus * row.plan.step_time_s)
            row = AtCount(gpus, row.plan, row.why, share)
        rows.append(row)
    return rows


def _best_on(deployment: Deployment, gpus: int) -> AtCount:
    try:
        answer = plan_deployment(deployment, 1, at_least=0)
    except InputError as error:
        return AtCount(gpus, None, f"nothing is legal: {error}")
    return AtCount(gpus, answer.best, "" if answer.best else _shortage(answer))


def _shortage(answer: Answer) -> str:
    assert answer.nearest is not None
    missing = answer.nearest.peak_memory_bytes - answer.space.cluster.gpu.memory
    return f"nothing fits: the smallest of {answer.found.legal:,} lacks {missing / 1e9:.1f} GB"


def fitting_nodes(deployment: Deployment, most_doublings: int) -> tuple[int, int] | None:
    """The first doubling of the GPUs on which something fits, with how many candidates do."""
    gpus = deployment.cluster.resolve()[0].num_gpus
    for _ in range(most_doublings):
        gpus *= 2
        try:
            answer = plan_deployment(on_gpus(deployment, gpus, "cluster.nodes"), 1, at_least=0)
        except InputError:
            continue
        if answer.found.feasible:
            return gpus, answer.found.feasible
    return None


Quantity = Literal["step_time", "tokens_per_s", "sequences_per_s"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan is to reach: at most a step time in seconds, or at least a rate per second."""

    quantity: Quantity
    value: float
    text: str

    def reached(self, plan: Ranked) -> float:
        """The plan's own value."""
        return {
            "step_time": plan.step_time_s,
            "tokens_per_s": plan.tokens_per_s,
            "sequences_per_s": plan.sequences_per_s,
        }[self.quantity]

    def met_by(self, plan: Ranked) -> bool:
        """Whether a plan reaches it."""
        reached = self.reached(plan)
        return reached <= self.value if self.quantity == "step_time" else reached >= self.value

    def factor(self, plan: Ranked) -> float:
        """How far a plan is from it: 1 or less where it is reached."""
        reached = self.reached(plan)
        return reached / self.value if self.quantity == "step_time" else self.value / reached


@dataclass(frozen=True)
class TargetAnswer:
    """The fewest GPUs that meet a target with their best plan, or the plan that comes nearest; and every
    count that was tried."""

    target: Target
    met: bool
    nearest: AtCount | None
    tried: tuple[AtCount, ...]

    @property
    def surely(self) -> bool:
        """Whether the slow end of the plan's 80 % interval meets the target too."""
        plan = None if self.nearest is None else self.nearest.plan
        return plan is not None and self.target.factor(plan) * plan.interval_s[1] <= plan.step_time_s

    def document(self) -> dict[str, Any]:
        """The answer as JSON."""
        plan = None if self.nearest is None else self.nearest.plan
        return {
            "target": self.target.text,
            "met": self.met,
            "surely": self.surely,
            "gpus": None if self.nearest is None else self.nearest.gpus,
            "value": None if plan is None else self.target.reached(plan),
            "factor": None if plan is None else self.target.factor(plan),
            "tried": [
                {"gpus": row.gpus, "step_time_s": row.plan.step_time_s if row.plan else None, "why": row.why}
                for row in self.tried
            ],
            "plan": None if plan is None else plan.document(),
        }


_TARGET = re.compile(r"\s*(step_time|tokens_per_s|sequences_per_s)\s*(<=|>=)\s*(\S.*?)\s*")


def parse_target(text: str, key: str = "--target") -> Target:
    """A target such as `step_time <= 16 ms` or `tokens_per_s >= 1e6`. Raises InputError."""
    examples = ["'step_time <= 16 ms'", "'tokens_per_s >= 1e6'"]
    match = _TARGET.fullmatch(text) if len(text) <= 100 else None
    if match is None:
        raise InputError(key, text, "a quantity, <= or >=, and a value", examples)
    quantity, sign, value = match[1], match[2], match[3]
    if (sign == "<=") != (quantity == "step_time"):
        raise InputError(key, text, "a step time is at most (<=), a rate at least (>=)", examples)
    if quantity == "step_time":
        return Target("step_time", SECONDS.parse(value, key), f"step_time <= {value}")
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e18:
        raise InputError(key, text, "a rate is a plain positive number", examples)
    name: Quantity = "tokens_per_s" if quantity == "tokens_per_s" else "sequences_per_s"
    return Target(name, rate, f"{name} >= {value}")


def fewest_gpus(deployment: Deployment, target: Target, progress: Progress = unwatched) -> TargetAnswer:
    """The fewest GPUs on which the best plan meets a target, or the count that comes nearest."""
    tried: list[AtCount] = []

    def best_on(gpus: int) -> AtCount:
        progress(f"{gpus:,} GPUs", len(tried), 0)
        row = _best_on(on_gpus(deployment, gpus, "--target"), gpus)
        tried.append(row)
        return row

    last, first = 0, None
    for gpus in _doublings(deployment, tried):
        row = best_on(gpus)
        if row.plan is not None and target.met_by(row.plan):
            first = row
            break
        last = gpus
    if first is not None:
        for gpus in _between(deployment, last, first.gpus):
            row = best_on(gpus)
            if row.plan is not None and target.met_by(row.plan):
                first = row
                break
        return TargetAnswer(target, True, first, tuple(tried))
    able = [row for row in tried if row.plan is not None]
    nearest = min(able, key=lambda row: target.factor(row.plan), default=None)  # type: ignore[arg-type]
    return TargetAnswer(target, False, nearest, tuple(tried))


def _doublings(deployment: Deployment, tried: Sequence[AtCount]) -> Iterator[int]:
    """1, 2, 4, … nodes, until several doublings in a row are no faster than the best before them."""
    gpus = deployment.cluster.resolve()[0].gpus_per_node
    while gpus <= MAX_WORLD_SIZE:
        yield gpus
        times = [row.plan.step_time_s if row.plan else None for row in tried]
        able = [time_s for time_s in times if time_s is not None]
        recent = times[-_MISSES_IN_A_ROW:]
        if len(able) > _MISSES_IN_A_ROW and all(t is None or t > min(able) for t in recent):
            return
        gpus *= 2


def _between(deployment: Deployment, last: int, first: int) -> Iterator[int]:
    """Whole nodes in eighths between two counts."""
    per_node = deployment.cluster.resolve()[0].gpus_per_node
    step = max(per_node, (first - last) // 8 // per_node * per_node)
    yield from range(last + step, first, step) if last else ()
