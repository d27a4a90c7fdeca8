"""One GPU and one link tier, with the bounds that no machine of today passes."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from meshwright.errors import InputError
from meshwright.files import Noun
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

# What no machine of today reaches, or falls below. The bounds catch a wrong prefix, and bits read as bytes.
_MAX_MEMORY_BYTES = 10e12
_MEMORY_BANDWIDTH_RANGE = (5e9, 50e12)
_MAX_PEAK_FLOPS_PER_S = 1e17
_MAX_LINK_BYTES_PER_S = 5e12
_MAX_NETWORK_BYTES_PER_S = 400e9  # not reached by any card: 400 and 800 stand on cards as Gb/s
_MAX_LATENCY_S = 0.1


class Gpu(Noun):
    """One accelerator. Peaks are dense (no sparsity), in FLOP/s with a multiply-add counted as two.

    `sustained` is the share of what its generation otherwise reaches that a power limit leaves to long
    matmuls.
    """

    name: str = "inline"
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    peak: dict[DType, FlopsPerSecond]
    sustained: Share = 1.0

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
