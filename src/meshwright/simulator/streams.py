"""Link bandwidth that transfers share, moment by moment, while one rank works through its parts.

A rank's link tier is one resource: n transfers on it move at 1/n of what each would reach alone. Two sorts
of transfer run beside a rank's own work: hidden shares of its collectives, which move in chunks only while
their block computes, and flows, which move all the time: sends to other stages and reductions of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Piece = tuple[float, int]
"""Seconds on the rank's main line, and the link tier that they occupy: −1 for compute."""

_DONE = 1e-12
"""What is left of a transfer, in seconds, when it counts as done: far above what floats lose in a step."""


@dataclass(slots=True)
class Flow:
    """A transfer beside a rank's work: seconds that are left alone on the link, its tier, what it brings."""

    left_s: float
    tier: int
    key: int = -1


@dataclass(frozen=True, slots=True)
class Stretch:
    """One block's phase on a rank's main line: its pieces in order, hidden (seconds, tier), the wait for the
    host at the end, and seconds of it all where no flow is beside it."""

    pieces: tuple[Piece, ...]
    hidden: tuple[Piece, ...]
    host_s: float
    total_s: float


Window = tuple[float, float]
"""Start and end."""


@dataclass(slots=True)
class Trace:
    """When the pieces and the hidden transfers of a run of stretches stood: by stretch, in order; `left` are
    the windows in which the rank waits for what a hidden transfer left, with its position, and `host` those
    of the host."""

    pieces: list[list[Window]]
    hidden: list[list[Window]]
    left: list[list[tuple[int, Window]]]
    host: list[Window]


def idle(flows: list[Flow], now_s: float, until_s: float) -> list[tuple[float, int]]:
    """Move flows while their rank does nothing; the times and keys of those that arrive. Drops them."""
    arrived: list[tuple[float, int]] = []
    _beside(until_s - now_s, flows, [], now_s, arrived)
    return arrived


def arrivals(flows: Sequence[Flow], now_s: float) -> list[tuple[float, int]]:
    """When flows will arrive if their rank does nothing."""
    if len(flows) == 1:
        return [(now_s + flows[0].left_s, flows[0].key)]
    return idle([Flow(flow.left_s, flow.tier, flow.key) for flow in flows], now_s, float("inf"))


def work_through(
    stretches: Sequence[Stretch], flows: list[Flow], start_s: float, trace: Trace | None = None
) -> tuple[float, list[tuple[float, int]]]:
    """Work through stretches with flows beside them: the end, and what arrived when. Flows are moved on."""
    now, arrived = start_s, list[tuple[float, int]]()
    for stretch in stretches:
        if not flows and trace is None:
            now += stretch.total_s
            continue
        own = [Flow(seconds, tier, position) for position, (seconds, tier) in enumerate(stretch.hidden)]
        ended: list[tuple[float, int]] = []
        windows: list[Window] = []
        began = now
        for seconds, tier in stretch.pieces:
            before = now
            if tier < 0:
                now = _beside(seconds, flows, own, now, arrived, ended)
            else:
                now = _transfer(seconds, tier, flows, now, arrived)
            windows.append((before, now))
        left = []
        for flow in own:
            before = now
            now = _transfer(flow.left_s, flow.tier, flows, now, arrived)
            ended.append((now, flow.key))
            left.append((flow.key, (before, now)))
        before = now
        now = _beside(stretch.host_s, flows, [], now, arrived)
        if trace is not None:
            trace.pieces.append(windows)
            trace.hidden.append([(began, end) for end, _ in sorted(ended, key=lambda item: item[1])])
            trace.left.append(left)
            trace.host.append((before, now))
    return now, arrived


def _beside(
    seconds: float,
    flows: list[Flow],
    own: list[Flow],
    now: float,
    arrived: list[tuple[float, int]],
    ended: list[tuple[float, int]] | None = None,
) -> float:
    """Compute for some seconds, or idle, while flows and hidden transfers move."""
    if len(flows) == 1 and not own and flows[0].left_s - seconds > _DONE:  # the usual case, at once
        flows[0].left_s -= seconds
        return now + seconds
    while flows or own:
        moving = [*flows, *own] if own else flows
        count = _by_tier(moving)
        step = _first_through(moving, count, seconds)
        some_done = _move(moving, count, step)
        now, seconds = now + step, seconds - step
        if some_done:
            _drop_done(flows, now, arrived)
            _drop_done(own, now, ended if ended is not None else [])
        if seconds <= 0:
            return now
    return now + seconds if seconds != float("inf") else now


def _transfer(
    left: float, tier: int, flows: list[Flow], now: float, arrived: list[tuple[float, int]]
) -> float:
    """Wait for a transfer of the rank's own, which flows on its tier slow down."""
    if len(flows) == 1 and _DONE < left < flows[0].left_s - _DONE:  # the usual case, at once
        flows[0].left_s -= left
        return now + (2 * left if flows[0].tier == tier else left)
    while flows and left > _DONE:
        count = _by_tier(flows)
        mine = count.get(tier, 0) + 1
        count[tier] = mine
        step = _first_through(flows, count, left * mine)
        left -= step / mine
        some_done = _move(flows, count, step)
        now += step
        if some_done:
            _drop_done(flows, now, arrived)
    return now + max(left, 0.0)


def _first_through(moving: Sequence[Flow], count: dict[int, int], most_s: float) -> float:
    """Seconds until the first of some transfers is through, at most so many."""
    for flow in moving:
        takes = flow.left_s * count[flow.tier]
        if takes < most_s:
            most_s = takes
    return most_s


def _move(moving: Sequence[Flow], count: dict[int, int], step_s: float) -> bool:
    """Move transfers on; whether any is through."""
    some_done = False
    for flow in moving:
        flow.left_s -= step_s / count[flow.tier]
        some_done = some_done or flow.left_s <= _DONE
    return some_done


def _by_tier(flows: Sequence[Flow]) -> dict[int, int]:
    count: dict[int, int] = {}
    for flow in flows:
        count[flow.tier] = count.get(flow.tier, 0) + 1
    return count


def _drop_done(flows: list[Flow], now: float, arrived: list[tuple[float, int]]) -> None:
    arrived += [(now, flow.key) for flow in flows if flow.left_s <= _DONE]
    flows[:] = [flow for flow in flows if flow.left_s > _DONE]
