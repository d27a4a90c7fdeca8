"""The fastest candidates of a space, found without pricing those that cannot be among them.

Memory comes first. What fits gets a bound that its step time cannot be below (`Pricing.bound`), which costs a
fraction of the price. Candidates are priced from the lowest bound up, until no bound is below the time of the
last one that is wanted, or within reach of the best time; after that, those that could still be the fastest
at a smaller memory. So the fastest `wanted` candidates are exact, and so are the fastest at every step of
memory and the number within reach. The lowest AT_LEAST bounds are priced in any case.

Everything is deterministic: equal times are ordered by memory, then by the order of the space, which lists
what is simpler first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.planner.fitting import Fitting, columns_of
from meshwright.planner.prices import Prices
from meshwright.planner.pricing import AtLength, Pricing, Wanted
from meshwright.planner.space import Candidate, Choice, Pipeline, Space
from meshwright.planner.stages import Stages, stages_of
from meshwright.planner.tables import PER_RANK

Array = Any
CHUNK = 8192
"""Candidates priced in one call, or a few more: bounds the memory of a search."""
FIRST = 512
"""Candidates of the lowest bounds that are priced first, to know what a good time is."""
AT_LEAST = 2**17
"""Candidates that are priced where so many fit: all of a small space, and a fraction of a second in a large
one."""
AHEAD = 64
"""Candidates of each step of memory that are priced at once when the fastest of each is looked for."""
LOOKED = 4096
"""Candidates of one pipeline and choice whose whole memory is looked at, where their model states alone are
too much, for what needs least."""
MEMORY_STEPS = 64
"""Steps of the GPU's memory at each of which the fastest candidate is kept."""

Progress = Callable[[float], None]
"""Told the share of a search that is done."""


@dataclass(frozen=True, slots=True)
class Priced:
    """One priced candidate."""

    candidate: Candidate
    step_time_s: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Found:
    """What a search found: the fastest candidates in order, the fastest at each step of memory, and counts.

    `legal` = `memory_rejected` + `feasible`; of those that fit, `priced` were priced, and no other can be in
    `best` or `front`, or among those `within_reach` of the best time. `nearest` is what needs least memory,
    where nothing fits.
    """

    best: tuple[Priced, ...]
    front: tuple[Priced, ...]
    legal: int
    memory_rejected: int
    feasible: int
    priced: int
    within_reach: int
    nearest: Priced | None
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """Candidates that fit and share pipeline and choice: positions of bases, peak bytes and bounds."""

    pipeline: Pipeline
    choice: Choice
    rows: Array
    bytes: Array
    bounds: Array


class Points:
    """All candidates that fit, one after the other in the order of the space; `seconds` where priced."""

    def __init__(self, batches: list[_Batch]) -> None:
        self.batches = batches
        self.starts = np.cumsum([0, *(len(batch.rows) for batch in batches)])
        empty: list[Array] = [np.zeros(0)]
        self.rows = np.concatenate([*(batch.rows for batch in batches), *empty]).astype(np.int32)
        self.bytes = np.concatenate([*(batch.bytes for batch in batches), *empty])
        self.bounds = np.concatenate([*(batch.bounds for batch in batches), *empty])
        self.seconds = np.full(len(self.rows), np.inf)

    def __len__(self) -> int:
        return len(self.rows)

    def by_batch(self, chosen: Array) -> Iterator[tuple[_Batch, Array]]:
        """Chosen positions in ascending order, split by batch and into chunks."""
        cuts = np.searchsorted(chosen, self.starts)
        for batch, first, last in zip(self.batches, cuts[:-1], cuts[1:], strict=True):
            for start in range(first, last, CHUNK):
                yield batch, chosen[start : min(start + CHUNK, last)]

    def priced(self, position: int) -> Priced:
        """One priced candidate."""
        batch = self.batches[int(np.searchsorted(self.starts, position, "right")) - 1]
        candidate = Candidate(batch.pipeline, batch.choice, int(self.rows[position]))
        return Priced(candidate, float(self.seconds[position]), int(self.bytes[position]))


