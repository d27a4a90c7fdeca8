"""Rank lists as people write them: `0-7`, `0,8,16,…,120`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LISTED = 4


def progression(ranks: Sequence[int]) -> str:
    """Evenly spaced ranks, ascending: a run as first-last, a few in full, others by their ends."""
    if len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(ranks) <= _LISTED:
        return ",".join(map(str, ranks))
    return f"{ranks[0]},{ranks[1]},{ranks[2]},…,{ranks[-1]}"


def runs(numbers: Iterable[int]) -> str:
    """Any numbers as the runs they form: `0-3,8-11`; nothing is `none`."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found) or "none"
