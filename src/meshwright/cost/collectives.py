"""How long one collective takes on one group: bytes over links, and steps of latency.

NCCL's algorithms, as far as its timings show them: rings, trees over nodes, NVLink sums in the switch, and
all-to-alls whose parts for each tier run side by side. Elementwise: payloads and groups may be arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.calibration import Basis, Flow, LinkCurve, link_curve
from meshwright.cluster import Cluster
from meshwright.cost.placement import Group
from meshwright.hardware import Link
from meshwright.ir.graph import CollectiveKind
from meshwright.policy import Dispatcher

Array = Any
"""A number or a numpy array of numbers."""

ONCE_PER_DOMAIN: tuple[Dispatcher, ...] = ("deepep", "hybridep")
"""Dispatchers that send a token once over the network and copy it to the ranks of a domain there."""


@dataclass(frozen=True, slots=True)
class FlowRates:
    """One kind of traffic over one tier: seconds per byte at stated bandwidth, and what it reaches of it."""

    s_per_byte: float
    efficiency: float
    ramp_s: float
    extra: float
    start_s: float

    def seconds(self, volume_bytes: Array) -> Array:
        """Seconds for the bytes that one GPU sends over the tier."""
        ideal_s = volume_bytes * self.s_per_byte
        return ideal_s / self.efficiency + np.sqrt(self.ramp_s * ideal_s)


@dataclass(frozen=True, slots=True)
class TierRates:
    """What one link tier reaches. Latencies in seconds; `mesh_peers` is N − 1 for a full mesh of N."""

    flows: Mapping[str, FlowRates]
    hop_s: float
    peer_s: float
    mesh_peers: int | None
    curve: LinkCurve | None
    bandwidth: float


@dataclass(frozen=True, slots=True)
class LinkRates:
    """What the tiers of a cluster reach, innermost first; resolved once."""

    tiers: tuple[TierRates, ...]


@dataclass(frozen=True, slots=True)
class Fanout:
    """How a token's experts spread: `chosen` of `experts`, in `chosen_groups` of `groups` where a router
    limits them (DeepSeek-V3, arXiv:2412.19437 §2.1.2)."""

    experts: int = 256
    chosen: int = 8
    groups: int | None = None
    chosen_groups: int | None = None

    def reached(self, domains: Array) -> Array:
        """Mean number of equal domains that hold at least one chosen expert, for even routing."""
        reached = _drawn(domains, self.experts, self.chosen)
        if self.groups is None or self.chosen_groups is None:
            return reached
        return np.minimum(
            reached,
            _drawn(np.minimum(domains, self.groups), self.groups, self.chosen_groups)
            * np.maximum(domains / self.groups, 1.0),
        )


def _drawn(domains: Array, total: int, chosen: int) -> Array:
    """K·(1 − ∏ᵢ (T − T/K − i)/(T − i)) over i < chosen: domains that a draw without repetition reaches."""
    missed: Array = 1.0
    for taken in range(chosen):
        missed = missed * np.maximum(total - total / domains - taken, 0.0) / (total - taken)
    return domains * (1.0 - missed)


UNIFORM = Fanout()


def link_rates(cluster: Cluster) -> LinkRates:
    """The rates of a cluster's links. A flat efficiency of the file replaces the curves: bytes over that
    share of the bandwidth, and the stated latency once per step."""
    flat = cluster.efficiency.bandwidth if cluster.efficiency else None
    tiers = []
    for position, link in enumerate(cluster.links):
        curve = link_curve(link.kind, link.bandwidth)
        tiers.append(tier_rates(link, curve, cluster.tier_size(position), flat))
    return LinkRates(tuple(tiers))


def tier_rates(link: Link, curve: LinkCurve, size: int, flat: float | None = None) -> TierRates:
    """The rates of one link tier of `size` GPUs."""
    if flat is not None:
        one = FlowRates(1.0 / link.bandwidth, flat, 0.0, 0.0, 0.0)
        flows = {name: one for name in curve.flows if name != "nvls"}
        return TierRates(flows, link.latency, 0.0, None, None, link.bandwidth)
    return TierRates(
        flows={name: _flow_rates(flow, link) for name, flow in curve.flows.items()},
        hop_s=curve.hop * link.latency,
        peer_s=curve.peer * link.latency,
        mesh_peers=size - 1 if curve.full_mesh and size > 1 else None,
        curve=curve,
        bandwidth=link.bandwidth,
    )


def _flow_rates(flow: Flow, link: Link) -> FlowRates:
    start_s = flow.start * link.latency
    return FlowRates(1.0 / link.bandwidth, flow.efficiency, flow.ramp_s, flow.extra, start_s)


def collective_seconds(
    rates: LinkRates,
    kind: CollectiveKind,
    payload_bytes: Array,
    group: Group,
    dispatcher: Dispatcher | None = None,
    fanout: Fanout = UNIFORM,
) -> Array:
    """Seconds of one collective, 0 for a group of one. Payload as CollectiveKind says.

    `dispatcher` and `fanout` matter to all-to-alls alone: DeepEP and HybridEP, whose payload counts a token
    once per rank, send it over the network once per domain.
    """
    match kind:
        case CollectiveKind.ALL_REDUCE:
            seconds = np.minimum(_ring(rates, kind, payload_bytes, group), _tree(rates, payload_bytes, group))
        case CollectiveKind.ALL_TO_ALL:
            seconds = _exchange(rates, payload_bytes, group, dispatcher, fanout)
        case CollectiveKind.SEND_RECV:
            seconds = _send(rates, payload_bytes, group)
        case _:
            seconds = _ring(rates, kind, payload_bytes, group)
    return np.where(np.greater(group.ranks, 1), seconds, 0.0)[()]


def _levels(rates: LinkRates, group: Group) -> Iterator[tuple[TierRates, Array, Array]]:
    """Each tier with how many members one domain of the tier inside it holds, and one of its own."""
    below: Array = 1.0
    for tier, within in zip(rates.tiers, group.within, strict=True):
        yield tier, below, within
        below = within


def _spread(tier: TierRates, within: Array) -> Array:
    """Share of a tier's bandwidth that its members reach: all of it, but for a full mesh of single links."""
    return 1.0 if tier.mesh_peers is None else np.maximum(within - 1, 1) / tier.mesh_peers


