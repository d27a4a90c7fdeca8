"""Arithmetic of time spans: unions, what two have in common, what one has beyond another.

A span is (start, end); a timeline of them is merged: in order, apart from one another, none empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[float, float]
Merged = list[Span]


def merged(spans: Iterable[Span]) -> Merged:
    """The union of spans that may overlap, touch or be empty."""
    found: Merged = []
    for start, end in sorted(spans):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def common(one: Sequence[Span], other: Sequence[Span]) -> Merged:
    """What two merged timelines have in common."""
    found: Merged = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if end > start:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def beyond(one: Sequence[Span], other: Sequence[Span]) -> Merged:
    """What the first of two merged timelines has and the second has not."""
    found: Merged = []
    j = 0
    for start, end in one:
        while j < len(other) and other[j][1] <= start:
            j += 1
        place, position = start, j
        while position < len(other) and other[position][0] < end:
            if other[position][0] > place:
                found.append((place, other[position][0]))
            place = max(place, other[position][1])
            position += 1
        if place < end:
            found.append((place, end))
    return found


def length(spans: Iterable[Span]) -> float:
    """Seconds of a merged timeline."""
    return sum(end - start for start, end in spans)


def within(spans: Iterable[Span], window: Span) -> Merged:
    """A merged timeline cut to a window."""
    return common(list(spans), [window])