class Search:
    """One search of a space, for steps of these sequence lengths."""

    def __init__(
        self,
        space: Space,
        priced: Prices,
        lengths: Sequence[AtLength],
        wanted: int = 20,
        reach: float = 1.0,
        at_least: int | None = AT_LEAST,
        progress: Progress | None = None,
    ) -> None:
        """`reach` is a factor on the best time; `at_least` None prices everything that fits."""
        self.space, self.priced, self.lengths = space, priced, lengths
        self.wanted, self.reach, self.at_least = wanted, reach, at_least
        self.report = progress or (lambda share: None)
        self.step_bytes = space.cluster.gpu.memory / MEMORY_STEPS
        self._pricing: dict[int, Pricing] = {}
        self._stages: dict[Pipeline, Stages] = {}
        self._fastest = np.full(MEMORY_STEPS + 1, np.inf)
        self._best = np.full(wanted, np.inf)
        self._nearest: Priced | None = None
        self.points = Points([])

    def run(self) -> Found:
        """Search the space. `points` then holds all that fits, priced or not."""
        wall, cpu = time.perf_counter(), time.process_time()
        legal = self.space.legal
        self.points = points = Points(list(self._fitting()))
        self._price_what_counts(points)
        self.report(1.0)
        known = np.flatnonzero(np.isfinite(points.seconds))
        ordered = known[_order(points.seconds[known], points.bytes[known])]
        return Found(
            best=tuple(points.priced(position) for position in ordered[: self.wanted]),
            front=tuple(points.priced(position) for position in self._front(points, ordered)),
            legal=legal,
            memory_rejected=legal - len(points),
            feasible=len(points),
            priced=len(known),
            within_reach=int((points.seconds[known] <= self._best[0] * self.reach).sum()),
            nearest=None if len(points) else self._nearest,
            wall_s=time.perf_counter() - wall,
            cpu_s=time.process_time() - cpu,
        )

    def _fitting(self) -> Iterator[_Batch]:
        """What fits, with bounds."""
        done, count = 0, sum(map(len, self.space.pipelines.values()))
        for pp, pipelines in self.space.pipelines.items():
            columns = columns_of(self.lengths[0].tables, pp)
            fitting = Fitting(self.lengths[0].tables, pp, columns)
            self._pricing[pp] = Pricing(self.lengths, self.priced, pp, columns)
            for pipeline in pipelines:
                self._stages[pipeline] = stages_of(self.space.model, pipeline)
                for zero_stage in dict.fromkeys(choice.zero_stage for choice in self.space.choices):
                    mine = [choice for choice in self.space.choices if choice.zero_stage == zero_stage]
                    yield from self._fitting_of(fitting, pipeline, mine)
                done += 1
                self.report(0.7 * done / count)

    def _fitting_of(self, fitting: Fitting, pipeline: Pipeline, choices: list[Choice]) -> Iterator[_Batch]:
        """What fits of choices with one ZeRO stage under one pipeline: model states, then all of it."""
        stages, capacity = self._stages[pipeline], self.space.cluster.gpu.memory
        offered = {choice: self.space.offers(pipeline, choice) for choice in choices}
        able = np.flatnonzero(self.space.runs(pipeline) & np.any(list(offered.values()), axis=0))
        states = fitting.states_bytes(stages, choices[0].zero_stage, able)
        for alike in _alike_in_memory(choices):
            wanted = np.any([offered[choice][able] for choice in alike], axis=0)
            rows = able[wanted & (states <= capacity)]
            used = fitting.worst_bytes(stages, alike[0], rows)
            self._note_nearest(pipeline, alike[0], rows, used)
            if not len(rows):
                self._look_beyond(fitting, stages, alike[0], able[wanted], states[wanted])
            for choice in alike:
                fits = (used <= capacity) & offered[choice][rows]
                if fits.any():
                    mine = rows[fits]
                    bounds = self._pricing[pipeline.pp].bound(stages, choice, mine)
                    yield _Batch(pipeline, choice, mine.astype(np.int32), used[fits], bounds)

    def _note_nearest(self, pipeline: Pipeline, choice: Choice, rows: Array, used: Array) -> None:
        """Remember what needs least memory."""
        if not len(rows):
            return
        least = int(used.argmin())
        if self._nearest is None or used[least] < self._nearest.peak_memory_bytes:
            found = Candidate(pipeline, choice, int(rows[least]))
            self._nearest = Priced(found, float("inf"), int(used[least]))

    def _look_beyond(
        self, fitting: Fitting, stages: Stages, choice: Choice, rows: Array, states: Array
    ) -> None:
        """Among candidates whose model states alone do not fit, what needs least memory in all: of those with
        the smallest states, as many as LOOKED, that could still need less than the least so far."""
        if self._nearest is not None:
            below = states < self._nearest.peak_memory_bytes
            rows, states = rows[below], states[below]
        rows = rows[np.argsort(states, kind="stable")[:LOOKED]]
        if len(rows):
            self._note_nearest(stages.pipeline, choice, rows, fitting.worst_bytes(stages, choice, rows))

    def _price_what_counts(self, points: Points) -> None:
        """Price the lowest bounds, then all that could be among the best or within reach, then all that could
        be the fastest at its memory."""
        if self.at_least is None or len(points) <= max(self.at_least, FIRST):
            self._price(points, np.arange(len(points)))
            return
        for count in sorted({FIRST, self.at_least}):
            if count:
                lowest = np.sort(np.argpartition(points.bounds, count)[:count])
                self._price(points, lowest[~np.isfinite(points.seconds[lowest])])
            self.report(0.8)
        self._price(points, _unpriced(points, points.bounds <= self._limit))
        self.report(0.9)
        steps = self._steps(points.bytes)
        while True:
            ahead = _unpriced(points, points.bounds < self._fastest[steps])
            if not len(ahead):
                return
            order = np.lexsort((points.bounds[ahead], steps[ahead]))
            place = np.arange(len(ahead)) - np.searchsorted(steps[ahead][order], steps[ahead][order])
            self._price(points, np.sort(ahead[order[place < AHEAD]]))

    @property
    def _limit(self) -> float:
        """A bound above this is of no interest: of the best so far, and of what is within reach of them."""
        return max(float(self._best[-1]), float(self._best[0]) * self.reach)

    def _price(self, points: Points, chosen: Array) -> None:
        """Price points, those of pipelines of one shape together."""
        for batches in _of_one_shape(points.by_batch(chosen)):
            self._price_of(points, batches)

    def _price_of(self, points: Points, batches: list[tuple[_Batch, Array]]) -> None:
        """Price points of batches; keep the best times, and the fastest at each step of memory."""
        pricing = self._pricing[batches[0][0].pipeline.pp]
        wanted = [
            Wanted(self._stages[batch.pipeline], batch.choice, points.rows[positions])
            for batch, positions in batches
        ]
        positions = np.concatenate([own for _, own in batches])
        points.seconds[positions] = seconds = pricing.seconds(wanted)
        self._best = np.sort(np.concatenate([self._best, seconds]))[: self.wanted]
        np.minimum.at(self._fastest, self._steps(points.bytes[positions]), seconds)
        self._fastest = np.minimum.accumulate(self._fastest)

    def _steps(self, used: Array) -> Array:
        return np.ceil(used / self.step_bytes).astype(np.int64)

    def _front(self, points: Points, ordered: Array) -> Array:
        """Of candidates from the fastest on, those that need fewer steps of memory than all before them."""
        steps = self._steps(points.bytes[ordered])
        least = np.minimum.accumulate(np.concatenate([[MEMORY_STEPS + 1], steps]))[:-1]
        return ordered[steps < least]


