"""Placement against an enumeration of the groups themselves."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster import Cluster
from meshwright.cost.placement import group_on
from meshwright.files import decode
from meshwright.layout import DENSE_ORDER, EXPERT_ORDER, Layout, divisors

GPU = {"memory": "80 GB", "memory_bandwidth": "2 TB/s", "peak": {"bf16": "300 TFLOP/s"}}


def cluster_of(nodes: int, per_node: int, *sizes: int) -> Cluster:
    """Tiers of these sizes, and one that joins all."""
    links = [
        {"name": f"tier{i}", "gpus": size, "kind": "nvlink", "bandwidth": "100 GB/s", "latency": "3 us"}
        for i, size in enumerate(sizes)
    ]
    links.append({"name": "fabric", "kind": "ib", "bandwidth": "50 GB/s", "latency": "8 us"})
    document = {"nodes": nodes, "gpus_per_node": per_node, "gpu": GPU, "links": links}
    return decode(Cluster, document)


CLUSTERS = [
    cluster_of(4, 8, 8),
    cluster_of(6, 8, 8),
    cluster_of(3, 4, 4),
    cluster_of(12, 4, 24),
    cluster_of(8, 4, 4, 16),
    cluster_of(4, 12, 6, 12),
    cluster_of(1, 8, 8),
]


def touched(cluster: Cluster, tier: int, ranks: list[int]) -> int:
    """Domains of a tier that hold a member."""
    return len({rank // cluster.tier_size(tier) for rank in ranks})


def layouts(world: int) -> list[Layout]:
    """Every layout of a world, experts folded in."""
    found = []
    for tp, cp, pp in product(divisors(world), repeat=3):
        if world % (tp * cp * pp):
            continue
        stage = world // pp
        found += [
            Layout(tp=tp, cp=cp, dp=world // (tp * cp * pp), pp=pp, ep=ep, etp=1) for ep in divisors(stage)
        ]
    return found


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda c: f"{c.nodes}x{c.gpus_per_node}")
def test_members_share_domains_as_the_most_scattered_group_does(cluster: Cluster) -> None:
    checked = set()
    for layout in layouts(cluster.num_gpus):
        for view, order in (("dense", (*DENSE_ORDER, "dp_cp")), ("expert", EXPERT_ORDER)):
            for axis in order:
                size, stride = layout.size(axis), layout.stride(axis, view)  # type: ignore[arg-type]
                if (size, stride) in checked:
                    continue
                checked.add((size, stride))
                groups = layout.groups(axis, view)  # type: ignore[arg-type]
                placed = group_on(cluster, size, stride)
                for tier in range(len(cluster.links)):
                    most = max(touched(cluster, tier, group) for group in groups)
                    assert placed.within[tier] == pytest.approx(size / most), (axis, layout)
                outermost = max(cluster.tier_of(group) for group in groups)
                joins = [tier for tier, within in enumerate(placed.within) if within == size]
                assert (joins[0] if size > 1 else 0) == outermost
    assert len(checked) >= 10


def test_a_group_inside_each_node_stays_inside_it() -> None:
    cluster = CLUSTERS[0]
    assert all(
        len({cluster.node_of(rank) for rank in group}) == 1 for group in Layout(tp=8, dp=4).groups("tp")
    )
    assert group_on(cluster, 8, 1).inner == 8
    assert group_on(cluster, 8, 2).inner == 4
    assert group_on(cluster, 4, 8).inner == 1


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=8),
    st.sampled_from(CLUSTERS),
)
def test_arrays_are_taken_elementwise(pairs: list[tuple[int, int]], cluster: Cluster) -> None:
    sizes, strides = (np.array(values) for values in zip(*pairs, strict=True))
    together = group_on(cluster, sizes, strides)
    for i, (size, stride) in enumerate(pairs):
        alone = group_on(cluster, size, stride)
        assert [within[i] for within in together.within] == list(alone.within)
        assert together.ranks[i] == alone.ranks
