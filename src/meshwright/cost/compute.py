"""How long one op takes on one GPU, alone and at full clock.

Matmuls and attention follow rounded rooflines fitted to published kernels; other ops move bytes through
memory. All of it is elementwise: sizes, FLOPs and bytes may be numpy arrays. Inside a step kernels are
slower than alone, which is for the composition of a step to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from meshwright.calibration import AttentionCurve, Basis, Fit, Generation, MatmulCurve, generation_for
from meshwright.hardware import Efficiency, Gpu
from meshwright.ir.graph import OpKind
from meshwright.ir.tasks import Phase
from meshwright.workload import Precision

Array = Any
"""A number or a numpy array of numbers."""

Recipe = Literal["tensor", "block"]
"""How fp8 is scaled: one factor per tensor, or one per block (1x128 on Hopper, 1x32 on Blackwell)."""

WITH_FLOPS = (OpKind.MATMUL, OpKind.GROUPED_MATMUL, OpKind.ATTENTION)
"""Kinds that compute bounds; memory bandwidth bounds the others."""

OPERAND_BYTES: Mapping[str, float] = {"fp32": 4.0, "fp8": 1.0, "fp4": 0.5625}
"""Bytes of one element that a matmul reads, scales included; 2 where not named."""
ACCUMULATED_BYTES = 8.0
"""Traffic of one element of a weight gradient: FP32, read and written, as it adds up over micro-batches."""


@dataclass(frozen=True, slots=True)
class MatmulRates:
    """A matmul curve for one GPU in SI units; see MatmulCurve. Seconds per two FLOPs, by phase."""

    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float
    half_m: float
    half_n: float
    half_k: float
    s_per_byte: float
    operand_bytes: float
    output_bytes: float
    launch_s: float
    group_launch_s: float


@dataclass(frozen=True, slots=True)
class AttentionRates:
    """An attention curve for one GPU in SI units; see AttentionCurve."""

    s_per_flop: float
    keys: float
    fill: float
    widths: tuple[float, ...]
    shares: tuple[float, ...]
    s_per_byte: float
    launch_s: float


@dataclass(frozen=True, slots=True)
class ComputeRates:
    """What one GPU reaches for one number type; resolved once.

    `memory` maps a kind to its seconds per byte and launch. `sustained_fraction` is what long runs of large
    matmuls keep of the rate at full clock, where that was measured. `is_own` says that the curves were
    measured on this GPU or its siblings; never so for fp32.
    """

    matmul: MatmulRates
    grouped_matmul: MatmulRates
    attention_forward: AttentionRates
    attention_backward: AttentionRates
    memory: Mapping[OpKind, tuple[float, float]]
    memory_bytes_per_s: float
    sustained_fraction: float | None
    generation: Generation
    dtype: str
    is_own: bool
    flat_flops_per_s: float | None = None
    flat_bytes_per_s: float | None = None


def compute_rates(
    gpu: Gpu, precision: Precision, efficiency: Efficiency | None, recipe: Recipe = "tensor"
) -> ComputeRates:
    """The rates of a GPU for a number type. A flat efficiency of the file replaces the curves.

    Attention runs in bf16 under fp8 and fp4. Raises InputError for a type that the GPU has no peak for.
    """
    peak = gpu.peak_flops_per_s(precision)
    generation, is_own = generation_for(gpu)
    dtype = _curve_name(precision, recipe)
    scaled = peak * generation.scale.get(gpu.name, 1.0)
    fine = peak if dtype == "bf16" else next((gpu.peak[t] for t in ("bf16", "fp16") if t in gpu.peak), peak)
    flat = efficiency or Efficiency()
    bandwidth = gpu.memory_bandwidth
    memory = {kind: generation.memory[kind.value] for kind in OpKind if kind not in WITH_FLOPS}
    share = generation.memory["elementwise"].share if flat.bandwidth is None else flat.bandwidth
    return ComputeRates(
        matmul=matmul_rates(_of_type(generation.matmul, dtype), scaled, bandwidth, precision),
        grouped_matmul=matmul_rates(_of_type(generation.grouped_matmul, dtype), scaled, bandwidth, precision),
        attention_forward=attention_rates(generation.attention["forward"], fine, bandwidth),
        attention_backward=attention_rates(generation.attention["backward"], fine, bandwidth),
        memory={kind: (1 / (c.share * bandwidth), c.launch_s) for kind, c in memory.items()},
        memory_bytes_per_s=share * bandwidth,
        sustained_fraction=generation.sustained,
        generation=generation,
        dtype=dtype,
        is_own=is_own and precision != "fp32",
        flat_flops_per_s=None if flat.compute is None else flat.compute * peak,
        flat_bytes_per_s=None if flat.bandwidth is None else flat.bandwidth * bandwidth,
    )


def _curve_name(precision: str, recipe: Recipe) -> str:
    if precision in ("fp8", "fp4"):
        return "fp8_block" if (precision, recipe) == ("fp8", "block") else precision
    return "bf16"  # fp16 runs on the same units; fp32 takes the shape of bf16 under its own peak


def _of_type(by_type: Mapping[str, MatmulCurve], dtype: str) -> MatmulCurve:
    return by_type[dtype] if dtype in by_type else by_type["bf16"]


def matmul_rates(curve: MatmulCurve, peak: float, bandwidth: float, precision: str) -> MatmulRates:
    """A curve under one peak (FLOP/s) and memory bandwidth (bytes/s)."""
    forward = 2.0 / (peak * curve.rate)
    return MatmulRates(
        forward_s=forward,
        input_gradient_s=forward / curve.input_gradient,
        weight_gradient_s=forward / curve.weight_gradient,
        half_m=curve.half_m,
        half_n=curve.half_n,
        half_k=curve.half_k,
        s_per_byte=1.0 / (bandwidth * curve.memory),
        operand_bytes=OPERAND_BYTES.get(precision, 2.0),
        output_bytes=4.0 if precision == "fp32" else 2.0,
        launch_s=curve.launch_s,
        group_launch_s=curve.group_launch_s,
    )


def attention_rates(curve: AttentionCurve, peak: float, bandwidth: float) -> AttentionRates:
    """A curve under one peak (FLOP/s) and memory bandwidth (bytes/s)."""
    widths = sorted((float(width), share) for width, share in curve.widths.items())
    return AttentionRates(
        s_per_flop=1.0 / (peak * curve.rate),
        keys=curve.keys,
        fill=curve.fill,
        widths=tuple(width for width, _ in widths),
        shares=tuple(share for _, share in widths),
        s_per_byte=1.0 / bandwidth,
        launch_s=curve.launch_s,
    )


def compute_seconds(
    rates: ComputeRates,
    kind: OpKind,
    phase: Phase,
    sizes: Sequence[Array],
    flops: Array,
    traffic_bytes: Array,
) -> Array:
    """Seconds of one op on one rank.

    `sizes` as OpKind says for the kind, in the order of forward whatever the phase; with `flops` and
    `traffic_bytes` they may be arrays. Matmuls count their own bytes: operands in the number type, weight
    gradients as FP32 that is read and written. Flat rates of the file: flops/rate and bytes/rate alone.
    """
    if kind in WITH_FLOPS:
        if rates.flat_flops_per_s is not None:
            return flops / rates.flat_flops_per_s
        if kind is OpKind.MATMUL:
            return matmul_seconds(rates.matmul, phase, 1.0, *sizes)
        if kind is OpKind.GROUPED_MATMUL:
            return matmul_seconds(rates.grouped_matmul, phase, *sizes)
        forward = phase in ("forward", "recompute")
        attention = rates.attention_forward if forward else rates.attention_backward
        return attention_seconds(attention, forward, sizes, flops, traffic_bytes)
    if rates.flat_bytes_per_s is not None:
        return traffic_bytes / rates.flat_bytes_per_s
    s_per_byte, launch_s = rates.memory[kind]
    return traffic_bytes * s_per_byte + launch_s


def matmul_seconds(rates: MatmulRates, phase: Phase, groups: Array, m: Array, n: Array, k: Array) -> Array:
    """Seconds of Y[m,n] = X[m,k]·W[k,n], of its input gradient [m,k] or its weight gradient [k,n], where m
    counts the rows of all groups; see MatmulCurve for the formula."""
    weights = groups * n * k
    if phase == "weight_gradient":
        padded = (n + rates.half_m) * (k + rates.half_n) * (m + groups * rates.half_k)
        moved = rates.operand_bytes * m * (n + k) + ACCUMULATED_BYTES * weights
        compute = padded * rates.weight_gradient_s
    elif phase == "input_gradient":
        padded = (m + groups * rates.half_m) * (k + rates.half_n) * (n + rates.half_k)
        moved = rates.operand_bytes * (m * n + weights) + rates.output_bytes * m * k
        compute = padded * rates.input_gradient_s
    else:
        padded = (m + groups * rates.half_m) * (n + rates.half_n) * (k + rates.half_k)
        moved = rates.operand_bytes * (m * k + weights) + rates.output_bytes * m * n
        compute = padded * rates.forward_s
    return _rounded(compute, moved * rates.s_per_byte) + (rates.launch_s + groups * rates.group_launch_s)


def _rounded(one: Array, other: Array) -> Array:
    """(a⁴ + b⁴)^(1/4): the larger of two times, and 19 % more where they are equal."""
    one, other = one * one, other * other
    return np.sqrt(np.sqrt(one * one + other * other))


def attention_seconds(
    rates: AttentionRates, forward: bool, sizes: Sequence[Array], flops: Array, traffic_bytes: Array
) -> Array:
    """Seconds of flash attention in one direction; see AttentionCurve for the formula."""
    batch, heads, queries, _, qk_dim, v_dim = sizes
    rows = batch * heads * queries
    of_pair = (2.0 * (qk_dim + v_dim)) if forward else (6.0 * qk_dim + 4.0 * v_dim)
    share = np.interp((qk_dim + v_dim) / 2.0, rates.widths, rates.shares)
    idle = rates.fill / rows
    work = (flops + rates.keys * of_pair * rows) * (rates.s_per_flop / share)
    return np.maximum(work * np.sqrt(1.0 + idle * idle), traffic_bytes * rates.s_per_byte) + rates.launch_s


def compute_basis(rates: ComputeRates, kind: OpKind, phase: Phase, sizes: Sequence[int]) -> Basis:
    """Where the price of one op comes from, for scalar sizes.

    measured: this GPU's generation, within the sizes measured; interpolated: beyond those sizes, on a curve
    that measurements made; assumed: a flat rate of the file, another generation, or no measurement.
    """
    flat = rates.flat_flops_per_s if kind in WITH_FLOPS else rates.flat_bytes_per_s
    if flat is not None or not rates.is_own:
        return "assumed"
    named, fit, measured = _behind(rates, kind, phase, sizes)
    if not fit.points:
        return "assumed"
    inside = all(low <= named[name] <= high for name, (low, high) in measured.items())
    return "measured" if inside and measured else "interpolated"


def _behind(
    rates: ComputeRates, kind: OpKind, phase: Phase, sizes: Sequence[int]
) -> tuple[Mapping[str, float], Fit, Mapping[str, tuple[float, float]]]:
    """The sizes of an op by name, and the fit and the measured ranges of its curve."""
    generation = rates.generation
    match kind:
        case OpKind.MATMUL | OpKind.GROUPED_MATMUL:
            by_type = generation.matmul if kind is OpKind.MATMUL else generation.grouped_matmul
            curve = _of_type(by_type, rates.dtype)
            groups, m, n, k = sizes if kind is OpKind.GROUPED_MATMUL else (1, *sizes)
            timed = phase in ("forward", "recompute") or not curve.forward_only
            named = {"groups": groups, "m": m / groups, "n": n, "k": k}
            return named, curve.fit, curve.measured if timed else {}
        case OpKind.ATTENTION:
            forward = phase in ("forward", "recompute")
            attention = generation.attention["forward" if forward else "backward"]
            batch, heads, queries, keys, qk_dim, v_dim = sizes
            width = (qk_dim + v_dim) / 2
            named = {"rows": batch * heads * queries, "keys": keys, "width": width}
            return named, attention.fit, attention.measured
        case _:
            return {}, generation.memory[kind.value].fit, {}
