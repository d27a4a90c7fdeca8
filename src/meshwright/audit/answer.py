"""What an audit can say about a figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Value = float | tuple[str, ...]
Verdict = Literal["holds", "fails", "undetermined"]


@dataclass(frozen=True, slots=True)
class AtLength:
    """What a figure is at one sequence length, with its 80 % interval, in SI units."""

    sequence_length: int
    value: float
    low: float
    high: float

    def document(self) -> dict[str, float]:
        """One entry of `computed_by_length`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the description gives for a figure. `value` None means that it cannot be determined;
    `impossible` that a bound rules the stated value out all the same.

    A figure that follows from a step time has a value with an interval at each of several sequence lengths,
    and the verdict that these give.
    """

    value: Value | None
    formula: str
    why: str
    impossible: bool = False
    by_length: tuple[AtLength, ...] = ()
    verdict: Verdict | None = None
