"""The cluster of a row: its GPU in the catalogue, and the links that its `interconnect` states."""

from __future__ import annotations

import re

from meshwright.cluster import Cluster
from meshwright.errors import InputError
from meshwright.gpus import gpu_named, machine_of
from meshwright.hardware import Link, LinkKind
from meshwright.validate.refusal import RefusedError, words_of
from meshwright.validate.rows import Row

GENERATIONS = {
    "a100": "ampere",
    "h100": "hopper",
    "h800": "hopper",
    "h200": "hopper",
    "b200": "blackwell",
    "b300": "blackwell",
    "gb200": "blackwell",
    "gb300": "blackwell",
    "mi300x": "cdna",
}
_CLASSES = {"ampere": "a100-80gb", "hopper": "h100-sxm", "blackwell": "b200"}
"""Stands for a whole generation where a source names no part."""
_BITS = {"g": 1e9, "t": 1e12}
_RATE = re.compile(
    r"(?:(?P<before>\d+)\s*x\s*)?(?:\w*?)(?P<rate>\d+(?:\.\d+)?)\s*(?P<prefix>[gt])(?P<unit>b/s|bps|byte/s)"
    r"(?:\s*x\s*(?P<after>\d+))?",
    re.IGNORECASE,
)


def catalogue_gpu(spelling: str) -> str:
    """The catalogue's name for a GPU as a source spells it. Raises RefusedError for one that it lacks."""
    if not spelling.strip():
        raise RefusedError("cluster: no GPU stated")
    text = spelling.lower()
    for candidate in (text, *text.split()[:1], re.sub(r"\s*\(.*\)", "", text)):
        try:
            return gpu_named(candidate).name
        except InputError:
            continue
    words = re.findall(r"[a-z]+\d+x?(?:-\d+gb)?", text)
    for word in (*words, *(word.split("-")[0] for word in words)):
        try:
            return gpu_named(word).name
        except InputError:
            continue
    for generation, name in _CLASSES.items():
        if generation in text:
            return name
    raise RefusedError("cluster: GPU not in the catalogue", spelling)


def generation_of(gpu_name: str) -> str:
    """The generation of a catalogue GPU; its own name for one that stands alone."""
    return GENERATIONS.get(gpu_name.split("-")[0], gpu_name)


def cluster_of(row: Row, assumed: dict[str, str]) -> Cluster:
    """The cluster of a row. Raises RefusedError when it cannot stand."""
    name = catalogue_gpu(row.gpu)
    machine = machine_of(name)
    if machine is None or row.num_gpus is None or row.num_gpus < 1:
        raise RefusedError("cluster: number of GPUs not stated", row.id)
    per_node = row.gpus_per_node
    if not per_node:
        per_node = machine.gpus_per_node
        assumed["gpus_per_node"] = f"{per_node}: the {name} catalogue machine"
    per_node = min(per_node, row.num_gpus)
    if row.num_gpus % per_node:
        raise RefusedError("cluster: GPUs that do not fill their nodes", f"{row.num_gpus} of {per_node}")
    nodes = row.num_gpus // per_node
    links = _links(row.interconnect, machine.links_for(nodes, per_node), per_node, assumed)
    try:
        return Cluster(nodes=nodes, gpus_per_node=per_node, gpu=gpu_named(name), links=links)
    except ValueError as error:
        raise RefusedError("cluster: cannot stand", words_of(error)) from None


def _links(text: str, links: tuple[Link, ...], per_node: int, assumed: dict[str, str]) -> tuple[Link, ...]:
    if not text:
        assumed["interconnect"] = "the catalogue machine's"
    network = fabric_of(text, per_node)
    if network is None:
        return links
    kind, bandwidth = network
    outer = links[-1].model_copy(
        update={"kind": kind, **({"bandwidth": bandwidth} if bandwidth else {})},
    )
    return (*links[:-1], outer)


def fabric_of(text: str, per_node: int) -> tuple[LinkKind, float | None] | None:
    """Kind of the network that an interconnect names, and its bytes per second, GPU and direction.

    None where only links within a node or rack are named. A count of cards, or `per node`, makes the rate
    that of a node, which its GPUs share.
    """
    parts = [p for p in re.split(r"[+;,]", text) if not re.search(r"nvlink|nvswitch|nvl\d|xgmi", p.lower())]
    part = " ".join(parts).strip()
    if not part:
        return None
    kind = _kind(part)
    if kind is None:
        return None
    rates = list(_RATE.finditer(part))
    if not rates:
        return kind, None
    in_bits = [_node_rate(match, part, per_node) for match in rates]
    return kind, max(in_bits) / per_node


def _node_rate(match: re.Match[str], part: str, per_node: int) -> float:
    rate = float(match["rate"]) * _BITS[match["prefix"].lower()]
    rate *= 1.0 if match["unit"][0] == "B" or match["unit"].lower().startswith("byte") else 1 / 8
    count = match["before"] or match["after"]
    if count:
        return rate * int(count)
    return rate if "per node" in part.lower() else rate * per_node


def _kind(part: str) -> LinkKind | None:
    text = part.lower()
    for word, kind in _KINDS:
        if re.search(word, text):
            return kind
    return None


_KINDS: tuple[tuple[str, LinkKind], ...] = (
    (r"\befa", "efa"),
    (r"roce", "roce"),
    (r"\bib\b|infiniband|hdr|ndr|xdr|rdma|quantum", "ib"),
    (r"ethernet|\dgbe|tcp", "ethernet"),
)
