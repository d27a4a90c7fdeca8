"""A pipeline's order as arrays, in slots: whatever an action waits for stands in an earlier slot.

So the order can be run slot by slot for many sets of durations at once (`planner/order_times.py`). An order
of many micro-batches repeats itself; where it does is part of what is laid out here.

P is the number of ranks, v the chunks a rank holds, m the number of micro-batches, S = P·v the stages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

import numpy as np

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
    backward, of overlapped pairs, whose rows follow. `repeat` is None where the order is too short to repeat
    itself.
    """

    slots: tuple[tuple[int, int], ...]
    previous: Array
    inputs: tuple[Array, ...]
    durations: Array
    pairs: tuple[tuple[int, int], ...]
    by_rank: tuple[Array, ...]
    repeat: Repeat | None

    @property
    def ends(self) -> list[int]:
        """The last event of each rank."""
        return [int(own[-1]) for own in self.by_rank]


def shorter(schedule: ScheduleName, num_ranks: int, num_micro_batches: int, rounds: int) -> int:
    """A number of micro-batches, `rounds` times what fills the pipeline, whose order the whole one goes on
    like, a `period` at a time; the whole number where there is none."""
    each = period(schedule, num_ranks, num_micro_batches)
    run = rounds * (each if each > 1 else num_ranks)
    goes_on = run < num_micro_batches and period(schedule, num_ranks, run) == each
    return run if goes_on else num_micro_batches


def period(schedule: ScheduleName, num_ranks: int, num_micro_batches: int) -> int:
    """Micro-batches after which an order repeats itself."""
    if schedule in CHUNKED_SCHEDULES - V_SCHEDULES:
        return num_micro_batches // num_rounds(num_ranks, num_micro_batches)
    return 1


@lru_cache(maxsize=512)
def slotted_order(
    schedule: ScheduleName, num_ranks: int, num_chunks: int, num_micro_batches: int
) -> SlottedOrder:
    """The order of `build_schedule` in slots. Raises InputError as that does."""
    built = build_schedule(schedule, num_ranks, num_micro_batches, num_chunks)
    pairs: dict[tuple[int, int], int] = {}
    laid = np.array(_laid(built, pairs)).T
    by_slot = np.argsort(laid[0], kind="stable")
    number = np.zeros(len(by_slot) + 1, np.int64)  # by position as laid; the last, −1, stands for none
    number[by_slot] = np.arange(num_ranks, num_ranks + len(by_slot))
    slots, ranks, durations, first, last = laid[:5, by_slot]
    starts = [*(num_ranks + np.flatnonzero(np.diff(slots, prepend=-1))).tolist(), num_ranks + len(slots)]
    previous, *inputs = laid[5:, by_slot]
    previous = np.where(previous < 0, ranks, number[previous])
    waits_for = np.stack([previous, *(np.where(own < 0, previous, number[own]) for own in inputs)])
    each = period(schedule, num_ranks, num_micro_batches)
    of_starts = ((0, 0), (num_ranks, 0))
    return SlottedOrder(
        slots=tuple(pairwise(starts)),
        previous=np.pad(waits_for, of_starts)[0],
        inputs=tuple(np.pad(waits_for, of_starts)[1 : 3 if pairs else 2]),
        durations=np.pad(durations, of_starts[1]),
        pairs=tuple(pairs),
        by_rank=tuple(num_ranks + np.flatnonzero(ranks == rank) for rank in range(num_ranks)),
        repeat=_repeat(slots, ranks, np.stack([durations, first, last]), waits_for, num_chunks, each),
    )


def _laid(schedule: Schedule, pairs: dict[tuple[int, int], int]) -> list[tuple[int, ...]]:
    """Every action in the first slot after all that it waits for: slot, rank, row of durations, micro-batches
    of its first and its last part, and positions in this list, −1 for none, of the action before on its rank
    and of its inputs. What its own rank has made stands before it in any case. `pairs` is filled in."""
    steps = [[_step(action, schedule, pairs) for action in schedule.actions(r)] for r in _ranks(schedule)]
    laid: list[tuple[int, ...]] = []
    made: dict[int, int] = {}
    waiting: dict[int, int] = {}
    latest, done = [-1] * schedule.num_ranks, [0] * schedule.num_ranks
    runnable = deque(_ranks(schedule))
    while runnable:
        rank = runnable.popleft()
        for duration, micro_batches, needs, makes in islice(steps[rank], done[rank], None):
            inputs = [made.get(key, -1) for key in needs]
            if -1 in inputs:
                waiting[needs[inputs.index(-1)]] = rank
                break
            before, position = latest[rank], len(laid)
            slot = 1 + max([laid[other][0] for other in (before, *inputs) if other >= 0], default=-1)
            one, two = inputs if len(inputs) == 2 else (*inputs, -1, -1)[:2]
            laid.append((slot, rank, duration, *micro_batches, before, one, two))
            latest[rank] = position
            done[rank] += 1
            for key in makes:
                made[key] = position
                if key in waiting:
                    runnable.append(waiting.pop(key))
    return laid


def _ranks(schedule: Schedule) -> range:
    return range(schedule.num_ranks)


_Step = tuple[int, tuple[int, int], list[int], list[int]]


def _step(action: Action, schedule: Schedule, pairs: dict[tuple[int, int], int]) -> _Step:
    """The row of an action in the table of durations, micro-batches of its first and last part, and keys of
    what other stages must have made before it and of what it makes: forwards, then input gradients."""
    stages, count = schedule.num_stages, schedule.num_micro_batches
    parts = action.parts or (action,)
    needs, makes = [], []
    for part in parts:
        key = part.stage * count + (part.micro_batch or 0)
        if part.kind is ActionKind.FORWARD:
            makes.append(key)
            if part.stage:
                needs.append(key - count)
        elif part.kind is not ActionKind.WEIGHT_GRADIENT:
            key += stages * count
            makes.append(key)
            if part.stage < stages - 1:
                needs.append(key + count)
    if action.parts:
        pair = parts[0].stage, parts[1].stage
        row = len(KINDS) * stages + pairs.setdefault(pair, len(pairs))
    else:
        row = _ROW[action.kind] * stages + action.stage
    return row, (parts[0].micro_batch or 0, parts[-1].micro_batch or 0), needs, makes


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
