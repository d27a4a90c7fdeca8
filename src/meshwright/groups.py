"""Who speaks to whom: the groups of ranks of a layout, the links they cross, and what one rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm, prod
from typing import Any

from meshwright.cluster import Cluster
from meshwright.ir.parameters import (
    Param,
    Part,
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from meshwright.ir.schedule import stage_of
from meshwright.ir.sharding import local_shape, local_slice, zero_degree
from meshwright.layout import DENSE_ORDER, EXPERT_ORDER, Layout, View
from meshwright.plan import Plan
from meshwright.verify import layout_findings, stage_findings

AXES_OF_VIEW: dict[View, tuple[str, ...]] = {"dense": DENSE_ORDER, "expert": EXPERT_ORDER}


def group_tables(layout: Layout) -> dict[str, Any]:
    """Every group of every axis, as lists of ranks, singletons included.

    The document is `{"world_size", "dense": {tp, cp, dp, pp}, "expert": {etp, ep, edp, pp}}`; `dp` is without
    `cp`. Groups stand in order of their first rank, as Megatron's RankGenerator lists them.
    """
    tables: dict[str, Any] = {"world_size": layout.world_size}
    for view, axes in AXES_OF_VIEW.items():
        tables[view] = {axis: layout.groups(axis, view) for axis in axes}
    return tables


@dataclass(frozen=True, slots=True)
class AxisGroups:
    """All groups along one axis, without listing them.

    `num_by_tier[i]` counts the groups for which the cluster's tier `i` is the innermost that joins all their
    ranks; it is empty for groups of one rank, which need no link.
    """

    axis: str
    size: int
    stride: int
    count: int
    num_by_tier: tuple[int, ...]

    def group(self, index: int) -> range:
        """The ranks of one group, counted as `Layout.groups` orders them."""
        block, offset = divmod(index, self.stride)
        span = self.stride * self.size
        first = block * span + offset
        return range(first, first + span, self.stride)


def axis_groups(layout: Layout, cluster: Cluster, axis: str, view: View) -> AxisGroups:
    """The groups along an axis, with the link tiers they need on a cluster filled rank by rank."""
    size, stride = layout.size(axis), layout.stride(axis, view)
    by_tier: tuple[int, ...] = ()
    if size > 1:
        sizes = [cluster.tier_size(position) for position in range(len(cluster.links))]
        joined = [_num_within(layout.world_size, size, stride, tier_size) for tier_size in sizes]
        by_tier = tuple(outer - inner for inner, outer in zip([0, *joined], joined, strict=False))
    return AxisGroups(axis, size, stride, layout.world_size // size, by_tier)


def _num_within(world_size: int, size: int, stride: int, tier_size: int) -> int:
    """How many groups lie in one block of `tier_size` consecutive ranks each.

    A group from `first` on ends `stride·(size-1)` ranks later, so it fits where first mod tier_size leaves
    that room. Firsts come in runs of `stride` ranks, one run every `stride·size` ranks, and where the runs
    lie in their blocks repeats after the least common multiple of the two lengths.
    """
    room, span = tier_size - stride * (size - 1), stride * size
    if room <= 0:
        return 0

    def fitting_below(rank: int) -> int:
        return rank // tier_size * room + min(rank % tier_size, room)

    def fitting_in(num_ranks: int) -> int:
        runs = range(0, num_ranks, span)
        return sum(fitting_below(start + stride) - fitting_below(start) for start in runs)

    periods, rest = divmod(world_size, lcm(span, tier_size))
    return periods * fitting_in(lcm(span, tier_size)) + fitting_in(rest) if periods else fitting_in(rest)


@dataclass(frozen=True, slots=True)
class ChunkFacts:
    """One chunk of the model on a rank: the pipeline stage it is and the layers (from 0) it holds."""

    chunk: int
    stage: int
    layers: range
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """Attention heads of a rank, by their numbers in the whole model.

    `num_copies` is how many ranks of its tp group hold each of the key-value heads: more than one where tp
    exceeds them.
    """

    query: range
    key_value: range
    num_copies: int


@dataclass(frozen=True, slots=True)
class SliceFacts:
    """What a rank holds of a parameter that all `layers` have alike (none: it stands outside the layers).

    `local_shape` includes padding of a dim that does not divide; `ranges` are the real indices, half-open.
    `zero_ranks` is over how many ranks ZeRO divides it.
    """

    name: str
    part: Part
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    zero_ranks: int

    @property
    def count(self) -> int:
        """How many such parameters the rank has."""
        return max(1, len(self.layers))

    @property
    def local_numel(self) -> int:
        """Elements of one of them on the rank, before ZeRO."""
        return prod(self.local_shape)


@dataclass(frozen=True, slots=True)
class RankFacts:
    """Everything that a layout gives to one rank. Groups and positions are by view and axis.

    `experts` and `expert_columns` (the part of each one's feed-forward width, which etp divides) are empty on
    a rank without expert layers. `num_sequences` of the global batch pass through the rank per step, None
    where dp does not divide the batch.
    `num_elements` are its parameter elements before ZeRO, `num_zero_elements` what is left of them after ZeRO
    divides them over the data-parallel ranks.
    """

    rank: int
    node: int
    local_gpu: int
    positions: dict[View, dict[str, int]]
    groups: dict[View, dict[str, list[int]]]
    tiers: dict[View, dict[str, int]]
    chunks: tuple[ChunkFacts, ...]
    heads: HeadFacts
    experts: range
    expert_columns: range
    slices: tuple[SliceFacts, ...]
    num_sequences: int | None
    num_elements: int
    num_zero_elements: int

    def document(self) -> dict[str, Any]:
        """The facts as a JSON document; index ranges are half-open pairs."""
        chunks = [
            {"chunk": c.chunk, "stage": c.stage, "layers": list(c.layers)}
            | {"embedding": c.has_embedding, "head": c.has_head}
            for c in self.chunks
        ]
        slices = [
            {"name": s.name, "part": s.part, "layers": list(s.layers), "shape": list(s.shape)}
            | {"local_shape": list(s.local_shape), "ranges": [list(r) for r in s.ranges]}
            | {"zero_ranks": s.zero_ranks}
            for s in self.slices
        ]
        return {
            "rank": self.rank,
            "node": self.node,
            "local_gpu": self.local_gpu,
            "coordinates": self.positions,
            "groups": self.groups,
            "chunks": chunks,
            "query_heads": list(self.heads.query),
            "key_value_heads": list(self.heads.key_value),
            "key_value_head_copies": self.heads.num_copies,
            "experts": list(self.experts),
            "expert_columns": [self.expert_columns.start, self.expert_columns.stop],
            "parameters": slices,
            "num_sequences": self.num_sequences,
            "num_elements": self.num_elements,
            "num_zero_elements": self.num_zero_elements,
        }


def rank_facts(plan: Plan, rank: int) -> RankFacts:
    """What one rank of a plan holds and whom it speaks to.

    Raises InputError for a rank outside the world, and where the model cannot be divided by the layout. The
    batch, the memory and the engine are not asked.
    """
    layout, cluster = plan.layout, plan.cluster
    positions: dict[View, dict[str, int]] = {view: layout.coordinates(rank, view) for view in AXES_OF_VIEW}
    _require_divisible(plan)
    groups: dict[View, dict[str, list[int]]] = {
        view: {axis: layout.group_of(rank, axis, view) for axis in axes}
        for view, axes in AXES_OF_VIEW.items()
    }
    chunks = tuple(_chunks(plan, positions["dense"]["pp"]))
    slices = _slices(plan, chunks, rank)
    experts, expert_columns = _experts(plan, chunks, positions["expert"])
    batch = plan.workload.global_batch_size
    return RankFacts(
        rank=rank,
        node=cluster.node_of(rank),
        local_gpu=rank % cluster.gpus_per_node,
        positions=positions,
        groups=groups,
        tiers={view: {a: cluster.tier_of(g) for a, g in by_axis.items()} for view, by_axis in groups.items()},
        chunks=chunks,
        heads=_heads(plan, positions["dense"]["tp"]),
        experts=experts,
        expert_columns=expert_columns,
        slices=slices,
        num_sequences=batch // layout.dp if batch % layout.dp == 0 else None,
        num_elements=sum(s.count * s.local_numel for s in slices),
        num_zero_elements=sum(s.count * -(-s.local_numel // s.zero_ranks) for s in slices),
    )


def _require_divisible(plan: Plan) -> None:
    findings = (
        *layout_findings(plan.model, plan.layout),
        *stage_findings(plan.model, plan.layout, plan.policy),
    )
    for finding in findings:
        if finding.level == "error":
            raise finding.raised()


def _share(size: int, num_ranks: int, position: int) -> range:
    width = size // num_ranks
    return range(position * width, (position + 1) * width)


def _chunks(plan: Plan, pipeline_rank: int) -> Iterator[ChunkFacts]:
    layers = plan.policy.layers_per_stage
    for chunk in range(plan.layout.vpp):
        stage = stage_of(plan.policy.schedule, pipeline_rank, chunk, plan.layout.pp)
        first = sum(layers[:stage])
        held = range(first, first + layers[stage])
        yield ChunkFacts(chunk, stage, held, stage == 0, stage == plan.layout.num_stages - 1)


def _heads(plan: Plan, position: int) -> HeadFacts:
    model, tp = plan.model, plan.layout.tp
    kv_heads = model.num_attention_heads if model.is_mla else model.kv_heads
    copies = max(1, tp // kv_heads)
    return HeadFacts(
        query=_share(model.num_attention_heads, tp, position),
        key_value=_share(kv_heads, tp // copies, position // copies),
        num_copies=copies,
    )


def _experts(plan: Plan, chunks: tuple[ChunkFacts, ...], position: dict[str, int]) -> tuple[range, range]:
    model, layout = plan.model, plan.layout
    if not any(model.is_moe_layer(layer) for chunk in chunks for layer in chunk.layers):
        return range(0), range(0)
    columns = _share(model.moe_intermediate_size or 0, layout.etp, position["etp"])
    return _share(model.num_experts, layout.ep, position["ep"]), columns


def _slices(plan: Plan, chunks: tuple[ChunkFacts, ...], rank: int) -> tuple[SliceFacts, ...]:
    """One entry per kind of parameter: `layers.*.attention.q.weight` stands for that of every layer held."""
    held: dict[str, tuple[Param, list[int]]] = {}
    for layer, param in _held_parameters(plan, chunks):
        name = param.name if layer is None else param.name.replace(f"layers.{layer}.", "layers.*.", 1)
        layers = held.setdefault(name, (param, []))[1]
        if layer is not None:
            layers.append(layer)
    return tuple(_slice(plan.layout, name, param, layers, rank) for name, (param, layers) in held.items())


def _held_parameters(plan: Plan, chunks: tuple[ChunkFacts, ...]) -> Iterator[tuple[int | None, Param]]:
    model = plan.model
    if any(chunk.has_embedding for chunk in chunks):
        yield from ((None, param) for param in embedding_parameters(model))
    for chunk in chunks:
        for layer in chunk.layers:
            yield from ((layer, param) for param in layer_parameters(model, layer))
    if any(chunk.has_head for chunk in chunks):
        yield from ((None, param) for param in head_parameters(model))
        if model.tie_word_embeddings and not any(chunk.has_embedding for chunk in chunks):
            yield None, next(iter(embedding_parameters(model)))  # the head multiplies by a copy of it


def _slice(layout: Layout, name: str, param: Param, layers: list[int], rank: int) -> SliceFacts:
    return SliceFacts(
        name=name,
        part=param.part,
        layers=tuple(layers),
        shape=param.shape,
        local_shape=local_shape(param, layout),
        ranges=local_slice(param, layout, rank).ranges,
        zero_ranks=zero_degree(param, layout),
    )