def _ring(rates: LinkRates, kind: CollectiveKind, payload: Array, group: Group) -> Array:
    """Rings: all but its own n-th passes every GPU, and each domain through as many cards as it has members.

    All-gather and reduce-scatter V·(n − 1)/n, all-reduce twice; the slowest tier sets the pace. Each of the
    n − 1 steps waits for the slowest link in it: K − 1 steps leave one of K domains.
    """
    n = group.ranks
    passes = 2.0 if kind is CollectiveKind.ALL_REDUCE else 1.0
    volume_s: Array = 0.0
    latency_s: Array = 0.0
    start_s: Array = 0.0
    for tier, below, within in _levels(rates, group):
        flow, crosses = tier.flows[kind.value], within > below
        moved = crosses * (passes * payload * (n - 1 + flow.extra)) / (n * below * _spread(tier, within))
        volume_s = np.maximum(volume_s, flow.seconds(moved))
        latency_s = latency_s + (passes * tier.hop_s) * (n / below - n / within)
        start_s = np.maximum(start_s, crosses * flow.start_s)
    return volume_s + latency_s + start_s


def _tree(rates: LinkRates, payload: Array, group: Group) -> Array:
    """All-reduce in the domain first, by a ring or in the NVLink switch, and by a tree over domains.

    A tree of K domains moves 2·V·(K − 1)/K through each domain's cards, in 2·log2(K) steps.
    """
    volume_s: Array = 0.0
    latency_s: Array = 0.0
    start_s: Array = 0.0
    for position, (tier, below, within) in enumerate(_levels(rates, group)):
        crosses, domains = within > below, within / below
        flow = tier.flows["tree" if position else "all_reduce"]
        extra = 0.0 if position else flow.extra
        moved = crosses * (2.0 * payload * (domains - 1 + extra)) / (within * _spread(tier, within))
        part_s, steps = flow.seconds(moved), np.log2(domains) if position else domains - 1
        if not position and "nvls" in tier.flows:
            part_s = np.minimum(part_s, tier.flows["nvls"].seconds(crosses * payload))
        volume_s = np.maximum(volume_s, part_s)
        latency_s = latency_s + (2.0 * tier.hop_s) * steps
        start_s = np.maximum(start_s, crosses * flow.start_s)
    return volume_s + latency_s + start_s


def _exchange(
    rates: LinkRates, payload: Array, group: Group, dispatcher: Dispatcher | None, fanout: Fanout
) -> Array:
    """All-to-all: the part for peers of each tier goes over its links, side by side with the others.

    V·(g_t − g_{t−1})/n for the peers that tier t adds. Over the network, DeepEP and HybridEP send one copy
    to each domain instead of one to each rank: ranks reached over domains reached times less.
    """
    n = group.ranks
    once = dispatcher in ONCE_PER_DOMAIN
    volume_s: Array = 0.0
    latency_s: Array = 0.0
    for position, (tier, below, within) in enumerate(_levels(rates, group)):
        flow, crosses = tier.flows[str(dispatcher) if once else "all_to_all"], within > below
        moved = payload * (within - below + crosses * flow.extra) / (n * _spread(tier, within))
        if once and position:
            moved = moved * (fanout.reached(n / below) / fanout.reached(n))
        volume_s = np.maximum(volume_s, flow.seconds(moved))
        peers = within / below - 1 if once else within - below
        latency_s = latency_s + flow.start_s * crosses + tier.peer_s * peers
    return volume_s + latency_s


def _send(rates: LinkRates, payload: Array, group: Group) -> Array:
    """A send to the neighbour, over the outermost tier that any two neighbours of the group need."""
    seconds: Array = 0.0
    for tier, below, within in _levels(rates, group):
        flow = tier.flows["send_recv"]
        over_s = flow.seconds(payload / _spread(tier, 2.0)) + flow.start_s
        seconds = np.where(within > below, over_s, seconds)
    return seconds


def collective_basis(
    rates: LinkRates,
    kind: CollectiveKind,
    payload_bytes: int,
    group: Group,
    dispatcher: Dispatcher | None = None,
) -> Basis:
    """Where the price of one collective comes from, for a scalar group: the weakest of the tiers it uses.

    measured: this kind of traffic on links of this bandwidth and in groups of at most this size;
    interpolated: another bandwidth or a larger group; assumed: no measurement on this kind of link.
    """
    name = kind.value
    if kind is CollectiveKind.ALL_TO_ALL and dispatcher in ONCE_PER_DOMAIN:
        name = str(dispatcher)
    found: Basis = "measured"
    for tier, below, within in _levels(rates, group):
        if within <= below:
            continue
        if tier.curve is None or not tier.curve.flows[name].fit.points:
            return "assumed"
        flow = tier.curve.flows[name]
        if abs(tier.bandwidth / tier.curve.bandwidth - 1) > 0.02 or within > flow.ranks:
            found = "interpolated"
    return found
