"""Prices of collectives: against the carried measurements, against physics, and arrays against numbers."""

from __future__ import annotations

import csv
from importlib.resources import files
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.calibration import curves, link_curve
from meshwright.cluster import Cluster
from meshwright.cost.collectives import (
    UNIFORM,
    Fanout,
    collective_basis,
    collective_seconds,
    link_rates,
)
from meshwright.cost.placement import Group, group_on
from meshwright.files import decode
from meshwright.hardware import LinkKind
from meshwright.ir.experts import distinct_ranks
from meshwright.ir.graph import CollectiveKind
from meshwright.policy import Dispatcher

GPU = {"memory": "80 GB", "memory_bandwidth": "3 TB/s", "peak": {"bf16": "900 TFLOP/s"}}
GATHER, SCATTER = CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER
REDUCE, EXCHANGE = CollectiveKind.ALL_REDUCE, CollectiveKind.ALL_TO_ALL
SEND = CollectiveKind.SEND_RECV
KINDS = list(CollectiveKind)
DISPATCHERS: list[Dispatcher | None] = [None, "alltoall", "deepep", "hybridep"]
LINKS: list[tuple[LinkKind, float, LinkKind, float]] = [
    ("nvlink", 300e9, "ib", 25e9),
    ("nvlink", 450e9, "ib", 50e9),
    ("nvlink", 900e9, "efa", 50e9),
    ("nvlink", 900e9, "roce", 100e9),
    ("xgmi", 448e9, "roce", 50e9),
    ("pcie", 32e9, "ethernet", 12.5e9),
    ("memory", 1e9, "ethernet", 1e9),
]


def cluster_of(
    nodes: int,
    per_node: int,
    inner: LinkKind,
    inner_bandwidth: float,
    outer: LinkKind,
    outer_bandwidth: float,
    efficiency: dict[str, str] | None = None,
) -> Cluster:
    """Nodes of GPUs with one link inside and one between them, at the catalogue's latencies."""
    rate = "{:.0f} B/s"
    latency = "3 us" if inner in ("nvlink", "xgmi") else "8 us"
    links = [
        {
            "name": "node",
            "gpus": per_node,
            "kind": inner,
            "bandwidth": rate.format(inner_bandwidth),
            "latency": latency,
        },
        {"name": "fabric", "kind": outer, "bandwidth": rate.format(outer_bandwidth), "latency": "8 us"},
    ]
    document = {
        "nodes": nodes,
        "gpus_per_node": per_node,
        "gpu": GPU,
        "links": links,
        "efficiency": efficiency,
    }
    return decode(Cluster, document)


H100 = cluster_of(64, 8, "nvlink", 450e9, "ib", 50e9)


