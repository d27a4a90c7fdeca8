"""How long the order of a pipeline takes for many sets of stage times at once: run slot by slot, by arrays.

Long orders are not run to their end: they repeat themselves, and where every event of one repetition stands
as far behind the same one of the repetition before, so it is with each further one. That is checked for every
column, and a column that fails it is run on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from meshwright.planner.slots import SAME, Shape, SlottedOrder, slotted_order

Array = Any
CELLS = 2**21
"""Numbers that are held at once: bounds memory, and keeps a slot's in the cache."""
_FIRST_ROUNDS = 4
"""Rounds that are run at first: the fewest that hold two whole repetitions of an interleaved order."""


def order_ends(
    shape: Shape, num_micro_batches: Array, stages: Array, ready_s: Array, lags: Array | None
) -> Array:
    """When each rank is done with all micro-batches, in seconds: (P, N).

    `stages` has the shape (3, P·v, N): forward, input-gradient and weight-gradient seconds of one micro-batch
    by stage, for N columns. `num_micro_batches` is a number, or an array of N; `ready_s` (P, N), when ranks
    may start; `lags` (2, P·v, N), for how long a forward, and an input gradient, is under way from a stage to
    the next one: without, none is. Raises InputError for a number of micro-batches that has no order
    (`ir/buildable.py`).
    """
    columns = stages.shape[-1]
    counts = np.broadcast_to(np.asarray(num_micro_batches, np.int64), (columns,))
    found = np.empty((shape.num_ranks, columns))
    left, rounds = np.arange(columns), _FIRST_ROUNDS
    while len(left):
        missing = []
        for run, whole, chosen in _alike(shape, counts, left, rounds):
            order = slotted_order(shape, run)
            each = shape.period(run)
            for part in _parts(chosen, len(order.previous)):
                sent = None if lags is None else lags[..., part]
                ends, further = _run(order, stages[..., part], ready_s[:, part], sent)
                found[:, part] = ends if whole else ends + (counts[part] - run) // each * further
                if not whole:
                    missing.append(part[np.isnan(further)])
        left, rounds = np.concatenate([left[:0], *missing]), 2 * rounds
    return found


def _alike(shape: Shape, counts: Array, left: Array, rounds: int) -> Iterator[tuple[int, bool, Array]]:
    """Columns by how many micro-batches are run for them, and whether these are all that they have."""
    several, which = np.unique(counts[left], return_inverse=True)
    for count in several:
        shape.require_order(int(count))
    runs = np.array([shape.shorter(int(count), rounds) for count in several])
    for run in np.unique(runs):
        for whole in (True, False):
            chosen = left[((runs == run) & ((several == run) == whole))[which]]
            if len(chosen):
                yield int(run), whole, chosen


def _parts(chosen: Array, num_events: int) -> Iterator[Array]:
    at_once = max(CELLS // num_events, 1)
    for start in range(0, len(chosen), at_once):
        yield chosen[start : start + at_once]


def _run(order: SlottedOrder, stages: Array, ready: Array, lags: Array | None) -> tuple[Array, Array]:
    """When each rank has done its order, by column, and seconds of each further repetition: NaN where it does
    not take every rank the same."""
    forward, inner, weight = stages
    backward = inner + weight
    pairs = [(forward[first] + backward[second])[None] for first, second in order.pairs]
    durations = np.concatenate([forward, inner, weight, backward, *pairs])
    done = np.empty((len(order.previous), durations.shape[-1]))
    done[: len(ready)] = ready
    under_way = None if lags is None else np.concatenate([*lags, np.zeros((1, lags.shape[-1]))])
    for first, last in order.slots:
        now = done[order.previous[first:last]]
        for inputs, sent in zip(order.inputs, order.lags, strict=True):
            arrived = done[inputs[first:last]]
            if under_way is not None:
                arrived += under_way[sent[first:last]]
            np.maximum(now, arrived, out=now)
        np.add(now, durations[order.durations[first:last]], out=done[first:last])
    ends = done[order.ends]
    if order.repeat is None:
        return ends, np.full(ends.shape[-1], np.nan)
    longer = done[order.repeat.second] - done[order.repeat.first]
    least, most = longer.min(axis=0), longer.max(axis=0)
    return ends, np.where(most - least <= SAME * ends.max(axis=0), most, np.nan)
