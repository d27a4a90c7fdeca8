"""What an audit can say about a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Value = float | tuple[str, ...]
Verdict = Literal["holds", "fails", "undetermined"]


@dataclass(frozen=True, slots=True)
class Computed:
    """A figure at one sequence length, with the ends of its 80 % interval."""

    sequence_length: int
    value: float
    low: float
    high: float

    def holds(self, stated: float) -> bool:
        """Whether a stated value lies in the interval."""
        return self.low <= stated <= self.high

    def document(self) -> dict[str, float]:
        """The figure as JSON."""
        return {
            "sequence_length": self.sequence_length,
            "value": self.value,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What the description gives for a figure. `value` None means that it cannot be determined yet;
    `impossible` that a bound rules the stated value out all the same. A figure with an interval is computed
    `by_length`, and `verdict` is what that gives."""

    value: Value | None
    formula: str
    why: str
    impossible: bool = False
    by_length: tuple[Computed, ...] = ()
    verdict: Verdict | None = None
