"""The worst-stage memory of every candidate, by arrays, with the arithmetic of `cost/rank.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.cost.parts import BlockBytes, Setting, runs_on_cpu
from meshwright.cost.rank import RankContent, total_bytes
from meshwright.ir.holding import Holding, holding
from meshwright.ir.in_flight import enough_micro_batches
from meshwright.ir.parameters import Param, embedding_parameters, head_parameters, layer_parameters
from meshwright.model import Model
from meshwright.planner.space import Bases, Choice, Pipeline
from meshwright.planner.stages import RankWeights, Stages, fullest_ranks, layer_kinds
from meshwright.planner.tables import Tables
from meshwright.policy import Dispatcher, Recompute, ScheduleName, ZeroStage

Array = Any
_SUMMED = ("dense", "experts", "dense_share", "expert_share")
_LARGEST = ("remade", "gradients", "exchanged", "weights")


def parameter_kinds(model: Model) -> list[list[Param]]:
    """Parameters of each kind: those of the layers, of the embedding, of the head, and of a tied `table`."""
    kinds = [list(layer_parameters(model, layer)) for layer in layer_kinds(model).values()]
    embedding = list(embedding_parameters(model))
    return [*kinds, embedding, list(head_parameters(model)), embedding[:1]]


@dataclass(frozen=True)
class Columns:
    """What the bases of one pipeline degree have in common for every pipeline: arrays of N.

    `params[kind]` are holdings, `sums[what, kind]` those of their sums that memory needs, `largest[kind]` the
    elements of one block of each kind.
    """

    bases: Bases
    num_micro_batches: Array
    params: list[Holding]
    sums: Array
    largest: Array
    send_bytes: Array

    @cached_property
    def dp_cp(self) -> Array:
        """Ranks over which ZeRO divides dense parameters."""
        return self.bases.size("dp_shard")

    @cached_property
    def edp(self) -> Array:
        """Ranks over which ZeRO divides experts."""
        return self.bases.size("edp_shard")


def columns_of(tables: Tables, pp: int) -> Columns:
    """The columns of a pipeline degree."""
    space, bases = tables.space, tables.space.bases[pp]
    count = len(bases)
    params = [holding(kind, bases) for kind in parameter_kinds(space.model)]
    largest = [one.total * np.ones(count) for one in params]
    sums = np.array([[getattr(one, name) * np.ones(count) for one in params] for name in _SUMMED])
    m = space.num_micro_batches(bases)
    return Columns(bases, m, params, sums, np.array(largest), tables.send_bytes(pp))


class Fitting:
    """Memory of the candidates of one pipeline degree."""

    def __init__(self, tables: Tables, pp: int, columns: Columns) -> None:
        self.tables, self.pp, self.columns = tables, pp, columns
        self.space = tables.space
        self._blocks: dict[tuple[Dispatcher, Recompute], tuple[BlockBytes, ...]] = {}
        self._merged: dict[tuple[Dispatcher, Recompute, tuple[bool, ...]], BlockBytes] = {}
        self._ranks: dict[tuple[Pipeline, int], tuple[RankWeights, ...]] = {}
        self._needed: dict[tuple[ScheduleName, int], Array] = {}
        self._holdings: dict[bytes, Array] = {}
        self._largest: dict[bytes, Array] = {}

    def setting(self, zero_stage: ZeroStage) -> Setting:
        """What memory depends on beside blocks and parameters."""
        space = self.space
        return Setting(space.engine, space.workload, zero_stage, self.pp, runs_on_cpu(space.cluster))

    def states_bytes(self, stages: Stages, zero_stage: ZeroStage, rows: Array) -> Array:
        """Bytes that the fullest rank needs at least: model states and the runtime's context."""
        nothing = BlockBytes(*[0] * len(BlockBytes.__slots__))
        most = np.zeros(len(rows))
        for params in np.unique(stages.params, axis=0):
            content = RankContent(0, (nothing,), self._held(params, rows), 0, (), 0)
            most = np.maximum(most, self._total(zero_stage, content, rows))
        return most

    def worst_bytes(self, stages: Stages, choice: Choice, rows: Array) -> Array:
        """Peak bytes of the rank that needs most, for some bases by their positions."""
        if stages.pipeline.schedule == "GPipe":  # holds all alike: as many times as much as of one
            return self._fullest(stages, choice, rows, 1, self.columns.num_micro_batches[rows])
        enough = self._enough(stages.pipeline)[rows]
        worst = np.zeros(len(rows))
        for count in np.flatnonzero(np.bincount(enough)).tolist():
            mine = np.flatnonzero(enough == count)
            worst[mine] = self._fullest(stages, choice, rows[mine], count, 1)
        return worst

    def _enough(self, pipeline: Pipeline) -> Array:
        """How many micro-batches show what each base holds at most."""
        key = (pipeline.schedule, pipeline.vpp)
        if key not in self._needed:
            distinct, where = np.unique(self.columns.num_micro_batches, return_inverse=True)
            needed = [enough_micro_batches(pipeline.schedule, self.pp, count) for count in distinct.tolist()]
            self._needed[key] = np.array(needed, np.int64)[where]
        return self._needed[key]

    def _fullest(self, stages: Stages, choice: Choice, rows: Array, enough: int, times: Array) -> Array:
        blocks = self._of(choice)
        weighed = np.array([getattr(b, name)[rows] for name in ("saved", "deferred") for b in blocks])
        worst = np.zeros(len(rows))
        for weights in self._weights(stages, enough):
            held: Any = (weights.moments @ weighed).max(axis=0) * times
            content = RankContent(
                held_bytes=held,
                blocks=(self._largest_of(choice, weights.present, rows),),
                params=self._held(weights.params, rows),
                largest_block=self._largest_block(weights.params, rows),
                stages=self._chunks(weights, choice.zero_stage, rows),
                sends_bytes=weights.sends * self.columns.send_bytes[rows],
            )
            worst = np.maximum(worst, self._total(choice.zero_stage, content, rows))
        return worst

    def _of(self, choice: Choice) -> tuple[BlockBytes, ...]:
        key = (choice.dispatcher, choice.recompute)
        if key not in self._blocks:
            self._blocks[key] = self.tables.bytes(self.pp, choice)
        return self._blocks[key]

    def _largest_of(self, choice: Choice, present: tuple[bool, ...], rows: Array) -> BlockBytes:
        """One block that needs on top of what is held as much as any that a rank has."""
        key = (choice.dispatcher, choice.recompute, present)
        if key not in self._merged:
            own = [block for block, there in zip(self._of(choice), present, strict=True) if there]
            most: Any = {name: np.max([getattr(block, name) for block in own], axis=0) for name in _LARGEST}
            self._merged[key] = BlockBytes(saved=0, logits=0, deferred=0, **most)
        merged = self._merged[key]
        return BlockBytes(0, 0, 0, *(getattr(merged, name)[rows] for name in _LARGEST))

    def _weights(self, stages: Stages, enough: int) -> tuple[RankWeights, ...]:
        key = (stages.pipeline, enough)
        if key not in self._ranks:
            self._ranks[key] = fullest_ranks(stages, enough)
        return self._ranks[key]

    def _held(self, params: Array, rows: Array) -> Holding:
        """What a rank holds of so many parameters of each kind."""
        key = params.tobytes()
        if key not in self._holdings:
            self._holdings[key] = np.array([params @ of_kinds for of_kinds in self.columns.sums])
        sums: Any = self._holdings[key][:, rows]
        return Holding(**dict(zip(_SUMMED, sums, strict=True)))

    def _largest_block(self, params: Array, rows: Array) -> Any:
        present = params > 0
        key = present.tobytes()
        if key not in self._largest:
            self._largest[key] = self.columns.largest[present].max(axis=0)
        return self._largest[key][rows]

    def _chunks(self, weights: RankWeights, zero_stage: ZeroStage, rows: Array) -> list[Holding]:
        """What each chunk holds: only ZeRO-3 asks."""
        return [self._held(chunk, rows) for chunk in weights.chunks] if zero_stage == 3 else []

    def _total(self, zero_stage: ZeroStage, content: RankContent, rows: Array) -> Array:
        columns, setting = self.columns, self.setting(zero_stage)
        m: Any = columns.num_micro_batches[rows]
        return total_bytes(setting, content, m, columns.dp_cp[rows], columns.edp[rows])
