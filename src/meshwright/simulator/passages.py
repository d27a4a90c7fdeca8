"""One block in one phase of one micro-batch, inside a step: what shows on the rank, and what hides.

The rule is that of `planner/times.block_times`: of the communication along an axis the share h runs in chunks
beside the compute of its block, as far as that lasts, and the rest stands between the groups of ops; then the
host is waited for (`host_wait_s`). With contention, hidden transfers of several axes that cross the same link
tier share its bandwidth evenly while they last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.planner.times import host_wait_s
from meshwright.simulator.parts import COMPUTE, Part, PricedPhase

Array = Any
EXCHANGE_AXIS = "ep"
"""The exchange of tokens hands sizes back to the host: launches do not hide behind it."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Communication of one axis beside compute: all of it, and what is left when compute ends. Seconds alone
    on the link."""

    axis: str
    tier: int
    seconds: Array
    left_s: Array


@dataclass(frozen=True, slots=True)
class Passage:
    """Seconds that a block's phase shows: each part, what hidden transfers leave, and waiting for launches.

    `shown_s[i]` belongs to `parts[i]`. Numbers, or arrays over samples and micro-batches.
    """

    phase: str
    parts: tuple[Part, ...]
    shown_s: tuple[Array, ...]
    hidden: tuple[Hidden, ...]
    host_s: Array
    total_s: Array


def settle(priced: PricedPhase, slowdown: Array = 1.0, contention: bool = True) -> Passage:
    """A priced phase inside a step. `slowdown` stretches compute: a straggler's factor. Elementwise."""
    shown: list[Array] = []
    compute: Array = 0.0
    whole: defaultdict[str, Array] = defaultdict(float)
    tiers: dict[str, int] = {}
    for part, seconds in zip(priced.parts, priced.seconds, strict=True):
        if part.kind == COMPUTE:
            shown.append(seconds * slowdown)
            compute = compute + shown[-1]
            continue
        assert part.axis is not None
        shown.append(seconds * (1 - priced.hidden[part.axis]))
        whole[part.axis] = whole[part.axis] + seconds
        tiers[part.axis] = max(part.tier, tiers.get(part.axis, part.tier))
    hiding = {axis: priced.hidden[axis] * s for axis, s in whole.items() if priced.hidden[axis] > 0}
    left = left_over(hiding, tiers, compute, contention)
    hidden = tuple(Hidden(axis, tiers[axis], hiding[axis], left[axis]) for axis in hiding)
    exposed = {axis: s * (1 - priced.hidden[axis]) + left.get(axis, 0.0) for axis, s in whole.items()}
    work = compute + sum(s for axis, s in exposed.items() if axis != EXCHANGE_AXIS)
    host = host_wait_s(work, priced.launching_s, priced.is_serial)
    total = work + exposed.get(EXCHANGE_AXIS, 0.0) + host
    return Passage(priced.phase, priced.parts, tuple(shown), hidden, host, total)


def left_over(
    hiding: dict[str, Array], tiers: dict[str, int], compute_s: Array, contention: bool
) -> dict[str, Array]:
    """What hidden transfers have left when the compute beside them ends.

    Alone on its tier a transfer has t − compute left. Several share the bandwidth evenly, so that those which
    last to the end all move equally much: the level L of Σ min(t, L) = compute, and t − L is left of each.
    """
    left: dict[str, Array] = {}
    for tier in {tiers[axis] for axis in hiding}:
        axes = [axis for axis in hiding if tiers[axis] == tier]
        if contention and len(axes) > 1:
            level = shared_level([hiding[axis] for axis in axes], compute_s)
        else:
            level = compute_s
        left |= {axis: np.maximum(hiding[axis] - level, 0.0) for axis in axes}
    return left


def shared_level(amounts: Sequence[Array], capacity: Array) -> Array:
    """The level L at which Σ min(amount, L) = capacity: infinite where all amounts fit. Elementwise."""
    ordered = np.sort(np.stack(np.broadcast_arrays(*amounts)), axis=0)
    number = len(ordered)
    level: Array = np.inf
    filled: Array = 0.0
    for position in range(number):
        share = (capacity - filled) / (number - position)
        # The smallest amount above the even share of what is left stops the filling there.
        stops = np.isinf(level) & (ordered[position] > share)
        level = np.where(stops, share, level)
        filled = filled + ordered[position]
    return level
