"""What stands behind a price: curves of kernels and links, fitted to published measurements.

`catalog/curves.yaml` holds them; `tools/fit_curves.py` writes it from `catalog/measured/*.csv`. A curve is
what kernels reach alone and at full clock. Inside a step they are slower: power and heat lower the clock,
other kernels compete for memory. That belongs to whoever composes a step, not to the curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files as package_files
from math import log
from typing import Literal

from meshwright.files import Noun, parse_yaml
from meshwright.hardware import Gpu, LinkKind

Basis = Literal["measured", "interpolated", "assumed"]
"""Where a figure comes from: within what was measured; on a measured curve but beyond it, or on that of a
near relative; or no measurement."""


class Fit(Noun):
    """How well a curve meets its measurements: relative errors of time, as fractions; 0 points: assumed."""

    points: int
    median_error: float = 0.0
    max_error: float = 0.0
    source: str


class MatmulCurve(Noun):
    """Rate of a matmul, dense or grouped.

    t = launch + groups·group_launch + ((2·(m + groups·half_m)·(n + half_n)·(k + half_k) / (peak·rate))^4
    + (bytes / (bandwidth·memory))^4)^(1/4): a roofline whose corner is rounded, with dims that are padded by
    half a tile. `rate` is for forward; the others are relative to it. `cast_bytes` and `cast_launch_s` are
    what the measured operators took to cast the left operand to fp8, per element and in all: they are kept
    for information and are no part of the price. `forward_only` says that forward alone was measured, and
    that the gradients have the ratios of relatives.
    """

    rate: float
    input_gradient: float
    weight_gradient: float
    half_m: float
    half_n: float
    half_k: float
    memory: float
    launch_s: float
    group_launch_s: float = 0.0
    cast_bytes: float = 0.0
    cast_launch_s: float = 0.0
    forward_only: bool = False
    measured: Mapping[str, tuple[float, float]] = {}
    fit: Fit


class AttentionCurve(Noun):
    """Rate of flash attention in one direction.

    t = launch + (F + keys·f·rows) / (peak·rate·width) · √(1 + (fill/rows)²), where F are FLOPs of the pairs
    that count, f FLOPs of one pair, and rows = batch·heads·queries. `keys` is work per row that no pair
    accounts for (the masked half of a block on the diagonal), `fill` how many rows keep the GPU busy.
    `widths` gives the rate at (qk_dim + v_dim)/2 over that at 128.
    """

    rate: float
    keys: float
    fill: float
    widths: Mapping[str, float]
    launch_s: float
    measured: Mapping[str, tuple[float, float]] = {}
    fit: Fit


class MemoryCurve(Noun):
    """Ops that memory bandwidth bounds: t = launch + bytes / (bandwidth·share)."""

    share: float
    launch_s: float
    fit: Fit


class Generation(Noun):
    """The curves of one GPU generation.

    `gpus` are the first words of the catalogue names that it covers; `peak` (bf16) and `memory_bandwidth`
    those of the measured part, for finding the nearest generation. `scale` corrects the rate of one GPU by
    the best shape measured on it. `sustained` is what long runs of large matmuls reached of the rate at full
    clock, where that was measured: for information.
    """

    gpus: tuple[str, ...]
    peak: float
    memory_bandwidth: float
    scale: Mapping[str, float] = {}
    sustained: float | None = None
    matmul: Mapping[str, MatmulCurve]
    grouped_matmul: Mapping[str, MatmulCurve]
    attention: Mapping[Literal["forward", "backward"], AttentionCurve]
    memory: Mapping[str, MemoryCurve]


class Flow(Noun):
    """How one kind of traffic uses a link: t = start + s/efficiency + √(ramp·s), s = bytes/bandwidth.

    The root is what small messages lose to protocols. `start` is a multiple of the link's stated latency.
    `extra` counts as so many more peers' worth of bytes: groups of two reach less than groups of eight.
    `ranks` is the largest group measured.
    """

    efficiency: float
    ramp_s: float = 0.0
    extra: float = 0.0
    start: float = 0.0
    ranks: int = 0
    fit: Fit


class LinkCurve(Noun):
    """What one kind of link reaches.

    `hop` is a step of a ring or tree and `peer` a partner of an all-to-all, as multiples of the link's stated
    latency. `full_mesh` says that a group of g of the N GPUs reaches (g − 1)/(N − 1) of the bandwidth.
    """

    kind: LinkKind
    bandwidth: float
    hop: float
    peer: float
    full_mesh: bool = False
    flows: Mapping[str, Flow]
    source: str


class Curves(Noun):
    """Everything in curves.yaml."""

    generations: Mapping[str, Generation]
    links: tuple[LinkCurve, ...]


@cache
def curves() -> Curves:
    """The curves of the catalogue."""
    text = package_files("meshwright").joinpath("catalog/curves.yaml").read_text("utf-8")
    return Curves.model_validate(parse_yaml(text, "curves.yaml"))


def generation_for(gpu: Gpu) -> tuple[Generation, bool]:
    """The curves to use for a GPU, and whether they are its own.

    A GPU that no curve names takes those of the generation nearest by stated peak and memory bandwidth, as
    ratios: its own peak and bandwidth stay.
    """
    known = curves().generations.values()
    for generation in known:
        if gpu.name.split("-")[0] in generation.gpus:
            return generation, True
    peak = next((gpu.peak[name] for name in ("bf16", "fp16", "tf32", "fp32") if name in gpu.peak), None)

    def distance(generation: Generation) -> float:
        bandwidth = log(gpu.memory_bandwidth / generation.memory_bandwidth)
        return bandwidth**2 + (log(peak / generation.peak) ** 2 if peak else 0.0)

    return min(known, key=distance), False


def link_curve(kind: LinkKind, bandwidth: float) -> LinkCurve:
    """The curve of a link: of its kind, and among those nearest by stated bandwidth."""
    of_kind = [curve for curve in curves().links if curve.kind == kind]
    return min(of_kind, key=lambda curve: abs(log(bandwidth / curve.bandwidth)))
