"""Whether a value that changes with the sequence length holds, and at which lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import floor, log10

from meshwright.audit.answer import AtLength, Verdict

Curve = Callable[[int], AtLength]
SAMPLES = 5
"""Lengths that a range is looked at, in equal ratios from the shortest to the longest."""
_PRECISION = 100
"""A length at which a verdict changes is found to one part in this many."""


def sampled(shortest: int, longest: int, step: int) -> list[int]:
    """Lengths of a range in equal ratios, its ends among them, all but the ends multiples of `step`."""
    if shortest == longest:
        return [longest]
    ratio = (longest / shortest) ** (1 / (SAMPLES - 1))
    inner = [round(shortest * ratio**n / step) * step for n in range(1, SAMPLES - 1)]
    return sorted({shortest, longest, *(n for n in inner if shortest < n < longest)})


def judged(
    curve: Curve, stated: float, slack: float, lengths: Sequence[int], step: int
) -> tuple[Verdict, str]:
    """The verdict on a stated value over a range of lengths, in words that follow `16 ms`.

    It holds where it lies inside the interval at every length, and fails where it lies outside at every one;
    else it is undetermined, and the words say at which lengths it can hold. `lengths` sample the range.
    """

    def side(length: int) -> int:
        """-1 for a stated value below the interval at a length, 1 above it, 0 inside."""
        at = curve(length)
        return (stated - slack > at.high) - (stated + slack < at.low)

    points = [(length, side(length)) for length in lengths]
    sides = {where for _, where in points}
    at_every = "" if len(points) == 1 else " at every length"
    if sides == {0}:
        return "holds", f"lies inside the interval{at_every}"
    if len(sides) == 1:
        return "fails", f"lies {'above' if sides == {1} else 'below'} the interval{at_every}"
    return "undetermined", _where(_changes(points, side, step), lengths[-1])


def _changes(
    points: Sequence[tuple[int, int]], side: Callable[[int], int], step: int
) -> list[tuple[int, int]]:
    """The first length of each run of lengths on one side, with that side."""
    changes = [points[0]]
    for (start, before), (end, after) in pairwise(points):
        low, here = start, before
        while here != after:
            high = end
            while high - low > max(step, high // _PRECISION):
                middle = (low + high) // 2 // step * step
                if middle <= low:
                    break
                low, high = (middle, high) if side(middle) == here else (low, middle)
            low, here = high, side(high)
            changes.append((low, here))
    return changes


def _where(changes: Sequence[tuple[int, int]], longest: int) -> str:
    """At which lengths a value can hold, from where it changes sides."""
    ends = [*(length for length, _ in changes[1:]), None]
    inside = [(start, end) for (start, where), end in zip(changes, ends, strict=True) if where == 0]
    if not inside:  # it leaps over the interval between two neighbouring lengths
        return f"can hold at about {_about(changes[1][0])} tokens only"
    words = []
    for start, end in inside:
        if start == changes[0][0]:
            words.append(f"below about {_about(end or longest)} tokens")
        elif end is None:
            words.append(f"above about {_about(start)} tokens")
        else:
            words.append(f"between about {_about(start)} and {_about(end)} tokens")
    return f"can hold {' and '.join(words)} only"


def _about(length: int) -> str:
    """A length to two significant digits."""
    unit = 10 ** max(0, floor(log10(length)) - 1)
    return f"{round(length / unit) * unit:,}"
