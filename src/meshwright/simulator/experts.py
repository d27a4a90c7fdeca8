"""Which rank keeps which experts, so that tokens load the ranks evenly.

Each layer by itself: every rank keeps equally many experts, and the load of the fullest over the mean is what
stretches the layer. Finding the best is NP-hard (it contains partition). Here, longest processing time first
with a limit of experts per rank, then the best swap with an expert of the fullest rank until none helps; the
same swaps from the order as it stands; and the better of both, so that no layer gets worse.

How good that is, with m ranks of k experts: when no swap helps, the fullest rank holds at most
mean + (1 − 1/m)·(largest − smallest expert), so at most 2 − 1/m times `bound`. For k ≤ 2 the first pass is
the best there is (largest with smallest). For k = 3 it is within 4/3 − 1/(3m) of the best (H. Kellerer and
G. Woeginger, A tight bound for 3-partitioning, Discrete Applied Mathematics 45 (1993) 249), as without a
limit (R. L. Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17 (1969) 416).

Copies of hot experts, in slots beyond one for each: DeepSeek-V3 (arXiv:2412.19437 §3.4) copies the most
loaded experts; its published balancer (deepseek-ai/EPLB) gives each slot to the expert whose copies carry the
most. A copy carries an equal share of its expert's tokens.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshwright.errors import InputError
from meshwright.layout import divisors, nearest_divisors, nearest_to
from meshwright.units import parse_count, parse_count_or_zero
from meshwright.workload import RoutingCounts

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SLACK = 1e-12
"""By which share of the fullest rank a swap must help: below it is rounding."""


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """Where one layer's experts stand, and how evenly that loads the ranks.

    `experts_by_rank` has an expert once for each copy. `before` and `after` are the load of the fullest rank
    over the mean, with experts in order and as placed here; `bound` is what no placement gets below.
    `node_before` and `node_after` say the same of whole nodes, 1 where no nodes were named.
    """

    layer: int
    experts_by_rank: tuple[tuple[int, ...], ...]
    tokens_by_rank: tuple[float, ...]
    before: float
    after: float
    bound: float
    node_before: float
    node_after: float

    @property
    def permutation(self) -> tuple[int, ...]:
        """The expert in each slot, rank after rank."""
        return tuple(expert for experts in self.experts_by_rank for expert in experts)

    @property
    def copied(self) -> dict[int, int]:
        """The experts that stand on more than one rank, with on how many."""
        counts = Counter(self.permutation)
        return {expert: count for expert, count in sorted(counts.items()) if count > 1}


@dataclass(frozen=True, slots=True)
class Placement:
    """The placements of all layers; `before`, `after` and `bound` are means over layers."""

    layers: tuple[LayerPlacement, ...]

    @property
    def before(self) -> float:
        """Fullest rank over the mean, experts in order: what `cost.routing.fullest_rank` gives."""
        return sum(layer.before for layer in self.layers) / len(self.layers)

    @property
    def after(self) -> float:
        """Fullest rank over the mean, as placed."""
        return sum(layer.after for layer in self.layers) / len(self.layers)

    @property
    def bound(self) -> float:
        """What no placement gets below."""
        return sum(layer.bound for layer in self.layers) / len(self.layers)

    @property
    def worst(self) -> LayerPlacement:
        """The layer that stays least even."""
        return max(self.layers, key=lambda layer: layer.after)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What every layer has: experts, in groups; ranks, on nodes; slots of a rank beyond its experts."""

    num_experts: int
    groups: int
    ranks: int
    nodes: int
    extra_slots: int


def place_experts(
    counts: RoutingCounts,
    num_experts: int,
    ep: int,
    *,
    ranks_per_node: int | None = None,
    expert_groups: int | None = None,
    extra_slots: int = 0,
) -> Placement:
    """Experts over `ep` ranks, layer by layer, each rank with num_experts/ep of them; deterministic.

    `ranks_per_node`: nodes are evened first, then the ranks of each, so that the network of no node has more
    to do than it must; `expert_groups` then stay whole on a node, for routers that choose groups first.
    `extra_slots` of every rank take copies of hot experts, on ranks of the same node where nodes are named;
    they stay empty where no copy helps. No layer gets less even than in order, neither over ranks nor over
    nodes. Layers are those that the histogram counts.

    Raises InputError where experts do not divide over ranks, ranks over nodes, groups over nodes, where there
    are more slots than different experts to fill them, and for experts that do not exist.
    """
    shape = _shape(num_experts, ep, ranks_per_node, expert_groups, extra_slots)
    return Placement(
        tuple(_placed(layer, loads, shape) for layer, loads in _loads(counts, shape.num_experts))
    )


