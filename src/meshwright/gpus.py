"""The GPU catalogue: what each GPU is, what machine it usually sits in, and where each figure comes from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files as package_files

from meshwright.errors import InputError
from meshwright.files import Noun, decode, parse_yaml
from meshwright.hardware import DType, Gpu, Link, LinkKind
from meshwright.units import Count


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
    sustained: Cited | None = None
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
        names = ("memory", "memory_bandwidth", "sustained", "gpus_per_node")
        scalars = {key: getattr(self, key) for key in names if getattr(self, key) is not None}
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
    fields: dict[str, object] = {
        "name": canonical,
        "memory": entry.memory.value,
        "memory_bandwidth": entry.memory_bandwidth.value,
        "peak": {dtype: figure.value for dtype, figure in entry.peak.items()},
    }
    if entry.sustained is not None:
        fields["sustained"] = entry.sustained.value
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


_SAME_SIZE = 0.07
"""By which fraction a driver's size, which is rounded, may differ from the memory of the catalogue."""
_SHAPES = ("pcie", "nvl")
"""Words of a driver's name for cards, which differ from the module of the same family."""


def is_named(name: str, driver_name: str) -> bool:
    """Whether a driver means the GPU of this name: `h100-sxm` is its `NVIDIA H100 80GB HBM3`.

    The family, a word as `h100`, stands in both. A size that the driver says is that of the catalogue's
    memory; PCIe and NVL stand in both or in neither. A part of a GPU (MIG) is none.
    """
    mine, theirs = (re.findall(r"[a-z0-9]+", text.lower()) for text in (name, driver_name))
    family = [word for word in mine if re.search(r"[a-z]", word) and re.search(r"\d", word)]
    family = [word for word in family if not re.fullmatch(r"\d+gb|sxm\d*|hbm\d*e?", word)] or mine
    if "mig" in theirs:
        return False
    said = [int(word[:-2]) for word in theirs if re.fullmatch(r"\d+gb", word)]
    known = _canonical(name)
    same_size = not said or known is None or abs(gpu_named(known).memory / 2**30 / said[0] - 1) < _SAME_SIZE
    return set(family) <= set(theirs) and same_size and all((w in mine) is (w in theirs) for w in _SHAPES)


def assumed_figures(gpu_name: str) -> list[tuple[str, str, str]]:
    """The figures of a catalogue GPU and its machine that are assumed: key of the cluster, value, reason.

    Empty for a GPU that is not of the catalogue: its figures are the file's own. The size of a node is not
    among them: a file may give it and leave the rest to the catalogue.
    """
    canonical = _canonical(gpu_name)
    figures = gpu_catalogue()[canonical].figures() if canonical else {}
    return [
        (key if key.startswith("links.") else f"gpu.{key}", str(figure.value), _reason(figure.source))
        for key, figure in figures.items()
        if figure.source.startswith("assumed:") and key != "gpus_per_node"
    ]


def assumed_node_size(gpu_name: str) -> str:
    """Why the node size of a catalogue GPU is an assumption; empty where its maker states it."""
    canonical = _canonical(gpu_name)
    source = gpu_catalogue()[canonical].gpus_per_node.source if canonical else ""
    return _reason(source) if source.startswith("assumed:") else ""


def _reason(source: str) -> str:
    return source.removeprefix("assumed:").strip()


def _normal(name: str) -> str:
    return "-".join(name[:64].lower().replace("_", " ").split())


def _canonical(name: str) -> str | None:
    wanted = _normal(name)
    for canonical, entry in gpu_catalogue().items():
        if wanted == canonical or wanted in entry.aliases:
            return canonical
    return None
