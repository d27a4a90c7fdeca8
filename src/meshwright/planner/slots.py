"""A pipeline's order as arrays, in slots: whatever an action waits for stands in an earlier slot.

So the order can be run slot by slot for many sets of durations at once (`planner/order_times.py`). An order
of many micro-batches repeats itself; where it does is part of what is laid out here.

P is the number of ranks, v the chunks a rank holds, m the number of micro-batches, S = P·v the stages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from meshwright.ir.buildable import require_buildable
from meshwright.ir.orders import Action, ActionKind, num_rounds
from meshwright.ir.schedule import Schedule, build_schedule
from meshwright.policy import CHUNKED_SCHEDULES, V_SCHEDULES, ScheduleName

Array = Any
KINDS = (
    ActionKind.FORWARD,
    ActionKind.INPUT_GRADIENT,
    ActionKind.WEIGHT_GRADIENT,
    ActionKind.BACKWARD,
)
"""Kinds of action in the order in which a table of durations has them, S rows each."""
_ROW = {kind: row for row, kind in enumerate(KINDS)}
_PER_PERIOD = (1, 2, 3)
"""Slots in which a rank takes one micro-batch through a chunk: overlapped pairs, halves, thirds."""


SAME = 1e-12
"""Share of the whole time by which two repetitions may differ in length and still be equal: rounding."""


class Shape(NamedTuple):
    """What an order depends on beside its micro-batches."""

    schedule: ScheduleName
    num_ranks: int
    num_chunks: int

    def require_order(self, num_micro_batches: int) -> None:
        """Raise InputError for a number of micro-batches that has no order."""
        require_buildable(self.schedule, self.num_ranks, num_micro_batches, self.num_chunks)

    def period(self, num_micro_batches: int) -> int:
        """Micro-batches after which an order repeats itself."""
        if self.schedule in CHUNKED_SCHEDULES - V_SCHEDULES:
            return num_micro_batches // num_rounds(self.num_ranks, num_micro_batches)
        return 1

    def shorter(self, num_micro_batches: int, rounds: int) -> int:
        """A number of micro-batches, `rounds` times what fills the pipeline, whose order the whole one goes
        on like, a period at a time; the whole number where there is none, as under GPipe, whose orders grow
        in two places."""
        if self.schedule == "GPipe":
            return num_micro_batches
        each = self.period(num_micro_batches)
        run = rounds * (each if each > 1 else self.num_ranks)
        return run if run < num_micro_batches and self.period(run) == each else num_micro_batches


@dataclass(frozen=True, slots=True)
class Repeat:
    """Two repetitions in a row, as events in the same sequence.

    An order of one period more has a third in their place, and else the same actions. If every event of the
    second ends λ later than the same one of the first, all that follows ends λ later in the longer order.
    """

    first: Array
    second: Array


@dataclass(frozen=True, slots=True)
class SlottedOrder:
    """An order in slots. Events are numbered slot by slot, behind P that stand for the start of each rank.

    `slots` are ranges of events, `by_rank` the events of each rank, in order. Of each event, `previous` is
    the one before it on its rank, `inputs` (up to two) those that other ranks send, where there are none the
    one before again, `durations` its row in a table of KINDS by stage; `pairs` lists the stages, forward and
    backward, of overlapped pairs, whose rows follow. `lags` are the rows of what sends the inputs in a table
    of forwards and of gradients by stage, whose last row is for none. `repeat` is None where the order is too
    short to repeat itself.
    """

    slots: tuple[tuple[int, int], ...]
    previous: Array
    inputs: tuple[Array, ...]
    lags: tuple[Array, ...]
    durations: Array
    pairs: tuple[tuple[int, int], ...]
    by_rank: tuple[Array, ...]
    repeat: Repeat | None

    @property
    def ends(self) -> list[int]:
        """The last event of each rank."""
        return [int(own[-1]) for own in self.by_rank]


@lru_cache(maxsize=256)
def slotted_order(shape: Shape, num_micro_batches: int) -> SlottedOrder:
    """The order of `build_schedule` in slots. Raises InputError as that does."""
    schedule, num_ranks, num_chunks = shape
    laid = _laid(build_schedule(schedule, num_ranks, num_micro_batches, num_chunks))
    by_slot = np.argsort(laid.slots, kind="stable")
    number = np.zeros(len(by_slot), np.int64)
    number[by_slot] = np.arange(num_ranks, num_ranks + len(by_slot))
    slots, ranks = laid.slots[by_slot], laid.ranks[by_slot]
    starts = [*(num_ranks + np.flatnonzero(np.diff(slots, prepend=-1))).tolist(), num_ranks + len(slots)]
    before, *inputs = laid.waits_for[:, by_slot]
    previous = np.where(before < 0, ranks, number[before])
    waits_for = np.stack([previous, *(np.where(own < 0, previous, number[own]) for own in inputs)])
    what = np.stack([laid.durations, *laid.micro_batches])[:, by_slot]
    of_starts = ((0, 0), (num_ranks, 0))
    return SlottedOrder(
        slots=tuple(pairwise(starts)),
        previous=np.pad(waits_for, of_starts)[0],
        inputs=tuple(np.pad(waits_for, of_starts)[1:]),
        lags=tuple(np.pad(laid.lags[:, by_slot], of_starts)),
        durations=np.pad(what[0], of_starts[1]),
        pairs=laid.pairs,
        by_rank=tuple(num_ranks + np.flatnonzero(ranks == rank) for rank in range(num_ranks)),
        repeat=_repeat(slots, ranks, what, waits_for, num_chunks, shape.period(num_micro_batches)),
    )


@dataclass(frozen=True, slots=True)
class _Laid:
    """A schedule's actions, rank after rank, as arrays by position.

    `slots` is the first one after all that an action waits for. `waits_for` has rows of positions, −1 for
    none: the action before on its rank, and its inputs, whose rows in the table of lags are in `lags`.
    `micro_batches` has a row for the first part of actions, and one for the last.
    """

    slots: Array
    ranks: Array
    durations: Array
    micro_batches: Array
    pairs: tuple[tuple[int, int], ...]
    waits_for: Array
    lags: Array


def _laid(schedule: Schedule) -> _Laid:
    """Lay out a schedule. What an action's own rank has made stands before it in any case."""
    by_rank = [list(schedule.actions(rank)) for rank in range(schedule.num_ranks)]
    actions = [action for own in by_rank for action in own]
    first, last = ([action.simple_actions[end] for action in actions] for end in (0, -1))
    (kind, stage, count), (last_kind, last_stage, last_count) = _columns(first), _columns(last)
    is_pair = np.array([bool(action.parts) for action in actions])
    num_stages, place = schedule.num_stages, np.arange(len(actions))
    made = np.full((2, num_stages + 2, schedule.num_micro_batches), -1)  # stages from 1, with none beyond
    forwards, gradients = kind == _ROW[ActionKind.FORWARD], last_kind != _ROW[ActionKind.WEIGHT_GRADIENT]
    gradients &= last_kind != _ROW[ActionKind.FORWARD]
    made[0, stage[forwards] + 1, count[forwards]] = place[forwards]
    made[1, last_stage[gradients] + 1, last_count[gradients]] = place[gradients]
    from_before, from_behind = made[0, stage, count], made[1, last_stage + 2, last_count]
    inputs = [np.where(forwards, from_before, np.where(gradients, from_behind, -1))]
    lags = [np.where(forwards, stage - 1, num_stages + stage + 1)]
    pairs, which = np.unique(np.stack([stage, last_stage])[:, is_pair], axis=1, return_inverse=True)
    durations = kind * num_stages + stage
    if is_pair.any():
        durations[is_pair] = len(KINDS) * num_stages + which
        inputs.append(np.where(is_pair, from_behind, -1))
        lags.append(num_stages + last_stage + 1)
    ends = np.cumsum([len(own) for own in by_rank])
    before = np.where(np.isin(place, [0, *ends]), -1, place - 1)
    return _Laid(
        slots=np.array(_slots([own.tolist() for own in inputs], ends.tolist())),
        ranks=np.repeat(np.arange(len(by_rank)), [len(own) for own in by_rank]),
        durations=durations,
        micro_batches=np.stack([count, last_count]),
        pairs=tuple(zip(*pairs.tolist(), strict=True)),
        waits_for=np.stack([before, *inputs]),
        lags=np.where(np.stack(inputs) < 0, 2 * num_stages, np.stack(lags)),
    )


