"""How long one op takes on one GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.calibration import Basis
from meshwright.hardware import Efficiency, Gpu
from meshwright.ir.graph import OpKind
from meshwright.ir.tasks import Phase
from meshwright.workload import Precision

Array = Any

WITH_FLOPS = (OpKind.MATMUL, OpKind.GROUPED_MATMUL, OpKind.ATTENTION)
"""Kinds that compute bounds; memory bandwidth bounds the others."""


@dataclass(frozen=True, slots=True)
class ComputeRates:
    """What one GPU reaches for one precision; resolved once."""

    matmul_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float
    flat_flops_per_s: float | None = None
    flat_bytes_per_s: float | None = None
    half: tuple[float, float, float] = (128.0, 128.0, 256.0)
    launch_s: float = 3e-6


def compute_rates(gpu: Gpu, precision: Precision, efficiency: Efficiency | None) -> ComputeRates:
    """The rates of a GPU. A flat efficiency of the file replaces the curves."""
    peak = gpu.peak_flops_per_s(precision)
    attention = gpu.peak.get("bf16", peak) if precision == "fp8" else peak
    flat = efficiency or Efficiency()
    return ComputeRates(
        matmul_flops_per_s=0.78 * peak,
        attention_flops_per_s=0.6 * attention,
        memory_bytes_per_s=0.85 * gpu.memory_bandwidth,
        flat_flops_per_s=None if flat.compute is None else flat.compute * peak,
        flat_bytes_per_s=None if flat.bandwidth is None else flat.bandwidth * gpu.memory_bandwidth,
    )


def compute_seconds(
    rates: ComputeRates,
    kind: OpKind,
    phase: Phase,
    sizes: Sequence[Array],
    flops: Array,
    traffic_bytes: Array,
) -> Array:
    """Seconds of one op. `sizes` as ir/graph.py says for its kind; they, flops and traffic may be arrays."""
    memory_s = traffic_bytes / rates.memory_bytes_per_s
    if rates.flat_flops_per_s is not None and kind in WITH_FLOPS:
        return flops / rates.flat_flops_per_s
    if rates.flat_bytes_per_s is not None and kind not in WITH_FLOPS:
        return traffic_bytes / rates.flat_bytes_per_s
    match kind:
        case OpKind.MATMUL | OpKind.GROUPED_MATMUL:
            m, n, k = sizes[-3:]
            groups = sizes[0] if kind is OpKind.GROUPED_MATMUL else 1
            hm, hn, hk = rates.half
            work = 2.0 * (m + groups * hm) * (n + hn) * (k + hk)
            return np.maximum(work / rates.matmul_flops_per_s, memory_s) + rates.launch_s
        case OpKind.ATTENTION:
            share = 1.0 if phase in ("forward", "recompute") else 0.8
            ramp = 1 + 512.0 / sizes[3]
            return np.maximum(flops * ramp / (share * rates.attention_flops_per_s), memory_s) + rates.launch_s
        case _:
            return memory_s + rates.launch_s


def compute_basis(rates: ComputeRates, kind: OpKind, phase: Phase, sizes: Sequence[int]) -> Basis:
    """Where the price of one op comes from."""
    return "assumed"
