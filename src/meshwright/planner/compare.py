"""The best plan against another layout of the same deployment, at several sequence lengths.

Both are priced by one model. Two step times tie where their intervals overlap (docs/decisions/0012 says what
that means for two plans that share most of their error).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

from meshwright.deployment import Deployment
from meshwright.errors import InputError
from meshwright.layout import nearest_to
from meshwright.plan import Plan, open_placement, resolve
from meshwright.planner.interval import interval
from meshwright.planner.ranked import Ranked, ranked, simulated_step
from meshwright.verify import require_valid
from meshwright.workload import Workload

MOST_LENGTHS = 32
_COMPARED = ("cluster", "model", "workload")


@dataclass(frozen=True, slots=True)
class Timed:
    """A step time in seconds with its 80 % interval."""

    step_time_s: float
    low_s: float
    high_s: float

    def document(self) -> dict[str, float]:
        """The step time as JSON."""
        return {
            "step_time_s": self.step_time_s,
            "step_time_low_s": self.low_s,
            "step_time_high_s": self.high_s,
        }


@dataclass(frozen=True, slots=True)
class Pair:
    """Two step times at one sequence length, or their means over all (`sequence_length` None)."""

    sequence_length: int | None
    planned: Timed
    against: Timed

    @property
    def tie(self) -> bool:
        """Whether the intervals overlap."""
        return max(self.planned.low_s, self.against.low_s) <= min(self.planned.high_s, self.against.high_s)

    @property
    def faster(self) -> Literal["planned", "against"] | None:
        """Which of the two is faster; None for a tie."""
        if self.tie:
            return None
        return "planned" if self.planned.step_time_s < self.against.step_time_s else "against"

    @property
    def ratio(self) -> float:
        """The other's step time over the plan's."""
        return self.against.step_time_s / self.planned.step_time_s

    def document(self) -> dict[str, Any]:
        """The pair as JSON."""
        return {
            "sequence_length": self.sequence_length,
            "planned": self.planned.document(),
            "against": self.against.document(),
            "ratio": self.ratio,
            "tie": self.tie,
            "faster": self.faster,
        }


@dataclass(frozen=True)
class Compared:
    """The best plan and another one at each length, and their means over the lengths that plans rank by."""

    name: str
    planned: Ranked
    against: Ranked
    pairs: tuple[Pair, ...]
    mean: Pair

    @property
    def defaults(self) -> Mapping[str, str]:
        """What was taken for keys that the other file leaves open."""
        return self.against.plan.defaults

    def document(self) -> dict[str, Any]:
        """The comparison as JSON."""
        plan = self.against.plan
        return {
            "name": self.name,
            "layout": plan.layout.degrees(),
            "policy": plan.policy.model_dump(mode="json"),
            "peak_memory_bytes": self.against.peak_memory_bytes,
            "fits": self.against.fits,
            "lengths": [pair.document() for pair in self.pairs],
            "mean": self.mean.document(),
            "defaults": dict(self.defaults),
        }


def parse_lengths(text: str | None, workload: Workload, key: str = "--lengths") -> list[int]:
    """The lengths of `128,1024`, ascending; without a text both ends of the workload's. Raises InputError for
    lengths outside the workload's, and for those that legal layouts need not cut evenly."""
    shortest, longest = workload.min_sequence_length, workload.max_sequence_length
    if text is None:
        return sorted({shortest, longest})
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise InputError(key, text, "numbers of tokens, with commas between", [f"{shortest},{longest}"])
    lengths = sorted({int(word) for word in words})
    if len(lengths) > MOST_LENGTHS:
        raise InputError(key, text, f"at most {MOST_LENGTHS} lengths")
    step = gcd(shortest, longest)
    for length in lengths:
        if not shortest <= length <= longest:
            rule = f"the workload has {shortest:,} to {longest:,} tokens a sequence"
            raise InputError(key, length, rule, [shortest, longest])
        if length % step:
            rule = f"multiples of {step:,} tokens, as the ends are: every legal layout cuts those evenly"
            near = nearest_to(length, [length // step * step, -(-length // step) * step])
            raise InputError(key, length, rule, near)
    return lengths


def other_plan(path: str, deployment: Deployment, key: str = "--against") -> Plan:
    """The plan in another file, what it leaves open by default. Raises InputError where that file breaks a
    rule, or describes another cluster, model or workload than the deployment."""
    plan = resolve(open_placement(path, Deployment))
    mine = {
        "cluster": deployment.cluster.resolve()[0],
        "model": deployment.model,
        "workload": deployment.workload,
    }
    for part in _COMPARED:
        one, other = (noun.model_dump(mode="json") for noun in (mine[part], getattr(plan, part)))
        if one != other:
            where = _difference(one, other, part)
            raise InputError(key, path, f"not the same {part}: {where}; step times of two jobs say nothing")
    require_valid(plan)
    return plan


def _difference(one: Any, other: Any, path: str) -> str:
    """The first key at which two documents differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one:
            if one[name] != other.get(name):
                return _difference(one[name], other.get(name), f"{path}.{name}")
    return f"{path} is {other!r} there and {one!r} here"


def compare(name: str, best: Ranked, other: Plan, sequence_lengths: Sequence[int]) -> Compared:
    """Hold the best plan against another one at each length, and on the mean that plans are ranked on."""
    against = ranked(other, best.lengths)
    pairs = [Pair(n, _timed(best.plan, n), _timed(other, n)) for n in sequence_lengths]
    mean = Pair(None, *(Timed(r.step_time_s, *r.interval_s) for r in (best, against)))
    return Compared(name, best, against, tuple(pairs), mean)


def _timed(plan: Plan, sequence_length: int) -> Timed:
    seconds = simulated_step(plan, sequence_length).step_time_s
    return Timed(seconds, *interval(plan, seconds))