def _columns(actions: list[Action]) -> Array:
    """Row of kind, stage and micro-batch of simple actions."""
    return np.array([(_ROW[action.kind], action.stage, action.micro_batch) for action in actions]).T


def _slots(inputs: list[list[int]], ends: list[int]) -> list[int]:
    """The first slot for each position after those of its inputs and of the one before on its rank, whose
    positions end at `ends`."""
    slots = [-1] * ends[-1]
    at, waiting = [0, *ends[:-1]], dict[int, list[int]]()
    free = [-1] * len(ends)
    runnable = deque(range(len(ends)))
    while runnable:
        rank = runnable.popleft()
        for position in range(at[rank], ends[rank]):
            slot, missing = free[rank], None
            for own in inputs:
                needed = own[position]
                if needed >= 0:
                    if slots[needed] < 0:
                        missing = needed
                    slot = max(slot, slots[needed])
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            slots[position] = free[rank] = slot + 1
            at[rank] = position + 1
            if position in waiting:
                runnable.extend(waiting.pop(position))
    return slots


def _repeat(
    slots: Array, ranks: Array, what: Array, waits_for: Array, num_chunks: int, period: int
) -> Repeat | None:
    """The last two repetitions in a row: slots [a, a + L) and [a + L, a + 2L) that hold the same actions, one
    `period` of micro-batches apart, where none of the second waits for what stands before a, and nothing
    later for what stands before a + L. `what` has rows for duration and micro-batches of each event."""
    num_slots, num_ranks = int(slots[-1]) + 1, int(ranks.max()) + 1
    num_stages = num_chunks * num_ranks
    grid = np.zeros((num_slots, num_ranks, 4), np.int64)  # event, duration, micro-batches
    grid[slots, ranks] = np.stack([np.arange(num_ranks, num_ranks + len(slots)), *what], axis=1)
    oldest = np.full(num_slots, num_slots)
    np.minimum.at(oldest, slots, np.concatenate([[-1] * num_ranks, slots])[waits_for].min(axis=0))
    oldest_yet = np.append(np.minimum.accumulate(oldest[::-1])[::-1], num_slots)
    for length in (per * num_chunks * period for per in _PER_PERIOD):
        fits = _fits(grid[:-length], grid[length:], period)
        for start in range(num_slots - 2 * length, -1, -1):
            middle, beyond = start + length, start + 2 * length
            if (
                fits[start:middle].all()
                and oldest[middle:beyond].min() >= start
                and oldest_yet[beyond] >= middle
            ):
                first, second = grid[start:middle], grid[middle:beyond]
                return _whole(first, second, num_stages * period, num_stages)
    return None


def _whole(first: Array, second: Array, num_forwards: int, num_stages: int) -> Repeat | None:
    """The repetitions, unless some forwards of their micro-batches stand elsewhere, as in GPipe."""
    held = first[..., 0] > 0
    rows = first[held][:, 1]
    if int(((rows < num_stages) | (rows >= len(KINDS) * num_stages)).sum()) != num_forwards:
        return None
    return Repeat(first[held][:, 0], second[held][:, 0])


def _fits(earlier: Array, later: Array, period: int) -> Array:
    """By slot, whether all ranks do later what they do earlier, `period` micro-batches on."""
    apart = later - earlier
    same = (apart[..., 1] == 0) & np.all(apart[..., 2:] == period, axis=-1)
    held, idle = earlier[..., 0] > 0, later[..., 0] == 0
    return np.all(np.where(held, same, idle), axis=1)
