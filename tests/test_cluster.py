"""The catalogue of GPUs against data sheets, and clusters: tiers, defaults, and what is refused."""

from __future__ import annotations

import datetime
import os
import time
from typing import Annotated, Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator

from meshwright.cluster import Cluster, ClusterRequest, LocalRequest, read_cluster
from meshwright.errors import InputError
from meshwright.files import Noun, decode, json_schema, parse_yaml, to_yaml
from meshwright.gpus import assumed_figures, gpu_catalogue, gpu_named, machine_of
from meshwright.hardware import Gpu, Link
from meshwright.layout import MAX_WORLD_SIZE

# ---- the catalogue against the vendors' data sheets, typed here apart from it.
# name: label in GB, memory TB/s, dense TFLOP/s of bf16 and of fp8 (0: none), NVLink or Infinity Fabric as
# printed (GB/s, both directions), network card in Gb/s, GPUs per node, GPUs in the fast domain.
DATA_SHEETS = {
    "a100-40gb": (40, 1.555, 312, 0, 600, 200, 8, 8),
    "a100-80gb": (80, 2.039, 312, 0, 600, 200, 8, 8),
    "h100-sxm": (80, 3.35, 1979 / 2, 3958 / 2, 900, 400, 8, 8),
    "h100-96gb": (96, 2.4, (1979 + 1671) / 4, (3958 + 3342) / 4, 900, 400, 8, 8),  # between SXM and NVL
    "h800": (80, 3.35, 1979 / 2, 3958 / 2, 400, 400, 8, 8),
    "h200": (141, 4.8, 1979 / 2, 3958 / 2, 900, 400, 8, 8),
    "b200": (180, 8.0, 36_000 / 8 / 2, 72_000 / 8 / 2, 1800, 400, 8, 8),
    "b300": (270, 8.0, 36_000 / 8 / 2, 72_000 / 8 / 2, 1800, 800, 8, 8),
    "gb200": (186, 8.0, 360_000 / 72 / 2, 720_000 / 72 / 2, 1800, 400, 4, 72),
    "gb300": (279, 8.0, 360_000 / 72 / 2, 720_000 / 72 / 2, 1800, 800, 4, 72),
    "mi300x": (192, 5.3, 1307.4, 2614.9, 896, 400, 8, 8),
}


def test_the_catalogue_holds_the_data_sheets_and_the_document_s_part() -> None:
    assert set(gpu_catalogue()) == {*DATA_SHEETS, "brief-64gb"}


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_a_gpu_is_as_its_data_sheet(name: str) -> None:
    label, memory_tb_per_s, bf16, fp8, _, _, _, _ = DATA_SHEETS[name]
    gpu = gpu_named(name)
    # A label's GB lie between 10^9 and 2^30: the driver reports something in between.
    assert label * 10**9 <= gpu.memory <= label * 2**30
    assert gpu.memory_bandwidth == pytest.approx(memory_tb_per_s * 1e12, rel=1e-3)
    assert gpu.peak_flops_per_s("bf16") == pytest.approx(bf16 * 1e12, rel=1e-3)
    if fp8:
        assert gpu.peak_flops_per_s("fp8") == pytest.approx(fp8 * 1e12, rel=1e-3)
    else:
        with pytest.raises(InputError, match="has no peak for it") as caught:
            gpu.peak_flops_per_s("fp8")
        assert caught.value.nearest == tuple(gpu.peak)


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_a_machine_is_as_its_data_sheet(name: str) -> None:
    *_, both_ways_gb_per_s, card_gb_per_s, per_node, domain = DATA_SHEETS[name]
    machine = machine_of(name)
    assert machine is not None
    inner, fabric = machine.links
    assert machine.gpus_per_node == per_node
    assert (inner.gpus, fabric.gpus) == (domain, None)
    assert inner.kind == ("xgmi" if name == "mi300x" else "nvlink")
    assert inner.bandwidth == both_ways_gb_per_s * 1e9 / 2  # one direction of two
    assert fabric.bandwidth == card_gb_per_s * 1e9 / 8  # bytes of eight bits
    assert 0 < inner.latency < fabric.latency < 20e-6


def test_the_brief_s_part_is_as_the_document_states_it() -> None:
    gpu = gpu_named("brief-64gb")
    assert (gpu.memory, gpu.memory_bandwidth) == (64 * 10**9, 1.8e12)
    assert gpu.peak == {"fp16": 400e12, "bf16": 400e12}
    stated = {"memory", "memory_bandwidth", "peak.fp16"}
    figures = gpu_catalogue()["brief-64gb"].figures()
    assert {key for key, figure in figures.items() if not figure.source.startswith("assumed:")} == stated
    links = {key for key in figures if key.startswith("links.")}
    assert {key for key, _, _ in assumed_figures("brief-64gb")} == links | {"gpu.peak.bf16"}


