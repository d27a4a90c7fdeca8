"""The step time of many candidates of one pipeline degree at once, and a bound below it.

The same functions compose a step as for one plan (`planner/estimate.py`): block times,
`once_per_step`, `pipeline_time`, `step_ends`. Sequence lengths have weights: a step time is the mean over
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.ir.holding import Holding, holding
from meshwright.ir.step import StepFacts, communication
from meshwright.planner.estimate import Once, once_per_step, shown_sends, step_ends
from meshwright.planner.fitting import Columns, parameter_kinds
from meshwright.planner.pipeline import pipeline_time
from meshwright.planner.prices import Prices
from meshwright.planner.space import Bases, Choice
from meshwright.planner.stages import Stages
from meshwright.planner.step import StepComm, optimizer_seconds, step_comm
from meshwright.planner.tables import Tables
from meshwright.planner.times import Running, axis_groups
from meshwright.policy import ZeroStage

Array = Any
_COMM = StepComm.__slots__


@dataclass(frozen=True, slots=True)
class AtLength:
    """Tables at one sequence length, and the share of steps that have it; 0 where only memory asks."""

    tables: Tables
    share: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """Candidates to be priced that share stages and choice: bases by their positions."""

    stages: Stages
    choice: Choice
    rows: Array


class Pricing:
    """Step times of the candidates of one pipeline degree."""

    def __init__(self, lengths: Sequence[AtLength], priced: Prices, pp: int, columns: Columns) -> None:
        self.lengths, self.priced, self.pp, self.columns = lengths, priced, pp, columns
        self.space = lengths[0].tables.space
        self._sends = [at.tables.send_seconds(pp) for at in lengths]
        self._tails: dict[tuple[Any, ...], tuple[Array, Array]] = {}
        self._layouts, self._layout_of = _distinct_layouts(columns.bases)

    def seconds(self, wanted: Sequence[Wanted]) -> Array:
        """Seconds of a step, one part after the other; all parts have pipelines of one shape."""
        total = np.zeros(sum(len(one.rows) for one in wanted))
        for position, at in enumerate(self.lengths):
            if at.share:
                total += at.share * self.seconds_at(position, wanted)
        return total

    def seconds_at(self, position: int, wanted: Sequence[Wanted]) -> Array:
        """Seconds of a step at one of the sequence lengths."""
        parts = [self._phases(position, one) for one in wanted]
        phases = np.concatenate(parts, axis=-1)
        m = np.concatenate([self.columns.num_micro_batches[one.rows] for one in wanted])
        every = [self._once(one, own) for one, own in zip(wanted, parts, strict=True)]
        once = Once(*(np.hstack([getattr(own, name) for own in every]) for name in Once.__slots__))
        pipeline = wanted[0].stages.pipeline
        shape, lags = (pipeline.schedule, pipeline.pp, pipeline.vpp), self._lags(position, wanted)
        pipe = pipeline_time(*shape, m, phases, once.gather_s, lags)
        return pipe.total_s - pipe.started_s + sum(step_ends(pipe, once, self.priced))

    def _phases(self, position: int, wanted: Wanted) -> Array:
        """Seconds by phase and stage: (3, P·v, N)."""
        stages, rows = wanted.stages, wanted.rows
        phases = stages.blocks @ self.lengths[position].tables.seconds(self.pp, wanted.choice, rows)
        sent = shown_sends(self.priced, stages.pipeline.vpp) * self._sends[position][rows]
        phases[0] += stages.sends[:, :1] * sent
        phases[1] += stages.sends[:, 1:] * sent
        return phases

    def _lags(self, position: int, wanted: Sequence[Wanted]) -> Array | None:
        """For how long sends flow beside compute: (2, P·v, N)."""
        hidden = 1 - shown_sends(self.priced, wanted[0].stages.pipeline.vpp)
        if not np.any(hidden):
            return None
        sends = self._sends[position]
        flowing = [one.stages.sends.T[..., None] * (hidden * sends[one.rows]) for one in wanted]
        return np.concatenate(flowing, axis=-1)

    def _once(self, wanted: Wanted, phases: Array) -> Once:
        comm, optimizer, where = [], [], self._layout_of[wanted.rows]
        for rank in range(self.pp):
            row, updating = self._tail(wanted.stages, rank, wanted.choice.zero_stage)
            comm.append(StepComm(*(column[where] for column in row)))
            optimizer.append(updating[where])
        return once_per_step(wanted.stages.ranks, comm, optimizer, self.priced, phases)

    def bound(self, stages: Stages, choice: Choice, rows: Array) -> Array:
        """Seconds that a step cannot take less than: the fullest rank's work; and under GPipe, 1F1B and
        interleaved 1F1B with what fills and drains the pipeline, as far as it follows from sums over
        stages."""
        pipeline = stages.pipeline
        busy, edge = _bound_weights(stages)
        m = self.columns.num_micro_batches[rows]
        total = np.zeros(len(rows))
        for at, sends in zip(self.lengths, self._sends, strict=True):
            if not at.share:
                continue
            work = at.tables.work(self.pp, choice, rows)
            sent = shown_sends(self.priced, pipeline.vpp) * sends[rows]
            weighed = np.vstack([work, sent])
            by_rank = busy @ weighed
            fullest = by_rank.max(axis=0)
            least = m * fullest
            if pipeline.schedule == "GPipe":
                least = least + edge @ weighed - fullest
            elif pipeline.schedule == "1F1B":
                waits_twice = m > pipeline.pp
                least = np.maximum(least, np.where(waits_twice, m * by_rank[0] + edge @ weighed, 0.0))
            elif pipeline.schedule == "Interleaved1F1B":
                least = (edge @ weighed + m * by_rank).max(axis=0)
            total += at.share * least
        return total * (1 - 1e-9)

    def _tail(self, stages: Stages, rank: int, zero_stage: ZeroStage) -> tuple[Array, Array]:
        """A rank's communication once per step, as rows by _COMM, and its optimizer, by distinct layout."""
        params, ends = stages.params[rank], stages.ends_of(rank)
        key = (zero_stage, params.tobytes(), ends)
        if key not in self._tails:
            held = sum(
                (one.times(count) for one, count in zip(self._held, params.tolist(), strict=True) if count),
                Holding(),
            )
            self._tails[key] = self._comm(held, ends, zero_stage), self._optimizer(held, zero_stage)
        return self._tails[key]

    @cached_property
    def _held(self) -> list[Holding]:
        """What a rank holds of each kind of parameters, by distinct layout."""
        return [holding(params, self._layouts) for params in parameter_kinds(self.space.model)]

    def _comm(self, held: Holding, ends: tuple[bool, bool], zero_stage: ZeroStage) -> Array:
        found = np.zeros((len(_COMM), len(self._layouts)))
        alike = 2 * (self._layouts.tp > self.space.model.kv_heads) + self._layouts.sequence_parallel
        for which in np.unique(alike):
            chosen = np.flatnonzero(alike == which)
            comm = self._comm_of(chosen, held, ends, zero_stage)
            for row, name in enumerate(_COMM):
                found[row, chosen] = getattr(comm, name)
        return found

    def _comm_of(
        self, chosen: Array, held: Holding, ends: tuple[bool, bool], zero_stage: ZeroStage
    ) -> StepComm:
        """The communication of layouts that agree on sequence parallelism, and on replicated heads."""
        space, layouts = self.space, self._layouts.where(chosen)
        values = {name: getattr(held, name) for name in Holding.__slots__}
        mine: Any = {name: v[chosen] if isinstance(v, np.ndarray) else v for name, v in values.items()}
        facts = StepFacts(
            model=space.model,
            engine=space.engine,
            workload=space.workload,
            zero_stage=zero_stage,
            sequence_parallel=bool(layouts.sequence_parallel[0]),
            pp=self.pp,
            sizes=layouts,
        )
        groups = axis_groups(space.cluster, layouts.degrees())
        tasks = communication(facts, Holding(**mine), *ends)
        return step_comm(tasks, self.priced, groups, Running("alltoall"))

    def _optimizer(self, held: Holding, zero_stage: ZeroStage) -> Array:
        space, layouts = self.space, self._layouts
        owned: Any = held.total
        if zero_stage:
            owned = held.dense / layouts.size("dp_shard") + held.experts / layouts.size("edp_shard")
        workload, width = space.workload, space.engine.gradient_bytes.value
        updating = optimizer_seconds(
            self.priced, workload.optimizer, workload.compute_bytes, owned, held.total, width
        )
        return updating * np.ones(len(layouts))