def measured() -> list[dict[str, str]]:
    """The carried collectives."""
    text = files("meshwright").joinpath("catalog/measured/collectives.csv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


def price_of(row: dict[str, str]) -> float:
    """The price of a measured row. A node of eight, or one domain of a rack."""
    ranks, domain = int(row["ranks"]), int(row["domain"])
    inner: Any = row["inner_kind"]
    outer: Any = row["outer_kind"] or "ib"
    between = float(row["outer_bandwidth"] or 50e9)
    per_node = max(domain, 8) if inner == "xgmi" else domain
    cluster = cluster_of(
        max(ranks // domain, 1), per_node, inner, float(row["inner_bandwidth"]), outer, between
    )
    fanout = Fanout(*(int(n) for n in row["fanout"].split("/"))) if row["fanout"] else UNIFORM
    dispatcher: Any = row["algorithm"] if row["algorithm"] in ("deepep", "hybridep") else None
    group = Group(ranks, (float(domain), float(ranks)))
    kind = CollectiveKind(row["collective"])
    return float(
        collective_seconds(link_rates(cluster), kind, float(row["bytes"]), group, dispatcher, fanout)
    )


@pytest.mark.parametrize(
    ("gpus", "collective", "algorithm", "outer", "most"),
    [
        (("a100-80gb",), "all_gather", "", "", 0.07),
        (("a100-80gb",), "reduce_scatter", "", "", 0.06),
        (("a100-80gb",), "all_to_all", "", "", 0.06),
        (("h100-sxm", "h200"), "all_gather", "", "", 0.05),
        (("h100-sxm", "h200"), "reduce_scatter", "", "", 0.05),
        (("h100-sxm", "h200"), "all_reduce", "", "", 0.06),
        (("h100-sxm", "h200"), "all_to_all", "", "", 0.11),
        (("h100-sxm", "h200"), "all_to_all", "deepep", "", 0.05),
        (("h100-sxm",), "send_recv", "", "", 0.06),
        (("b200", "b300", "gb200"), "all_gather", "", "", 0.10),
        (("b200", "b300", "gb200"), "reduce_scatter", "", "", 0.09),
        (("b200", "b300", "gb200"), "all_reduce", "", "", 0.10),
        (("b200", "b300", "gb200"), "all_to_all", "", "", 0.08),
        (("gb200",), "all_to_all", "hybridep", "", 0.25),
        (("h100-sxm",), "all_to_all", "", "ib", 0.06),
        (("h100-sxm",), "all_to_all", "hybridep", "ib", 0.15),
        (("h800",), "all_to_all", "deepep", "ib", 0.25),
        (("h100-sxm",), "send_recv", "", "ib", 0.08),
        (("h100-sxm", "b300"), "all_to_all", "", "efa", 0.10),
        (("h100-sxm", "b300"), "all_to_all", "deepep", "efa", 0.10),
        (("a100-80gb", "h100-sxm", "b200", "b300"), "all_reduce", "", "efa", 0.15),
    ],
)
def test_collectives_meet_their_measurements(
    gpus: tuple[str, ...], collective: str, algorithm: str, outer: str, most: float
) -> None:
    wanted = (collective, algorithm, outer)
    errors = [
        abs(price_of(row) / (float(row["us"]) * 1e-6) - 1)
        for row in measured()
        if row["gpu"] in gpus
        and (row["collective"], row["algorithm"], row["outer_kind"]) == wanted
        and not row["source"].startswith("vtrain")
    ]
    assert len(errors) >= 4
    assert np.median(errors) <= most


def test_an_older_table_that_nothing_was_fitted_to_is_met_at_large_sizes() -> None:
    rows = [row for row in measured() if row["source"] == "vtrain-a100" and float(row["bytes"]) >= 2**26]
    errors = [price_of(row) / (float(row["us"]) * 1e-6) - 1 for row in rows]
    assert len(errors) > 20
    assert np.median(np.abs(errors)) < 0.25


PAYLOAD = st.integers(1, 2**36)
RANKS = st.sampled_from(
    [(2, 1), (8, 1), (4, 2), (2, 8), (16, 1), (16, 8), (64, 1), (64, 8), (512, 1), (6, 1), (3, 4)]
)


def at_least(kind: CollectiveKind, payload: int, group: Group, cluster: Cluster) -> float:
    """Seconds that no algorithm beats: what each GPU, and each node through its members' cards, must send.

    NVLink's switch adds up for it: an all-reduce sends its buffer once.
    """
    n, inside = float(group.ranks), float(group.inner)
    near, far = (link.bandwidth for link in cluster.links)
    if kind is SEND:
        return payload / (far if inside < n else near)
    if kind is EXCHANGE:
        return max(payload * (inside - 1) / n / near, payload * (n - inside) / n / far)
    nodes = n / inside
    passes = 2.0 if kind is REDUCE else 1.0
    inner = payload * min(passes * (inside - 1) / inside, 1.0) / near if inside > 1 else 0.0
    return max(inner, passes * payload * (nodes - 1) / nodes / inside / far)


@given(st.sampled_from(LINKS), st.sampled_from(KINDS), RANKS, PAYLOAD)
def test_no_collective_beats_its_links(
    links: tuple[LinkKind, float, LinkKind, float], kind: CollectiveKind, place: tuple[int, int], payload: int
) -> None:
    cluster = cluster_of(64, 8, *links)
    group = group_on(cluster, *place)
    price = collective_seconds(link_rates(cluster), kind, payload, group)
    assert price >= at_least(kind, payload, group, cluster) * (1 - 1e-12)


@given(
    st.sampled_from(LINKS),
    st.sampled_from(KINDS),
    RANKS,
    PAYLOAD,
    st.integers(1, 2**30),
    st.sampled_from(DISPATCHERS),
)
def test_more_bytes_take_longer(
    links: tuple[LinkKind, float, LinkKind, float],
    kind: CollectiveKind,
    place: tuple[int, int],
    payload: int,
    more: int,
    dispatcher: Dispatcher | None,
) -> None:
    cluster = cluster_of(64, 8, *links)
    rates, group = link_rates(cluster), group_on(cluster, *place)
    one, other = (
        collective_seconds(rates, kind, size, group, dispatcher) for size in (payload, payload + more)
    )
    assert other >= one > 0


@given(st.sampled_from([GATHER, SCATTER, EXCHANGE]), PAYLOAD)
def test_more_ranks_take_longer(kind: CollectiveKind, payload: int) -> None:
    rates = link_rates(H100)
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    prices = [collective_seconds(rates, kind, payload, group_on(H100, size, 1)) for size in sizes]
    assert prices[0] == 0
    assert prices == sorted(prices)


@given(
    st.sampled_from(LINKS),
    st.sampled_from(KINDS),
    st.sampled_from(DISPATCHERS),
    st.lists(st.tuples(RANKS, PAYLOAD), min_size=1, max_size=6),
)
def test_arrays_are_priced_as_numbers_are(
    links: tuple[LinkKind, float, LinkKind, float],
    kind: CollectiveKind,
    dispatcher: Dispatcher | None,
    cases: list[tuple[tuple[int, int], int]],
) -> None:
    cluster = cluster_of(64, 8, *links)
    rates = link_rates(cluster)
    sizes, strides = (np.array([place[i] for place, _ in cases]) for i in (0, 1))
    payloads = np.array([payload for _, payload in cases])
    found = collective_seconds(rates, kind, payloads, group_on(cluster, sizes, strides), dispatcher)
    for i, ((size, stride), payload) in enumerate(cases):
        one = collective_seconds(rates, kind, payload, group_on(cluster, size, stride), dispatcher)
        assert found[i] == pytest.approx(one, rel=1e-12)
        assert isinstance(float(one), float)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_communicates_nothing(kind: CollectiveKind) -> None:
    assert collective_seconds(link_rates(H100), kind, 2**30, group_on(H100, 1, 1)) == 0.0


def test_a_node_sends_through_all_the_cards_of_its_members() -> None:
    """Eight members of a node share the network's load; one member of each node has one card."""
    rates = link_rates(H100)
    packed = collective_seconds(rates, GATHER, 2**32, group_on(H100, 64, 1))
    scattered = collective_seconds(rates, GATHER, 2**32, group_on(H100, 64, 8))
    assert 5 < scattered / packed < 9


def test_the_switch_adds_up_in_a_full_node_of_hopper_and_not_of_ampere() -> None:
    hopper = cluster_of(8, 8, "nvlink", 450e9, "ib", 50e9)
    ampere = cluster_of(8, 8, "nvlink", 300e9, "ib", 25e9)
    for cluster, beats_ring in ((hopper, True), (ampere, False)):
        group = group_on(cluster, 8, 1)
        price = collective_seconds(link_rates(cluster), REDUCE, 2**34, group)
        ring = 2 * 2**34 * 7 / 8 / cluster.links[0].bandwidth
        assert bool(price < ring) is beats_ring


def test_a_small_all_reduce_over_many_nodes_takes_a_tree() -> None:
    rates = link_rates(H100)
    group = group_on(H100, 64, 8)
    ring_latency = 2 * 63 * 0.6 * 8e-6
    assert collective_seconds(rates, REDUCE, 1024, group) < ring_latency / 3


def test_all_to_all_parts_run_side_by_side() -> None:
    """Of 64 ranks on 8 nodes, 56 of 64 parts leave the node: the network sets the pace."""
    rates, payload = link_rates(H100), 2**30
    price = collective_seconds(rates, EXCHANGE, payload, group_on(H100, 64, 1))
    network = payload * 56 / 64 / 50e9
    assert network < price < 1.25 * network


def test_a_token_crosses_the_network_once_for_each_node() -> None:
    """DeepSeek-V3: 8 of 256 experts in 4 of 8 groups of experts, each group a node."""
    rates, tokens = link_rates(H100), 4096 * 7168 * 2
    group = group_on(H100, 64, 1)
    payload = tokens * distinct_ranks(256, 8, 64)
    even = collective_seconds(rates, EXCHANGE, payload, group, "hybridep", Fanout(256, 8))
    limited = collective_seconds(rates, EXCHANGE, payload, group, "hybridep", Fanout(256, 8, 8, 4))
    plain = collective_seconds(rates, EXCHANGE, 8 * tokens, group, "alltoall")
    assert limited < even < plain
    assert limited >= tokens * 4 * 7 / 8 / 50e9
    assert limited / even == pytest.approx(4 / float(Fanout(256, 8).reached(8)), rel=0.1)


@pytest.mark.parametrize("domains", [1, 2, 8, 64, 256])
def test_fanout_counts_domains_as_the_graph_counts_ranks(domains: int) -> None:
    assert Fanout(256, 8).reached(domains) == pytest.approx(distinct_ranks(256, 8, domains))
    limited = float(Fanout(256, 8, 8, 4).reached(domains))
    assert limited <= distinct_ranks(256, 8, domains) + 1e-9
    if domains == 8:
        assert limited == pytest.approx(4.0)
    if domains == 2:
        assert limited == pytest.approx(min(2 * (1 - comb(4, 4) / comb(8, 4)), distinct_ranks(256, 8, 2)))


def test_a_full_mesh_gives_small_groups_few_links() -> None:
    cluster = cluster_of(1, 8, "xgmi", 448e9, "ib", 50e9)
    rates = link_rates(cluster)
    two = collective_seconds(rates, REDUCE, 2**34, group_on(cluster, 2, 1))
    assert two >= 2**34 / 64e9


def test_a_rack_is_one_domain() -> None:
    rack = decode(
        Cluster,
        {
            "nodes": 36,
            "gpus_per_node": 4,
            "gpu": GPU,
            "links": [
                {"name": "nvl72", "gpus": 72, "kind": "nvlink", "bandwidth": "900 GB/s", "latency": "3 us"},
                {"name": "fabric", "kind": "ib", "bandwidth": "50 GB/s", "latency": "8 us"},
            ],
        },
    )
    rates = link_rates(rack)
    inside = collective_seconds(rates, EXCHANGE, 2**28, group_on(rack, 72, 1))
    across = collective_seconds(rates, EXCHANGE, 2**28, group_on(rack, 144, 1))
    assert 2**28 * 71 / 72 / 900e9 < inside < 2**28 / 900e9 * 2
    assert across >= 2**28 / 2 / 50e9


def test_a_flat_efficiency_replaces_the_curves() -> None:
    flat = cluster_of(8, 8, "nvlink", 450e9, "ib", 50e9, {"bandwidth": "50%"})
    rates, payload = link_rates(flat), 2**34
    assert collective_seconds(rates, SEND, payload, group_on(flat, 2, 8)) == pytest.approx(payload / 25e9)
    ring = collective_seconds(rates, GATHER, payload, group_on(flat, 8, 1))
    assert ring == pytest.approx(payload * 7 / 8 / 225e9 + 7 * 3e-6)
    assert collective_basis(rates, GATHER, payload, group_on(flat, 8, 1)) == "assumed"


@pytest.mark.parametrize(
    ("kind", "dispatcher", "size", "stride", "basis"),
    [
        (GATHER, None, 8, 1, "measured"),
        (GATHER, None, 64, 8, "assumed"),
        (GATHER, None, 16, 1, "assumed"),
        (EXCHANGE, None, 64, 1, "measured"),
        (EXCHANGE, None, 512, 1, "interpolated"),
        (EXCHANGE, "hybridep", 64, 1, "measured"),
        (EXCHANGE, "hybridep", 8, 1, "measured"),
        (SEND, None, 2, 8, "measured"),
    ],
)
def test_a_price_says_what_stands_behind_it(
    kind: CollectiveKind, dispatcher: Dispatcher | None, size: int, stride: int, basis: str
) -> None:
    group = group_on(H100, size, stride)
    assert collective_basis(link_rates(H100), kind, 2**28, group, dispatcher) == basis


def test_every_kind_of_link_has_a_curve_for_every_flow() -> None:
    names = {kind.value for kind in KINDS} | {"tree", "deepep", "hybridep"}
    for kind in ("nvlink", "xgmi", "pcie", "ib", "roce", "efa", "ethernet", "memory"):
        curve = link_curve(kind, 100e9)  # type: ignore[arg-type]
        assert names <= set(curve.flows), kind
    for curve in curves().links:
        for name, flow in curve.flows.items():
            assert 0 < flow.efficiency <= 1, (curve.kind, name)
            assert flow.fit.points or flow.fit.source.startswith("assumed:"), (curve.kind, name)
