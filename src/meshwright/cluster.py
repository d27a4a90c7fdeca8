"""The machines: nodes of equal GPUs, and the link tiers between them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator, model_validator

from meshwright.efficiency_table import EfficiencyTable, read_table
from meshwright.errors import InputError
from meshwright.files import Noun, decode
from meshwright.gpus import assumed_figures, assumed_node_size, gpu_catalogue, gpu_named, is_named, machine_of
from meshwright.hardware import Efficiency, Gpu, Link
from meshwright.layout import MAX_WORLD_SIZE, divisors, nearest_to
from meshwright.units import BYTES_PER_S, SECONDS, Count

MAX_LOCAL = 4096
"""Most processes that one machine is asked to run."""

LOCAL_GPU = "cpu-process"
"""Name of a local process where a GPU's name stands."""


class Cluster(Noun):
    """Equal nodes of equal GPUs, joined by link tiers listed from the innermost out."""

    nodes: Count
    gpus_per_node: Count
    gpu: Gpu
    links: tuple[Link, ...]
    efficiency: Efficiency | None = None
    calibration: EfficiencyTable | None = None

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
        _check_calibration(self)
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


def _check_calibration(cluster: Cluster) -> None:
    if cluster.calibration is not None:
        machine = cluster.calibration.machine
        require_same_gpu("calibration", machine.gpu, machine.words, cluster.gpu.name)


def require_same_gpu(key: str, measured: str | None, words: str, gpu: str) -> None:
    """Raise InputError unless what is measured on a GPU of this driver's name, or on processors (None),
    prices a cluster's GPU. One that a file describes by itself has no driver's name to compare."""
    if gpu == LOCAL_GPU:
        return
    if measured is None:
        rule = f"processors were measured, and the cluster has {gpu}: calibrate on one of its nodes"
        raise InputError(key, words, rule, ["cluster: local"])
    if machine_of(gpu) is not None and not is_named(gpu, measured):
        rule = f"another GPU was measured than the cluster's {gpu}: calibrate on one of its nodes"
        raise InputError(key, measured, rule, [name for name in gpu_catalogue() if is_named(name, measured)])


def _read_calibration(value: object) -> object:
    return read_table(value) if isinstance(value, str) else value


def _read_gpu(value: object) -> object:
    return gpu_named(value) if isinstance(value, str) else value


CalibrationInFile = Annotated[
    EfficiencyTable,
    BeforeValidator(_read_calibration, json_schema_input_type=str | EfficiencyTable),
]
"""A table that `calibrate` wrote, by its path; a plan holds the table itself."""


class ClusterRequest(Noun):
    """The `cluster` of a deployment file: a GPU by catalogue name brings its node size and links."""

    nodes: Count
    gpus_per_node: Count | None = None
    gpu: Annotated[Gpu, BeforeValidator(_read_gpu, json_schema_input_type=str | Gpu)]
    links: tuple[Link, ...] | None = None
    efficiency: Efficiency | None = None
    calibration: CalibrationInFile | None = None

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
            assumed = assumed_node_size(self.gpu.name)
            words = f"assumed, {assumed}" if assumed else f"the {self.gpu.name} catalogue machine"
            used["cluster.gpus_per_node"] = f"{per_node}: {words}"
        if machine is not None and links is None:
            links = machine.links_for(self.nodes, per_node or machine.gpus_per_node)
            text = ", ".join(_described(link) for link in links)
            used["cluster.links"] = f"{text}: the {self.gpu.name} catalogue machine"
            for key, value, why in assumed_figures(self.gpu.name):
                used[f"cluster.{key}"] = f"{value}: assumed, {why}"
        used |= _calibration_note(self.calibration)
        fields = {"nodes": self.nodes, "gpus_per_node": per_node, "gpu": self.gpu, "links": links}
        beside = {"efficiency": self.efficiency, "calibration": self.calibration}
        return decode(Cluster, {**fields, **beside}, "cluster"), used


def _calibration_note(table: EfficiencyTable | None) -> dict[str, str]:
    if table is None:
        return {}
    words = f"prices of ops and collectives, measured on {table.date}: {table.machine.words}"
    return {"cluster.calibration": words}


def _described(link: Link) -> str:
    size = f" of {link.gpus} GPUs" if link.gpus is not None else ""
    rates = f"{BYTES_PER_S.format(link.bandwidth)} {SECONDS.format(link.latency)}"
    return f"{link.name}{size} {link.kind} {rates}"


class LocalRequest(Noun):
    """`cluster: {local: 8}`: eight processes of the machine at hand, each with its share of it."""

    local: Count
    calibration: CalibrationInFile | None = None

    @model_validator(mode="after")
    def _is_startable(self) -> LocalRequest:
        if self.local > MAX_LOCAL:
            raise InputError("local", self.local, f"at most {MAX_LOCAL:,} processes", [MAX_LOCAL])
        return self

    def resolve(self) -> tuple[Cluster, dict[str, str]]:
        """The local machine as a one-node cluster; its rates are assumed until they are calibrated."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // self.local
        table = self.calibration
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
        used |= _calibration_note(table)
        if table is not None and not table.machine.is_here:
            used["cluster.calibration"] += "; that is not this machine"
        fields = {"nodes": 1, "gpus_per_node": self.local, "gpu": cpu, "links": [link], "calibration": table}
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
