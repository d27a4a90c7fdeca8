"""GPUs and networks as sources spell them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.validate.run_rows import row_of

from meshwright.validate.clusters import catalogue_gpu, cluster_of, fabric_of, generation_of
from meshwright.validate.refusal import RefusedError


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("H100", "h100-sxm"),
        ("H100-80GB", "h100-sxm"),
        ("H100 SXM5 80GB", "h100-sxm"),
        ("NVIDIA H100", "h100-sxm"),
        ("H100-96GB HBM2e 500W", "h100-96gb"),
        ("H800", "h800"),
        ("H200", "h200"),
        ("A100", "a100-80gb"),
        ("A100-40GB", "a100-40gb"),
        ("A100-80GB (SXM)", "a100-80gb"),
        ('A100-class "Ampere"', "a100-80gb"),
        ("Ampere", "a100-80gb"),
        ("Blackwell", "b200"),
        ("GB200", "gb200"),
        ("GB300 NVL72", "gb300"),
        ("B300", "b300"),
        ("MI300X", "mi300x"),
        ("AMD MI300X", "mi300x"),
    ],
)
def test_a_spelling_is_a_gpu_of_the_catalogue(spelling: str, name: str) -> None:
    assert catalogue_gpu(spelling) == name


@pytest.mark.parametrize("spelling", ["MI355X", "TPU v5p", "", "Gaudi 3", "42", "-"])
def test_a_gpu_that_the_catalogue_lacks_is_refused(spelling: str) -> None:
    with pytest.raises(RefusedError, match="cluster: "):
        catalogue_gpu(spelling)


@given(text=st.text(max_size=60))
def test_any_spelling_is_a_gpu_or_refused(text: str) -> None:
    try:
        assert generation_of(catalogue_gpu(text))
    except RefusedError as refused:
        reason = refused.reason
    else:
        reason = "cluster: "
    assert reason.startswith("cluster: ")


@pytest.mark.parametrize(
    ("text", "per_node", "expected"),
    [
        ("", 8, None),
        ("NVL72 NVLink domain", 4, None),
        ("NVLink5/NVSwitch single node", 8, None),
        ("NVLink; 4xHDR200 (800Gb/s) per node", 8, ("ib", 12.5e9)),
        ("NVLink 450GB/s uni + 400Gb/s IB (Eos)", 8, ("ib", 50e9)),
        ("NVLink + EFA 16x400Gb/s per node", 8, ("efa", 100e9)),
        ("NVLink + EFA 32 EFA ~3.2Tb/s per node", 8, ("efa", 50e9)),
        ("NVLink + 400Gb/s RDMA per GPU", 8, ("ib", 50e9)),
        ("200Gb/s x8 RoCE/IB-class CLOS", 8, ("roce", 25e9)),
        ("NVLink3 600GB/s; 8x200Gb/s HDR IB (Selene)", 8, ("ib", 25e9)),
        ("NVLink + 8x50GB/s IB", 8, ("ib", 50e9)),
        ("NVLink(400GB/s) + 8x400Gb/s IB", 8, ("ib", 50e9)),
        ("NVLink + 400Gb/s RoCE", 8, ("roce", 50e9)),
        ("100 Gbps Ethernet per node", 4, ("ethernet", 3.125e9)),
        ("NVLink + InfiniBand", 8, ("ib", None)),
        ("NVLink + something else", 8, None),
    ],
)
def test_a_network_is_bytes_per_gpu_and_direction(
    text: str, per_node: int, expected: tuple[str, float | None] | None
) -> None:
    assert fabric_of(text, per_node) == expected


@given(text=st.text(max_size=80), per_node=st.integers(1, 16))
def test_any_network_is_read_or_left_to_the_catalogue(text: str, per_node: int) -> None:
    found = fabric_of(text, per_node)
    assert found is None or found[1] is None or found[1] > 0


def test_the_catalogue_s_machine_stands_behind_what_a_row_leaves_open() -> None:
    assumed: dict[str, str] = {}
    cluster = cluster_of(row_of(num_gpus=32, gpus_per_node=None), assumed)
    assert (cluster.nodes, cluster.gpus_per_node) == (4, 8)
    assert {"gpus_per_node", "interconnect"} <= assumed.keys()
    assert [link.kind for link in cluster.links] == ["nvlink", "ib"]


def test_a_stated_network_replaces_the_outer_tier() -> None:
    text = "NVLink; 4xHDR200 (800Gb/s) per node"
    cluster = cluster_of(row_of(gpu="A100", num_gpus=64, interconnect=text), {})
    assert [(link.kind, link.bandwidth) for link in cluster.links] == [("nvlink", 300e9), ("ib", 12.5e9)]


def test_a_rack_is_a_domain_of_72() -> None:
    cluster = cluster_of(row_of(gpu="GB200", num_gpus=256, gpus_per_node=4), {})
    assert cluster.tier_size(0) == 64  # 256 GPUs fill four racks evenly


def test_a_part_of_a_node_is_a_small_node() -> None:
    cluster = cluster_of(row_of(num_gpus=4, gpus_per_node=8), {})
    assert (cluster.nodes, cluster.gpus_per_node) == (1, 4)


@pytest.mark.parametrize("given_", [{"num_gpus": None}, {"num_gpus": 0}, {"num_gpus": 12}])
def test_gpus_that_make_no_cluster_are_refused(given_: dict[str, int | None]) -> None:
    with pytest.raises(RefusedError, match="cluster: "):
        cluster_of(row_of(**given_), {})