def _shape(
    num_experts: int, ep: int, ranks_per_node: int | None, expert_groups: int | None, extra_slots: int
) -> _Shape:
    experts, ranks = parse_count(num_experts, "num_experts"), parse_count(ep, "ep")
    if experts % ranks:
        raise InputError("ep", ranks, f"divides the {experts} experts", nearest_divisors(experts, ranks))
    on_node = ranks if ranks_per_node is None else parse_count(ranks_per_node, "ranks_per_node")
    if ranks % on_node:
        raise InputError("ranks_per_node", on_node, f"divides ep = {ranks}", nearest_divisors(ranks, on_node))
    nodes = ranks // on_node
    groups = experts if expert_groups is None else parse_count(expert_groups, "expert_groups")
    if experts % groups or groups % nodes:
        valid = [d for d in divisors(experts) if d % nodes == 0]
        rule = f"divides the {experts} experts, and {nodes} nodes divide it"
        raise InputError("expert_groups", groups, rule, nearest_to(groups, valid))
    extra = parse_count_or_zero(extra_slots, "extra_slots")
    room = experts // nodes - experts // ranks
    if extra > room:
        rule = f"a rank has no use for more than {experts // nodes} slots: so many experts its node has"
        raise InputError("extra_slots", extra, rule, [room])
    return _Shape(experts, groups, ranks, nodes, extra)


def _loads(counts: RoutingCounts, num_experts: int) -> list[tuple[int, Floats]]:
    """Tokens by expert of each layer, in the order of layers."""
    layers: dict[int, Floats] = {}
    for layer, expert, tokens in counts.tokens:
        if expert >= num_experts:
            raise InputError(
                "expert", expert, f"experts are numbered 0 to {num_experts - 1}", [num_experts - 1]
            )
        layers.setdefault(layer, np.zeros(num_experts))[expert] += tokens
    if not layers:
        raise InputError("tokens", [], "at least one layer with its counts")
    return sorted(layers.items())


def _placed(layer: int, loads: Floats, shape: _Shape) -> LayerPlacement:
    in_order = np.arange(shape.num_experts)
    before = _by_rank(loads, _even(in_order, shape.ranks), shape.ranks)
    ranks = _place(loads, shape, before.max())
    copies = np.bincount(np.concatenate(ranks), minlength=shape.num_experts)
    after = np.array([(loads[held] / copies[held]).sum() for held in ranks])
    mean = float(loads.sum()) / shape.ranks

    def over_nodes(tokens: Floats) -> float:
        return float(tokens.reshape(shape.nodes, -1).sum(axis=1).max() / mean * shape.nodes / shape.ranks)

    idle = not loads.any()
    return LayerPlacement(
        layer=layer,
        experts_by_rank=tuple(tuple(sorted(held.tolist())) for held in ranks),
        tokens_by_rank=tuple(after.tolist()),
        before=1.0 if idle else float(before.max() / mean),
        after=1.0 if idle else float(after.max() / mean),
        bound=1.0 if idle else _bound(loads, shape) / mean,
        node_before=1.0 if idle else over_nodes(before),
        node_after=1.0 if idle else over_nodes(after),
    )