def test_what_was_not_read_again_is_assumed() -> None:
    for name, entry in gpu_catalogue().items():
        listed = {key: reason for key, _, reason in assumed_figures(name)}
        for key, figure in entry.figures().items():
            assert "from memory" not in figure.source or figure.source.startswith("assumed:"), (name, key)
        assert not any(reason.startswith("assumed") for reason in listed.values())
    reasons = {key: reason for key, _, reason in assumed_figures("a100")}
    assert "from memory of the NVIDIA DGX A100" in reasons["links.fabric.bandwidth"]
    _, used = resolved({"nodes": 2, "gpus_per_node": 4, "gpu": "a100"})
    assert "assumed" in used["cluster.links.fabric.bandwidth"]
    assert "cluster.gpus_per_node" not in used  # the file gives it


@pytest.mark.parametrize("name", [*DATA_SHEETS, "brief-64gb"])
def test_number_types_stand_in_the_usual_ratios(name: str) -> None:
    peak = gpu_named(name).peak
    assert peak["fp16"] == peak["bf16"]
    assert 50 <= peak["bf16"] / gpu_named(name).memory_bandwidth <= 1000  # flop per byte at the ridge
    for wide, narrow in (("tf32", "bf16"), ("bf16", "fp8")):
        if wide in peak and narrow in peak:
            assert peak[narrow] == pytest.approx(2 * peak[wide], rel=2e-3)  # type: ignore[index]
    if "fp32" in peak:
        assert peak["fp32"] < peak["tf32"]
    if "fp4" in peak:
        assert 2 <= peak["fp4"] / peak["fp8"] <= 3.2


def test_related_parts_share_what_they_share() -> None:
    h100, h200, h800 = (gpu_named(name) for name in ("h100-sxm", "h200", "h800"))
    assert h200.peak == h100.peak
    assert {**h800.peak, "fp64": 0} == {**h100.peak, "fp64": 0}
    assert h800.peak["fp64"] == 1e12
    assert gpu_named("gb200").peak_flops_per_s("bf16") > gpu_named("b200").peak_flops_per_s("bf16")
    assert gpu_named("b300").peak["fp64"] < gpu_named("b200").peak["fp64"] / 10


@pytest.mark.parametrize("name", [*DATA_SHEETS, "brief-64gb"])
def test_every_figure_has_a_source_and_a_day(name: str) -> None:
    entry = gpu_catalogue()[name]
    for key, figure in entry.figures().items():
        assert len(figure.source) > 10, key
        assert figure.source == figure.source.strip(), key
        assert "assumed" not in figure.source or figure.source.startswith("assumed:"), key
        assert datetime.date(2020, 1, 1) <= datetime.date.fromisoformat(figure.date), key
        assert datetime.date.fromisoformat(figure.date) <= datetime.date.today(), key
    assert entry.note


def test_what_is_assumed_is_listed_with_the_reason() -> None:
    assumed = assumed_figures("H100")
    assert [(key, value) for key, value, _ in assumed] == [
        ("links.node.latency", "3 us"),
        ("links.fabric.latency", "8 us"),
    ]
    assert all(reason and not reason.startswith("assumed") for _, _, reason in assumed)
    assert assumed_figures("inline") == []
    for name, entry in gpu_catalogue().items():  # no vendor publishes a latency
        listed = {key for key, _, _ in assumed_figures(name)}
        assert listed >= {key for key in entry.figures() if key.endswith("latency")}


def test_names_and_aliases_lead_to_one_gpu_each() -> None:
    seen: dict[str, str] = {}
    for canonical, entry in gpu_catalogue().items():
        for name in (canonical, *entry.aliases):
            assert name == name.lower().replace("_", "-").replace(" ", "-")
            assert seen.setdefault(name, canonical) == canonical
            assert gpu_named(name).name == canonical
            assert gpu_named(name.upper().replace("-", " ")).name == canonical
            assert gpu_named(f"  {name.replace('-', '_')} ").name == canonical


@pytest.mark.parametrize(
    ("name", "near"), [("h100-smx", "h100-sxm"), ("b20", "b200"), ("MI300", "mi300x"), ("gb201", "gb200")]
)
def test_an_unknown_gpu_is_met_with_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(InputError, match="no GPU of the catalogue") as caught:
        gpu_named(name)
    assert near in caught.value.nearest


