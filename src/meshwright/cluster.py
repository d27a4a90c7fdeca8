"""The machines: GPUs with their memory and peaks, nodes, and the link tiers between them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files as package_files
from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from meshwright.errors import InputError
from meshwright.files import Noun, decode, parse_yaml
from meshwright.layout import MAX_WORLD_SIZE, divisors, nearest_to
from meshwright.units import (
    BYTES,
    BYTES_PER_S,
    FLOPS_PER_S,
    SECONDS,
    Bytes,
    BytesPerSecond,
    Count,
    Dimension,
    FlopsPerSecond,
    Seconds,
    Share,
)

DType = Literal["fp64", "tf32", "fp32", "bf16", "fp16", "fp8", "fp4"]
LinkKind = Literal["nvlink", "xgmi", "pcie", "ib", "roce", "efa", "ethernet", "memory"]

NETWORK_KINDS: frozenset[str] = frozenset({"ib", "roce", "efa", "ethernet"})
"""Kinds of link that are a network card's: their makers give the rate in bits."""

MAX_LOCAL = 4096
LOCAL_GPU = "cpu-process"
"""Name of a local process where a GPU's name stands."""

"""Most processes that one machine is asked to run."""

# What no machine of today reaches, or falls below. The bounds catch a wrong prefix, and bits read as bytes.
_MAX_MEMORY_BYTES = 10e12
_MEMORY_BANDWIDTH_RANGE = (5e9, 50e12)
_MAX_PEAK_FLOPS_PER_S = 1e17
_MAX_LINK_BYTES_PER_S = 5e12
_MAX_NETWORK_BYTES_PER_S = 400e9  # not reached by any card: 400 and 800 stand on cards as Gb/s
_MAX_LATENCY_S = 0.1


class Gpu(Noun):
    """One accelerator. Peaks are dense (no sparsity), in FLOP/s with a multiply-add counted as two."""

    name: str = "inline"
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    peak: dict[DType, FlopsPerSecond]

    @model_validator(mode="after")
    def _is_plausible(self) -> Gpu:
        if not self.peak:
            raise InputError("peak", {}, "at least one number type with its peak", ["{bf16: 400 TFLOP/s}"])
        _within("memory", self.memory, BYTES, 0, _MAX_MEMORY_BYTES)
        _within("memory_bandwidth", self.memory_bandwidth, BYTES_PER_S, *_MEMORY_BANDWIDTH_RANGE)
        for dtype, flops_per_s in self.peak.items():
            _within(f"peak.{dtype}", flops_per_s, FLOPS_PER_S, 0, _MAX_PEAK_FLOPS_PER_S)
        return self

    def peak_flops_per_s(self, precision: str) -> float:
        """Dense peak for a number type. Raises InputError for a type that this GPU has no figure for."""
        for dtype, flops_per_s in self.peak.items():
            if dtype == precision:
                return flops_per_s
        raise InputError("workload.precision", precision, f"{self.name} has no peak for it", list(self.peak))


def _within(key: str, value: float, dimension: Dimension, low: float, high: float) -> None:
    """Refuse a figure that no machine has, and guess the prefix that was meant."""
    if low <= value <= high:
        return
    at_least = f"at least {dimension.format(low)} and " if low else ""
    factor = 1e-3 if value > high else 1e3
    guess = value * factor
    while not low <= guess <= high:
        guess *= factor
    rule = f"no machine has this: it is {at_least}at most {dimension.format(high)}; is the prefix right?"
    raise InputError(key, dimension.format(value), rule, [dimension.format(guess)])


class Link(Noun):
    """One tier of the network. `gpus` is how many it joins (None: the whole cluster); bandwidth is per GPU
    and direction."""

    name: str
    gpus: Count | None = None
    kind: LinkKind
    bandwidth: BytesPerSecond
    latency: Seconds

    @model_validator(mode="after")
    def _is_plausible(self) -> Link:
        if self.kind in NETWORK_KINDS and self.bandwidth >= _MAX_NETWORK_BYTES_PER_S:
            rule = (
                f"{self.kind} bandwidth is per GPU and direction, and no card has this many bytes: "
                "is it Gb/s (bits), or the sum over a node?"
            )
            as_bits = f"{self.bandwidth / 1e9:.4g} Gb/s"
            raise InputError("bandwidth", BYTES_PER_S.format(self.bandwidth), rule, [as_bits])
        _within("bandwidth", self.bandwidth, BYTES_PER_S, 0, _MAX_LINK_BYTES_PER_S)
        _within("latency", self.latency, SECONDS, 0, _MAX_LATENCY_S)
        return self