def _place(loads: Floats, shape: _Shape, in_order: float) -> list[Ints]:
    """The experts of each rank, the fullest of which has no more than with experts in order."""
    node_of = _even(np.arange(shape.num_experts), shape.nodes)
    candidates = [node_of]
    if shape.nodes > 1:
        group_loads = loads.reshape(shape.groups, -1).sum(axis=1)
        of_groups = _pack(group_loads, np.arange(shape.groups), shape.nodes)
        candidates.insert(0, np.repeat(of_groups, shape.num_experts // shape.groups))
    for node_of in candidates:
        placed, fullest = _within_nodes(loads, node_of, shape, 0)
        if shape.extra_slots:
            copied, with_copies = _within_nodes(loads, node_of, shape, shape.extra_slots)
            placed, fullest = (copied, with_copies) if with_copies < fullest else (placed, fullest)
        if fullest <= in_order:
            return placed
    return placed


def _within_nodes(loads: Floats, node_of: Ints, shape: _Shape, extra_slots: int) -> tuple[list[Ints], float]:
    """The experts of each rank, and the load of the fullest, when each expert stays on its node."""
    on_node = shape.ranks // shape.nodes
    placed: list[Ints] = []
    fullest = 0.0
    for node in range(shape.nodes):
        members = np.flatnonzero(node_of == node)
        copies = _copies(loads[members], extra_slots * on_node, on_node)
        experts = np.repeat(members, copies)
        shares = np.repeat(loads[members] / copies, copies)
        rank_of = _pack(shares, experts, on_node)
        fullest = max(fullest, float(_by_rank(shares, rank_of, on_node).max()))
        placed += [experts[rank_of == rank] for rank in range(on_node)]
    return placed, fullest


def _copies(loads: Floats, extra: int, most: int) -> Ints:
    """Copies of each expert: every further slot to the expert whose copies carry most, up to `most` each.

    No other division of the slots has a smaller largest share.
    """
    copies = np.ones(len(loads), dtype=np.int64)
    hottest = [(-load, expert) for expert, load in enumerate(loads.tolist())] if most > 1 else []
    heapq.heapify(hottest)
    for _ in range(extra):
        _, expert = heapq.heappop(hottest)
        copies[expert] += 1
        if copies[expert] < most:
            heapq.heappush(hottest, (-loads[expert] / copies[expert], expert))
    return copies


def _pack(shares: Floats, experts: Ints, ranks: int) -> Ints:
    """The rank of each item, equally many on each, no expert twice on one; the better of two beginnings."""
    alone = len(np.unique(experts)) == len(experts)
    first = _longest_first(shares, experts, ranks)
    dealt = _even(np.arange(len(shares)), ranks) if alone else _dealt(shares, experts, ranks)
    begun = [dealt] if first is None else [dealt, first]
    swapped = [_swapped(shares, experts, rank_of, ranks) for rank_of in begun]
    return min(swapped, key=lambda rank_of: float(_by_rank(shares, rank_of, ranks).max()))


def _longest_first(shares: Floats, experts: Ints, ranks: int) -> Ints | None:
    """Largest item first, each to the emptiest rank with a slot; None where all of those hold a copy."""
    slots = len(shares) // ranks
    emptiest = [(0.0, rank) for rank in range(ranks)]
    held: list[set[int]] = [set() for _ in range(ranks)]
    rank_of = np.empty(len(shares), dtype=np.int64)
    for item in np.lexsort((experts, -shares)).tolist():
        expert, passed = int(experts[item]), []
        while emptiest and expert in held[emptiest[0][1]]:
            passed.append(heapq.heappop(emptiest))
        if not emptiest:
            return None
        load, rank = heapq.heappop(emptiest)
        rank_of[item] = rank
        held[rank].add(expert)
        if len(held[rank]) < slots:
            passed.append((load + float(shares[item]), rank))
        for entry in passed:
            heapq.heappush(emptiest, entry)
    return rank_of


def _dealt(shares: Floats, experts: Ints, ranks: int) -> Ints:
    """Largest item first, to the ranks in turn: the copies of an expert, at most one a rank, never meet."""
    rank_of = np.empty(len(shares), dtype=np.int64)
    rank_of[np.lexsort((experts, -shares))] = np.arange(len(shares)) % ranks
    return rank_of


def _swapped(shares: Floats, experts: Ints, rank_of: Ints, ranks: int) -> Ints:
    """After the best swap of an item of the fullest rank with one of another, again until none helps.

    Each swap lowers the fullest rank and leaves the other below where that was, so it ends.
    """
    rank_of = rank_of.copy()
    loads = _by_rank(shares, rank_of, ranks)
    holds = np.zeros((ranks, int(experts.max()) + 1), dtype=bool)
    holds[rank_of, experts] = True
    while True:
        full = int(loads.argmax())
        mine, theirs = np.flatnonzero(rank_of == full), np.flatnonzero(rank_of != full)
        if not len(theirs):
            return rank_of
        given = shares[mine][:, None] - shares[theirs]
        worse = np.maximum(loads[full] - given, loads[rank_of[theirs]] + given)
        worse[holds[rank_of[theirs]][:, experts[mine]].T | holds[full, experts[theirs]]] = np.inf
        at, there = np.unravel_index(int(worse.argmin()), worse.shape)
        if worse[at, there] >= loads[full] * (1 - _SLACK):
            return rank_of
        out, back = mine[at], theirs[there]
        rank_of[out], rank_of[back] = rank_of[back], full
        for rank in (full, int(rank_of[out])):
            held = rank_of == rank
            loads[rank] = shares[held].sum()
            holds[rank] = False
            holds[rank, experts[held]] = True


def _bound(loads: Floats, shape: _Shape) -> float:
    """A load that the fullest rank of no placement gets below.

    The mean. With copies also the largest share, were copies free to stand anywhere. Without, of the m·j + 1
    largest experts some rank has j + 1, and its other k − j − 1 are no smaller than the smallest there are;
    j = 0 is the largest expert with what must stand beside it.
    """
    mean = float(loads.sum() / shape.ranks)
    if shape.extra_slots:
        copies = _copies(loads, shape.extra_slots * shape.ranks, shape.ranks)
        return max(mean, float((loads / copies).max()))
    falling = np.sort(loads)[::-1]
    k = len(loads) // shape.ranks
    sums = np.concatenate([[0.0], np.cumsum(falling)])
    j = np.arange(k)
    crowded = (
        sums[j * shape.ranks + 1] - sums[j * (shape.ranks - 1)] + sums[-1] - sums[len(loads) - (k - j - 1)]
    )
    return max(mean, float(crowded.max()))


def _even(items: Ints, ranks: int) -> Ints:
    """In order, equally many on each rank."""
    return items // (len(items) // ranks)


def _by_rank(shares: Floats, rank_of: Ints, ranks: int) -> Floats:
    """What each rank has to do."""
    return np.bincount(rank_of, weights=shares, minlength=ranks).astype(np.float64)
