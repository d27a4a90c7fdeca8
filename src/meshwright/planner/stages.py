"""What each stage and rank of a pipeline holds, counted by kind of block, so that arrays can weigh it.

Kinds of block: the kinds of layer in order of their first layer, then `embedding` and `head`. Kinds of
parameters: the same, and `table`, the copy of a tied embedding that stands with the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from meshwright.ir.in_flight import fullest_moments
from meshwright.ir.schedule import rank_of, stage_of
from meshwright.model import Model
from meshwright.planner.space import Pipeline

Kind = tuple[bool, bool] | str
ENDS: tuple[str, str] = ("embedding", "head")


def layer_kinds(model: Model) -> dict[tuple[bool, bool], int]:
    """The kinds of layer of a model, each with its first layer."""
    kinds: dict[tuple[bool, bool], int] = {}
    for layer in range(model.num_hidden_layers):
        kinds.setdefault(model.layer_kind(layer), layer)
    return kinds


def block_kinds(model: Model) -> tuple[Kind, ...]:
    """The kinds of block of a model."""
    return (*layer_kinds(model), *ENDS)


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline.

    `blocks[stage, kind]` counts blocks; `sends[stage]` says whether its activation and its gradient leave the
    rank; `ranks[rank]` lists stages by chunk; `params[rank, kind]` counts distinct parameters, the last
    column those of the `table`; `tied` says that there is one.
    """

    pipeline: Pipeline
    tied: bool
    blocks: np.ndarray
    sends: np.ndarray
    ranks: tuple[tuple[int, ...], ...]
    params: np.ndarray

    def ends_of(self, rank: int) -> tuple[bool, bool]:
        """Whether a rank holds the embedding, and the head."""
        own = self.blocks[list(self.ranks[rank])].sum(axis=0)
        return bool(own[-2]), bool(own[-1])

    def stage_params(self, rank: int) -> np.ndarray:
        """Parameters by chunk and kind, of each chunk of a rank alone."""
        own = self.blocks[list(self.ranks[rank])].astype(float)
        table = self.tied * own[:, -1:] * (own[:, -2:-1] == 0)
        return np.hstack([own, table])


def stages_of(model: Model, pipeline: Pipeline) -> Stages:
    """The stages of a model under a pipeline, as `ir/program.py` lays them out."""
    kinds, schedule, pp = list(layer_kinds(model)), pipeline.schedule, pipeline.pp
    count = pp * pipeline.vpp
    blocks = np.zeros((count, len(kinds) + 2))
    first = 0
    for stage, number in enumerate(pipeline.layers_per_stage):
        for layer in range(first, first + number):
            blocks[stage, kinds.index(model.layer_kind(layer))] += 1
        first += number
    blocks[0, -2] = blocks[-1, -1] = 1
    ranks = tuple(
        tuple(stage_of(schedule, rank, chunk, pp) for chunk in range(pipeline.vpp)) for rank in range(pp)
    )
    home = [rank_of(schedule, stage, pp) for stage in range(count)]
    sends = np.zeros((count, 2))
    for stage in range(count - 1):
        sends[stage, 0] = sends[stage + 1, 1] = home[stage] != home[stage + 1]
    params = np.array([[*blocks[list(own)].sum(axis=0), 0] for own in ranks])
    tied = model.tie_word_embeddings and count > 1
    params[:, -1] = tied * (params[:, -2] > 0) * (params[:, -3] == 0)
    return Stages(pipeline, tied, blocks, sends, ranks, params)


@dataclass(frozen=True)
class RankWeights:
    """What the memory of one rank is a maximum and a sum of, by kind.

    `moments[moment, kind]` counts micro-batches held whole, then (second half) those that wait for a weight
    gradient; `present` says which kinds of block there are; `chunks[chunk, kind]` counts each chunk's
    parameters.
    """

    rank: int
    moments: np.ndarray
    params: np.ndarray
    present: tuple[bool, ...]
    sends: float
    chunks: np.ndarray

    def covers(self, other: RankWeights) -> bool:
        """Whether this rank needs at least as much memory as another, whatever the kinds weigh."""
        return (
            bool(np.all(self.params >= other.params))
            and all(mine or not theirs for mine, theirs in zip(self.present, other.present, strict=True))
            and self.sends >= other.sends
            and bool(np.all(self.chunks >= other.chunks))
            and all(bool(np.any(np.all(self.moments >= row, axis=1))) for row in other.moments)
        )


def fullest_ranks(stages: Stages, num_micro_batches: int) -> tuple[RankWeights, ...]:
    """The ranks that can need most memory; under GPipe for one micro-batch, as it holds all of them alike."""
    kept: list[RankWeights] = []
    for weights in _rank_weights(stages, num_micro_batches):
        if not any(known.covers(weights) for known in kept):
            kept = [known for known in kept if not weights.covers(known)]
            kept.append(weights)
    return tuple(kept)


def _rank_weights(stages: Stages, num_micro_batches: int) -> Iterator[RankWeights]:
    pipeline = stages.pipeline
    for rank, own in enumerate(stages.ranks):
        blocks = stages.blocks[list(own)]
        moments = fullest_moments(pipeline.schedule, pipeline.pp, pipeline.vpp, num_micro_batches, rank)
        held = np.array([moment[0] for moment in moments], float)
        waiting = np.array([moment[1] for moment in moments], float)
        yield RankWeights(
            rank=rank,
            moments=_largest_rows(np.hstack([held @ blocks, waiting @ blocks])),
            params=stages.params[rank],
            present=tuple((blocks.sum(axis=0) > 0).tolist()),
            sends=float(stages.sends[list(own)].sum()),
            chunks=stages.stage_params(rank),
        )


def _largest_rows(rows: np.ndarray) -> np.ndarray:
    """The rows that no other row reaches in every column."""
    rows = np.unique(rows, axis=0)
    kept: list[np.ndarray] = []
    for row in rows[np.argsort(-rows.sum(axis=1), kind="stable")]:
        if not any(np.all(known >= row) for known in kept):
            kept.append(row)
    return np.array(kept)