@pytest.mark.parametrize("name", ["", "tpu", "x" * 10**6, "\x1b[2J"])
def test_a_wild_name_is_met_with_names_and_at_once(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        gpu_named(name)
    assert caught.value.nearest
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert time.perf_counter() - start < 0.5


# ---- GPUs and links that no machine has

GPU: dict[str, Any] = {"memory": "64 GB", "memory_bandwidth": "1.8 TB/s", "peak": {"fp16": "400 TFLOP/s"}}
NODE: dict[str, Any] = {
    "name": "node",
    "gpus": 8,
    "kind": "nvlink",
    "bandwidth": "450 GB/s",
    "latency": "3 us",
}
FABRIC: dict[str, Any] = {"name": "fabric", "kind": "ib", "bandwidth": "50 GB/s", "latency": "8 us"}


@pytest.mark.parametrize(
    ("change", "key", "nearest"),
    [
        ({"memory": "64 TB"}, "memory", ("64 GB",)),
        ({"memory": "10.1 TB"}, "memory", ("10.1 GB",)),
        ({"memory_bandwidth": "1.8 GB/s"}, "memory_bandwidth", ("1.8 TB/s",)),
        ({"memory_bandwidth": "1.8 MB/s"}, "memory_bandwidth", ("1.8 TB/s",)),
        ({"memory_bandwidth": "1800 TB/s"}, "memory_bandwidth", ("1.8 TB/s",)),
        ({"memory_bandwidth": "51 TB/s"}, "memory_bandwidth", ("51 GB/s",)),
        ({"peak": {"fp16": "400 PFLOP/s"}}, "peak.fp16", ("400 TFLOP/s",)),
        ({"peak": {"bf16": "1 TFLOP/s", "fp4": "101 PFLOP/s"}}, "peak.fp4", ("101 TFLOP/s",)),
        ({"peak": {}}, "peak", ("{bf16: 400 TFLOP/s}",)),
        ({"peak": {"bf61": "400 TFLOP/s"}}, "peak.bf61", ("bf16",)),
        ({"peak": {"fp16": 400}}, "peak.fp16", None),
        ({"memory": 64}, "memory", ("64 GB", "64 TB", "64 Gb")),
        ({"memory": "64 GB/s"}, "memory", None),
        ({"memmory": "64 GB"}, "memmory", ("memory",)),
    ],
)
def test_a_gpu_that_cannot_be_is_refused(
    change: dict[str, Any], key: str, nearest: tuple[str, ...] | None
) -> None:
    with pytest.raises(InputError) as caught:
        decode(Gpu, {**GPU, **change})
    assert caught.value.key == key
    if nearest is not None:
        assert caught.value.nearest[: len(nearest)] == nearest


@pytest.mark.parametrize(
    ("change", "key", "nearest"),
    [
        ({"kind": "ib", "bandwidth": "400 GB/s"}, "bandwidth", ("400 Gb/s",)),
        ({"kind": "roce", "bandwidth": "800 GB/s"}, "bandwidth", ("800 Gb/s",)),
        ({"kind": "nvlink", "bandwidth": "450 TB/s"}, "bandwidth", ("450 GB/s",)),
        ({"bandwidth": "5.1 TB/s"}, "bandwidth", ("5.1 GB/s",)),
        ({"latency": "3 s"}, "latency", ("3 ms",)),
        ({"kind": "infiniband"}, "kind", None),
        ({"gpus": 0}, "gpus", (1,)),
        ({"gpus": 2.5}, "gpus", (2, 3)),
        ({"bandwidth": "450"}, "bandwidth", None),
    ],
)
def test_a_link_that_cannot_be_is_refused(
    change: dict[str, Any], key: str, nearest: tuple[str, ...] | None
) -> None:
    with pytest.raises(InputError) as caught:
        decode(Link, {**NODE, **change})
    assert caught.value.key == key
    if nearest is not None:
        assert caught.value.nearest == nearest


def test_the_bounds_themselves_are_allowed() -> None:
    largest = {"memory": "10 TB", "memory_bandwidth": "50 TB/s", "peak": {"fp4": "100 PFLOP/s"}}
    assert decode(Gpu, largest).peak_flops_per_s("fp4") == 1e17
    smallest = {"memory": "1 B", "memory_bandwidth": "5 GB/s", "peak": {"fp64": "1 FLOP/s"}}
    assert decode(Gpu, smallest).memory == 1
    assert decode(Link, {**NODE, "bandwidth": "5 TB/s", "latency": "100 ms"}).latency == 0.1
    assert decode(Link, {**FABRIC, "bandwidth": "399 GB/s"}).bandwidth == 399e9


# ---- clusters


def cluster(nodes: int, per_node: int, *links: dict[str, Any]) -> Cluster:
    fields = {"nodes": nodes, "gpus_per_node": per_node, "gpu": GPU, "links": list(links)}
    return decode(Cluster, fields, "cluster")


def tier(gpus: int | None, name: str = "tier") -> dict[str, Any]:
    return {**NODE, "gpus": gpus, "name": name}


@pytest.mark.parametrize(
    ("nodes", "per_node", "sizes"),
    [
        (64, 8, (8, None)),
        (1, 8, (8,)),
        (1, 8, (None,)),
        (1, 1, ()),
        (1, 1, (8, None)),  # a tier larger than the cluster is cut to it
        (2, 4, (72, None)),
        (18, 4, (72, None)),
        (36, 4, (72, None)),
        (20, 4, (72, None)),  # a rack and a part of one
        (64, 8, (2, 4, 8, 64, None)),  # pairs, halves, nodes, pods
        (64, 8, (8, 512)),
        (64, 8, (8, 1024)),
        (64, 8, (None,)),  # one flat network
        (2, 8, (8, 8, None)),  # two links over the same GPUs: the first serves
    ],
)
def test_tiers_that_nest_are_taken(nodes: int, per_node: int, sizes: tuple[int | None, ...]) -> None:
    built = cluster(nodes, per_node, *(tier(size, f"t{n}") for n, size in enumerate(sizes)))
    assert built.num_gpus == nodes * per_node
    assert [built.tier_size(n) for n in range(len(sizes))] == [
        min(size or built.num_gpus, built.num_gpus) for size in sizes
    ]


@pytest.mark.parametrize(
    ("nodes", "per_node", "sizes", "key", "rule", "nearest"),
    [
        (64, 8, (), "cluster.links", "at least one link tier", ()),
        (64, 8, (8,), "cluster.links[0].gpus", "must join all 512 GPUs", (512,)),
        (64, 8, (8, 256), "cluster.links[1].gpus", "must join all 512 GPUs", (512,)),
        (64, 8, (None, 8), "cluster.links[1].gpus", "innermost first", (512, 1024, 2048)),
        (64, 8, (64, 8, None), "cluster.links[1].gpus", "innermost first", (64, 128, 256)),
        (64, 8, (8, 12, None), "cluster.links[1].gpus", "a multiple of the 8 GPUs", (8, 16, 32)),
        (64, 8, (6, None), "cluster.links[0].gpus", "whole nodes of 8 GPUs", (4, 8)),
        (64, 8, (20, None), "cluster.links[0].gpus", "whole nodes of 8 GPUs", (16, 24)),
        (2**20, 8, (8, None), "cluster.nodes", "at most 1,048,576 GPUs", (2**17,)),
        (1, 2**21, (None,), "cluster.nodes", "at most 1,048,576 GPUs", (1,)),
    ],
)
def test_tiers_that_do_not_fit_are_refused(
    nodes: int, per_node: int, sizes: tuple[int | None, ...], key: str, rule: str, nearest: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=rule) as caught:
        cluster(nodes, per_node, *(tier(size, f"t{n}") for n, size in enumerate(sizes)))
    assert caught.value.key == key
    assert set(nearest) <= set(caught.value.nearest)


def test_two_tiers_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="a name of its own") as caught:
        cluster(64, 8, tier(8), tier(None))
    assert caught.value.key == "cluster.links[1].name"


