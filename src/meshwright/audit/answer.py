"""What an audit can say about a figure."""

from __future__ import annotations

from dataclasses import dataclass

Value = float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the description gives for a figure. `value` None means that it cannot be determined yet;
    `impossible` that a bound rules the stated value out all the same."""

    value: Value | None
    formula: str
    why: str
    impossible: bool = False