class Efficiency(Noun):
    """Flat shares of the peaks that are reached, as a document states them."""

    compute: Share | None = None
    bandwidth: Share | None = None


class Cluster(Noun):
    """Equal nodes of equal GPUs, joined by link tiers listed from the innermost out."""

    nodes: Count
    gpus_per_node: Count
    gpu: Gpu
    links: tuple[Link, ...]
    efficiency: Efficiency | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Cluster:
        if self.num_gpus > MAX_WORLD_SIZE:
            most = max(MAX_WORLD_SIZE // self.gpus_per_node, 1)
            raise InputError("nodes", self.nodes, f"a cluster has at most {MAX_WORLD_SIZE:,} GPUs", [most])
        names = [link.name for link in self.links]
        for position, name in enumerate(names):
            if name in names[:position]:
                raise InputError(f"links[{position}].name", name, "each tier has a name of its own")
        _check_tiers(self)
        return self

    @property
    def num_gpus(self) -> int:
        """World size that the hardware offers."""
        return self.nodes * self.gpus_per_node

    def tier_size(self, position: int) -> int:
        """GPUs joined by a tier: at most those of the cluster, all of them for a tier without `gpus`."""
        size = self.links[position].gpus
        return self.num_gpus if size is None else min(size, self.num_gpus)

    def tier_of(self, ranks: Sequence[int]) -> int:
        """Index of the innermost tier that joins all of these ranks, for ranks placed in order.

        A single rank needs no link and gives 0. Raises InputError for ranks outside the cluster.
        """
        if not ranks:
            raise InputError("ranks", ranks, "a group has at least one rank")
        first, last = min(ranks), max(ranks)
        if first < 0 or last >= self.num_gpus:
            wrong = first if first < 0 else last
            raise InputError("ranks", wrong, f"a rank of this cluster lies in 0–{self.num_gpus - 1}")
        if first == last:
            return 0
        # A tier is a run of consecutive ranks, so it joins all when it joins the first and the last.
        for position in range(len(self.links)):
            size = self.tier_size(position)
            if first // size == last // size:
                return position
        raise AssertionError("unreachable: the outermost tier joins the whole cluster")

    def node_of(self, rank: int) -> int:
        """Node that holds a rank, for ranks placed in order."""
        return rank // self.gpus_per_node


def _check_tiers(cluster: Cluster) -> None:
    """Tiers nest from the innermost out, keep nodes whole, and reach every GPU."""
    total, per_node, inner = cluster.num_gpus, cluster.gpus_per_node, 1
    for position, link in enumerate(cluster.links):
        key, size = f"links[{position}].gpus", cluster.tier_size(position)
        if size < total and size % inner:
            rule = f"tiers stand innermost first: each joins a multiple of the {inner} GPUs of the one inside"
            raise InputError(key, link.gpus, rule, [inner, 2 * inner, 4 * inner])
        if size < total and size % per_node and per_node % size:
            valid = {*divisors(per_node), *range(per_node, size + per_node, per_node)}
            rule = f"a tier joins whole nodes of {per_node} GPUs, or an equal part of one"
            raise InputError(key, link.gpus, rule, nearest_to(size, sorted(valid)))
        inner = size
    if not cluster.links and total > 1:
        raise InputError("links", [], f"{total} GPUs need at least one link tier")
    if inner < total:
        rule = f"the outermost tier must join all {total} GPUs; leave its `gpus` out"
        raise InputError(f"links[{len(cluster.links) - 1}].gpus", inner, rule, [total])


def _read_gpu(value: object) -> object:
    return gpu_named(value) if isinstance(value, str) else value


class ClusterRequest(Noun):
    """The `cluster` of a deployment file: a GPU by catalogue name brings its node size and links."""

    nodes: Count
    gpus_per_node: Count | None = None
    gpu: Annotated[Gpu, BeforeValidator(_read_gpu, json_schema_input_type=str | Gpu)]
    links: tuple[Link, ...] | None = None
    efficiency: Efficiency | None = None

    def resolve(self) -> tuple[Cluster, dict[str, str]]:
        """The cluster with catalogue defaults filled in, and which keys were filled with their reason."""
        used: dict[str, str] = {}
        machine = machine_of(self.gpu.name)
        per_node, links = self.gpus_per_node, self.links
        if machine is None and (per_node is None or links is None):
            key = "cluster.gpus_per_node" if per_node is None else "cluster.links"
            raise InputError(key, "missing", "a GPU that is not of the catalogue needs it")
        if machine is not None and per_node is None:
            per_node = machine.gpus_per_node
            used["cluster.gpus_per_node"] = f"{per_node}, the {self.gpu.name} catalogue machine"
        if machine is not None and links is None:
            links = machine.links_for(self.nodes, per_node or machine.gpus_per_node)
            text = ", ".join(_described(link) for link in links)
            used["cluster.links"] = f"{text}: the {self.gpu.name} catalogue machine"
        fields = {"nodes": self.nodes, "gpus_per_node": per_node, "gpu": self.gpu, "links": links}
        return decode(Cluster, {**fields, "efficiency": self.efficiency}, "cluster"), used


def _described(link: Link) -> str:
    size = f" of {link.gpus} GPUs" if link.gpus is not None else ""
    rates = f"{BYTES_PER_S.format(link.bandwidth)} {SECONDS.format(link.latency)}"
    return f"{link.name}{size} {link.kind} {rates}"


class LocalRequest(Noun):
    """`cluster: {local: 8}`: eight processes of the machine at hand, each with its share of it."""

    local: Count

    @model_validator(mode="after")
    def _is_startable(self) -> LocalRequest:
        if self.local > MAX_LOCAL:
            raise InputError("local", self.local, f"at most {MAX_LOCAL:,} processes", [MAX_LOCAL])
        return self

    def resolve(self) -> tuple[Cluster, dict[str, str]]:
        """The local machine as a one-node cluster; its rates are assumed until they are calibrated."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // self.local
        cpu = {
            "name": LOCAL_GPU,
            "memory": f"{memory} B",
            "memory_bandwidth": "10 GB/s",
            "peak": {"fp32": "100 GFLOP/s", "bf16": "50 GFLOP/s", "fp16": "50 GFLOP/s"},
        }
        link = {"name": "node", "kind": "memory", "bandwidth": "1 GB/s", "latency": "50 us"}
        used = {
            "cluster.gpu": f"{self.local} processes share this machine; its rates are assumed, not measured",
            "cluster.links": "1 GB/s and 50 us between processes: assumed, not measured",
        }
        fields = {"nodes": 1, "gpus_per_node": self.local, "gpu": cpu, "links": [link]}
        return decode(Cluster, fields, "cluster"), used


def read_cluster(value: object) -> ClusterRequest | LocalRequest:
    """What stands under `cluster:`: `local`, {local: N}, or nodes of GPUs. Raises InputError."""
    if isinstance(value, ClusterRequest | LocalRequest):
        return value
    if value == "local":
        return LocalRequest(local=os.cpu_count() or 1)
    if isinstance(value, Mapping):
        return decode(LocalRequest, value) if "local" in value else decode(ClusterRequest, value)
    near = ["local", "{local: 8}", "{nodes: 64, gpu: h100-sxm}"]
    raise InputError("value", value, "a cluster is `local` or a mapping", near)


class Machine(Noun):
    """What a GPU usually sits in: node size and link tiers, innermost first."""

    gpus_per_node: Count
    links: tuple[Link, ...]

    def links_for(self, nodes: int, per_node: int) -> tuple[Link, ...]:
        """The tiers for a cluster of this machine.

        A tier within a node shrinks with the node. A domain of several nodes (such as a rack of 72 GPUs)
        that the cluster does not fill is filled evenly: 128 GPUs are two domains of 64, not 72 and 56.
        """
        return tuple(self._filled(link, nodes, per_node) for link in self.links)

    def _filled(self, link: Link, nodes: int, per_node: int) -> Link:
        size = link.gpus
        if size is None:
            return link
        if size <= self.gpus_per_node:
            return link.model_copy(update={"gpus": min(size, per_node)})
        domains = -(-nodes * per_node // size)
        return link if nodes % domains else link.model_copy(update={"gpus": nodes // domains * per_node})


class Cited(Noun):
    """One figure, where it comes from and when that was read; an assumption's source begins `assumed:`."""

    value: str | int
    source: str
    date: str


class CitedLink(Noun):
    """A link tier of the catalogue."""

    name: str
    gpus: Count | None = None
    kind: LinkKind
    bandwidth: Cited
    latency: Cited


class GpuEntry(Noun):
    """A GPU of the catalogue: every figure cited."""

    aliases: tuple[str, ...] = ()
    note: str = ""
    memory: Cited
    memory_bandwidth: Cited
    peak: dict[DType, Cited]
    gpus_per_node: Cited
    links: tuple[CitedLink, ...]

    def figures(self) -> dict[str, Cited]:
        """Every figure by its key, such as `peak.bf16` and `links.node.latency`."""
        links = {
            f"links.{link.name}.{key}": figure
            for link in self.links
            for key, figure in (("bandwidth", link.bandwidth), ("latency", link.latency))
        }
        peaks = {f"peak.{dtype}": figure for dtype, figure in self.peak.items()}
        scalars = {key: getattr(self, key) for key in ("memory", "memory_bandwidth", "gpus_per_node")}
        return scalars | peaks | links


@cache
def gpu_catalogue() -> Mapping[str, GpuEntry]:
    """Every GPU of the catalogue by name, with the source and date of each figure."""
    text = package_files("meshwright").joinpath("catalog/gpus.yaml").read_text("utf-8")
    return {name: decode(GpuEntry, entry, name) for name, entry in parse_yaml(text, "gpus.yaml").items()}


def gpu_named(name: str) -> Gpu:
    """A GPU of the catalogue, by name or alias. Raises InputError with the nearest names."""
    canonical = _canonical(name)
    if canonical is None:
        names = list(gpu_catalogue())
        near = difflib.get_close_matches(_normal(name), names, n=3, cutoff=0.4) or names
        raise InputError("gpu", name, "no GPU of the catalogue has this name", near)
    entry = gpu_catalogue()[canonical]
    fields = {
        "name": canonical,
        "memory": entry.memory.value,
        "memory_bandwidth": entry.memory_bandwidth.value,
        "peak": {dtype: figure.value for dtype, figure in entry.peak.items()},
    }
    return decode(Gpu, fields, canonical)


def machine_of(name: str) -> Machine | None:
    """The machine that a catalogue GPU usually sits in; None for an inline GPU."""
    canonical = _canonical(name)
    if canonical is None:
        return None
    entry = gpu_catalogue()[canonical]
    links = [
        {**link.model_dump(), "bandwidth": link.bandwidth.value, "latency": link.latency.value}
        for link in entry.links
    ]
    return decode(Machine, {"gpus_per_node": entry.gpus_per_node.value, "links": links}, canonical)


def assumed_figures(gpu_name: str) -> list[tuple[str, str, str]]:
    """The figures of a catalogue GPU and its machine that are assumed: key, value, reason.

    Empty for a GPU that is not of the catalogue: its figures are the file's own.
    """
    canonical = _canonical(gpu_name)
    figures = gpu_catalogue()[canonical].figures() if canonical else {}
    return [
        (key, str(figure.value), figure.source.removeprefix("assumed:").strip())
        for key, figure in figures.items()
        if figure.source.startswith("assumed:")
    ]


def _normal(name: str) -> str:
    return "-".join(name[:64].lower().replace("_", " ").split())


def _canonical(name: str) -> str | None:
    wanted = _normal(name)
    for canonical, entry in gpu_catalogue().items():
        if wanted == canonical or wanted in entry.aliases:
            return canonical
    return None