def _distinct_layouts(bases: Bases) -> tuple[Bases, Array]:
    """Bases without their micro-batches, and which of them each base has."""
    names = ("tp", "cp", "dp", "ep", "etp", "sequence_parallel")
    columns = np.stack([getattr(bases, name).astype(np.int64) for name in names], axis=1)
    _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    return bases.where(first), inverse.reshape(-1)


def _bound_weights(stages: Stages) -> tuple[Array, Array]:
    """For kinds of block and, last, sends: what each rank works for one micro-batch, and what stands at the
    edges of the pipeline on top.

    GPipe ends no sooner than Σt + (m − 1)·max t. Under 1F1B the first rank works m·t₀ and waits for the
    later ranks, twice D₀ = Σ t_j, behind P − 1 forwards and backwards of its own. Under interleaving every
    rank works behind the first forwards of the ranks before it, and ahead of their last backwards: those of
    their first chunks, by rank.
    """
    pipeline = stages.pipeline
    by_stage = np.hstack([stages.blocks, stages.sends.sum(axis=1, keepdims=True)])
    busy = np.array([by_stage[list(own)].sum(axis=0) for own in stages.ranks])
    if pipeline.schedule == "GPipe":
        return busy, busy.sum(axis=0)
    first = by_stage[[own[0] for own in stages.ranks]]
    if pipeline.schedule == "Interleaved1F1B":
        return busy, np.cumsum(first, axis=0) - first
    return busy, 2 * first[1:].sum(axis=0) - (pipeline.pp - 1) * first[0]