RACKS = cluster(
    36, 4, tier(2, "pair"), tier(4, "tray"), tier(72, "rack"), {**FABRIC, "name": "fabric"}
)  # 144 GPUs


def _by_hand(ranks: list[int]) -> int:
    """The first size whose blocks of consecutive ranks hold all of these in one block."""
    if len(set(ranks)) == 1:
        return 0
    sizes = (2, 4, 72, 144)
    return next(n for n, size in enumerate(sizes) if len({rank // size for rank in ranks}) == 1)


@given(st.lists(st.integers(0, 143), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_the_tier_of_a_group_is_the_innermost_that_holds_it(ranks: list[int]) -> None:
    assert RACKS.tier_of(ranks) == _by_hand(ranks)


@pytest.mark.parametrize(
    ("ranks", "position"),
    [
        ([0, 1], 0), ([1, 2], 1), ([0, 3], 1), ([3, 4], 2), ([0, 71], 2), ([71, 72], 3), ([143], 0),
        ([5, 5], 0), (range(72, 144), 2), (range(0, 144, 72), 3), ((4, 7, 5), 1),
    ],
)  # fmt: skip
def test_the_tier_of_a_group_at_the_seams(ranks: Any, position: int) -> None:
    assert RACKS.tier_of(ranks) == position


@pytest.mark.parametrize("ranks", [[], [-1, 0], [143, 144], [0, 10**12]])
def test_ranks_outside_the_cluster_have_no_tier(ranks: list[int]) -> None:
    with pytest.raises(InputError, match="rank"):
        RACKS.tier_of(ranks)


def test_the_tier_of_a_million_ranks_is_found_at_once() -> None:
    big = cluster(MAX_WORLD_SIZE // 8, 8, tier(8, "node"), tier(None, "fabric"))
    ranks = list(range(MAX_WORLD_SIZE))
    start = time.perf_counter()
    assert big.tier_of(ranks) == 1
    assert time.perf_counter() - start < 0.3


def test_a_rank_lies_in_the_node_of_its_order() -> None:
    assert [RACKS.node_of(rank) for rank in (0, 3, 4, 143)] == [0, 0, 1, 35]


# ---- what stands under `cluster:`


def resolved(value: object) -> tuple[Cluster, dict[str, str]]:
    return read_cluster(value).resolve()


def test_a_catalogue_gpu_brings_its_machine_and_says_so() -> None:
    built, used = resolved({"nodes": 64, "gpu": "h100"})
    assert (built.num_gpus, built.gpu.name) == (512, "h100-sxm")
    assert [(link.name, built.tier_size(n)) for n, link in enumerate(built.links)] == [
        ("node", 8),
        ("fabric", 512),
    ]
    latencies = {"cluster.links.node.latency", "cluster.links.fabric.latency"}  # makers publish none
    assert set(used) == {"cluster.gpus_per_node", "cluster.links"} | latencies
    assert all("assumed" in used[key] for key in latencies)
    assert "450 GB/s" in used["cluster.links"]
    assert "h100-sxm catalogue machine" in used["cluster.links"]


def test_what_is_given_is_kept() -> None:
    links = [{**NODE, "bandwidth": "200 GB/s"}, FABRIC]
    efficiency = {"compute": "60%", "bandwidth": "80%"}
    given_ = {"nodes": 4, "gpus_per_node": 8, "gpu": "h100-sxm", "links": links, "efficiency": efficiency}
    built, used = resolved(given_)
    assert used == {}
    assert built.links[0].bandwidth == 200e9
    assert built.efficiency is not None
    assert (built.efficiency.compute, built.efficiency.bandwidth) == (0.6, 0.8)


@pytest.mark.parametrize(
    ("nodes", "size"),
    [(1, 4), (2, 8), (18, 72), (32, 64), (36, 72), (64, 64), (20, 40), (19, 72), (128, 64)],
)
def test_racks_that_a_cluster_does_not_fill_are_filled_evenly(nodes: int, size: int) -> None:
    built, _ = resolved({"nodes": nodes, "gpu": "gb200"})
    assert built.gpus_per_node == 4
    assert built.tier_size(0) == size
    assert built.tier_size(0) <= 72
    assert built.tier_of([0, built.num_gpus - 1]) == (0 if nodes <= 18 else 1)


def test_the_node_tier_follows_the_node() -> None:
    built, used = resolved({"nodes": 4, "gpus_per_node": 4, "gpu": "h100"})
    assert built.tier_size(0) == 4
    assert "node of 4 GPUs" in used["cluster.links"]
    assert resolved({"nodes": 4, "gpus_per_node": 16, "gpu": "h100"})[0].tier_size(0) == 8


def test_an_inline_gpu_needs_its_machine() -> None:
    with pytest.raises(InputError, match="not of the catalogue") as caught:
        resolved({"nodes": 4, "gpu": GPU})
    assert caught.value.key == "cluster.gpus_per_node"
    with pytest.raises(InputError, match="not of the catalogue") as caught:
        resolved({"nodes": 4, "gpus_per_node": 8, "gpu": GPU})
    assert caught.value.key == "cluster.links"
    built, used = resolved({"nodes": 4, "gpus_per_node": 8, "gpu": GPU, "links": [NODE, FABRIC]})
    assert (built.gpu.name, built.num_gpus, used) == ("inline", 32, {})


def test_a_wrong_tier_of_a_request_is_named_below_cluster() -> None:
    with pytest.raises(InputError, match="must join all 32 GPUs") as caught:
        resolved({"nodes": 4, "gpu": "h100", "links": [NODE]})
    assert caught.value.key == "cluster.links[0].gpus"


class File(Noun):
    cluster: Annotated[ClusterRequest | LocalRequest, BeforeValidator(read_cluster)]


@pytest.mark.parametrize(
    ("value", "key", "nearest"),
    [
        ("locale", "cluster", ("local", "{local: 8}")),
        (None, "cluster", ("local",)),
        (512, "cluster", ("local",)),
        ([{"nodes": 1}], "cluster", ("local",)),
        ({}, "cluster.nodes", ()),
        ({"local": 0}, "cluster.local", (1,)),
        ({"local": True}, "cluster.local", ()),
        ({"local": 10**9}, "cluster.local", (4096,)),
        ({"local": 4, "nodes": 2}, "cluster.nodes", ("local",)),
        ({"node": 4, "gpu": "h100"}, "cluster.node", ("nodes",)),
        ({"nodes": 4}, "cluster.gpu", ()),
        ({"nodes": 4, "gpu": "h10"}, "cluster.gpu", ("h100-sxm",)),
        ({"nodes": 4, "gpu": 3}, "cluster.gpu", ("name", "memory")),
        ({"nodes": 4, "gpu": {**GPU, "memory": "64"}}, "cluster.gpu.memory", ("64 GB",)),
        ({"nodes": 4, "gpu": {**GPU, "memory_bandwidth": "1.8 GB/s"}},
         "cluster.gpu.memory_bandwidth", ("1.8 TB/s",)),
        ({"nodes": "4", "gpu": "h100"}, "cluster.nodes", (4,)),
        ({"nodes": 4.5, "gpu": "h100"}, "cluster.nodes", (4, 5)),
        ({"nodes": 4, "gpu": "h100", "links": [{**FABRIC, "bandwidth": "400 GB/s"}]},
         "cluster.links[0].bandwidth", ("400 Gb/s",)),
        ({"nodes": 4, "gpu": "h100", "links": [{**NODE, "bandwith": "1 GB/s"}]},
         "cluster.links[0].bandwith", ("bandwidth",)),
        ({"nodes": 4, "gpu": "h100", "efficiency": {"compute": 0.6}},
         "cluster.efficiency.compute", ("60%",)),
        ({"nodes": 4, "gpu": "h100", "efficiency": {"compute": "160%"}},
         "cluster.efficiency.compute", ("60%",)),
    ],
)  # fmt: skip
def test_a_wrong_cluster_is_named_by_its_path(value: Any, key: str, nearest: tuple[object, ...]) -> None:
    with pytest.raises(InputError) as caught:
        decode(File, {"cluster": value})
    assert caught.value.key == key
    assert set(nearest) <= set(caught.value.nearest)


def test_the_local_machine_is_shared_by_its_processes() -> None:
    built, used = resolved({"local": 4})
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert built.num_gpus == 4
    assert 0.99 * physical <= 4 * built.gpu.memory <= physical
    assert built.tier_of([0, 3]) == 0
    assert all("assumed" in reason for reason in used.values())
    assert resolved("local")[0].num_gpus == (os.cpu_count() or 1)
    assert isinstance(decode(File, {"cluster": "local"}).cluster, LocalRequest)


@pytest.mark.parametrize(
    "value", [{"nodes": 32, "gpu": "gb200"}, {"nodes": 2, "gpu": "mi300x"}, {"local": 2}]
)
def test_a_resolved_cluster_is_written_and_read_back_the_same(value: object) -> None:
    built, _ = resolved(value)
    document = parse_yaml(to_yaml(built.model_dump(mode="json", exclude_none=True)))
    assert decode(Cluster, document) == built
    again, used = resolved(document)
    assert (again, used) == (built, {})


def test_the_schema_takes_a_gpu_by_name_and_inline() -> None:
    schema = json_schema(ClusterRequest)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"nodes": 4, "gpu": "h100-sxm"})
    assert validator.is_valid({"nodes": 4, "gpus_per_node": 8, "gpu": GPU, "links": [NODE, FABRIC]})
    assert not validator.is_valid({"nodes": 4, "gpu": 3})
    assert not validator.is_valid({"nodes": 4, "gpu": {**GPU, "memory": 64}})