def _of_one_shape(parts: Iterator[tuple[_Batch, Array]]) -> Iterator[list[tuple[_Batch, Array]]]:
    """Parts of batches whose pipelines have the same schedule and as many ranks and chunks, at most CHUNK
    candidates and one part more at a time: an order is run once for all of them."""
    open_parts: dict[tuple[str, int, int], list[tuple[_Batch, Array]]] = {}
    for batch, positions in parts:
        if not len(positions):
            continue
        pipeline = batch.pipeline
        shape = pipeline.schedule, pipeline.pp, pipeline.vpp
        open_parts.setdefault(shape, []).append((batch, positions))
        if sum(len(own) for _, own in open_parts[shape]) >= CHUNK:
            yield open_parts.pop(shape)
    yield from open_parts.values()


def _unpriced(points: Points, wanted: Array) -> Array:
    return np.flatnonzero(wanted & ~np.isfinite(points.seconds))


def _order(seconds: Array, used: Array) -> Array:
    """By time, then memory, then place; times within 10⁻¹⁰ are equal, whatever order sums were made in."""
    if not len(seconds):
        return np.zeros(0, np.int64)
    return np.lexsort((used, np.round(seconds / seconds.min() * 1e10)))


def _alike_in_memory(choices: list[Choice]) -> list[list[Choice]]:
    """Choices with one ZeRO stage, grouped by what memory depends on: neither the overlap, nor which of the
    dispatchers it is that send a token once to each rank."""
    groups: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        family = PER_RANK[0] if choice.dispatcher in PER_RANK else choice.dispatcher
        groups.setdefault((choice.recompute, family), []).append(choice)
    return list(groups.values())
