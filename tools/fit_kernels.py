"""Fits the curves of matmuls and attention to the carried measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from least_squares import Free, Values, errors_of, fit
from meshwright.calibration import AttentionCurve, Fit, MatmulCurve
from meshwright.cost.compute import (
    ACCUMULATED_BYTES,
    attention_rates,
    attention_seconds,
    matmul_rates,
    matmul_seconds,
)
from meshwright.gpus import gpu_named
from meshwright.ir.tasks import PHASES, Phase

Row = Mapping[str, str]
Entry = dict[str, Any]

PCIE_BANDWIDTH = 1.935e12
"""Memory bandwidth of the A100 on a PCIe card: no GPU of the catalogue, but measured by one source."""
SUSTAINED = ("simumax",)
"""Sources that time long runs: 40 large kernels in a row on a warm machine."""

NO_FIT = Fit(points=0, source="")


def machine(gpu: str, dtype: str) -> tuple[float, float]:
    """Peak FLOP/s and memory bandwidth of a GPU of the measurements."""
    known = gpu_named("a100-80gb" if gpu == "a100-pcie" else gpu)
    bandwidth = PCIE_BANDWIDTH if gpu == "a100-pcie" else known.memory_bandwidth
    return known.peak_flops_per_s("fp8" if dtype.startswith("fp8") else dtype), bandwidth


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """A column as numbers."""
    return np.array([float(row[name]) for row in rows])


def is_sustained(row: Row) -> bool:
    """Whether a row was timed in a long run."""
    return row["source"].startswith(SUSTAINED)


def sources(rows: Sequence[Row]) -> str:
    """The sources of rows, by key."""
    return ", ".join(sorted({row["source"] for row in rows}))


MATMUL: Mapping[str, Free] = {
    "rate": Free(0.7, 0.2, 0.95),
    "half_m": Free(64, 1, 512, 0.1),
    "half_n": Free(64, 1, 512, 0.1),
    "half_k": Free(128, 1, 1024, 0.1),
    "memory": Free(0.8, 0.4, 0.95, 0.3),
    "launch_s": Free(4e-6, 1e-6, 2e-5, 0.3),
}
BACKWARD: Mapping[str, Free] = {
    "input_gradient": Free(1.0, 0.6, 1.2),
    "weight_gradient": Free(0.95, 0.6, 1.2),
}
CAST = {"cast_bytes": Free(4.0, 0.5, 30.0), "cast_launch_s": Free(4e-6, 5e-7, 3e-5, 0.1)}
LONG_RUN = {"sustained": Free(0.8, 0.4, 1.0)}
GROUPS = {"group_launch_s": Free(1e-6, 1e-8, 1e-5, 0.05)}


def matmul_curve(values: Values, fixed: Values, **about: Any) -> MatmulCurve:
    """A curve from fitted and fixed parameters."""
    names = set(MatmulCurve.model_fields) - {"fit", "measured"}
    numbers = {"input_gradient": 1.0, "weight_gradient": 1.0, **fixed, **values}
    return MatmulCurve(**{k: v for k, v in numbers.items() if k in names}, **({"fit": NO_FIT} | about))


def predict_matmul(rows: Sequence[Row], curve: MatmulCurve, sustained: float = 1.0) -> np.ndarray:
    """Seconds of each row, casts included where the row has them."""
    predicted = np.zeros(len(rows))
    for gpu in {row["gpu"] for row in rows}:
        for dtype in {row["dtype"] for row in rows if row["gpu"] == gpu}:
            peak, bandwidth = machine(gpu, dtype)
            rates = matmul_rates(curve, peak, bandwidth, "fp8" if dtype.startswith("fp8") else dtype)
            for phase in PHASES:
                chosen = [
                    i for i, r in enumerate(rows) if (r["gpu"], r["dtype"], r["phase"]) == (gpu, dtype, phase)
                ]
                if chosen:
                    predicted[chosen] = _of_phase([rows[i] for i in chosen], rates, phase, curve, bandwidth)
    slow = np.array([1.0 / sustained if is_sustained(row) else 1.0 for row in rows])
    return np.asarray(predicted * slow)


def _of_phase(
    rows: Sequence[Row], rates: Any, phase: Phase, curve: MatmulCurve, bandwidth: float
) -> np.ndarray:
    groups, m, n, k = (column(rows, name) for name in ("groups", "m", "n", "k"))
    dense, count = groups == 0, np.maximum(groups, 1)
    # A dense row states what ran, [m, k]·[k, n]: back to the forward's m, n, k. A grouped row states those.
    rows_m, rows_n, rows_k = m * count, n, k
    if phase == "input_gradient":
        rows_n, rows_k = np.where(dense, k, n), np.where(dense, n, k)
    if phase == "weight_gradient":
        rows_m, rows_n, rows_k = np.where(dense, k, m * count), np.where(dense, m, n), np.where(dense, n, k)
    seconds = matmul_seconds(rates, phase, count, rows_m, rows_n, rows_k)
    casts = column(rows, "casts") * (m * count * k * curve.cast_bytes / bandwidth + curve.cast_launch_s)
    return np.asarray(seconds + casts)


def fit_matmul(
    rows: Sequence[Row], held: Mapping[str, float] | None = None, extra: Mapping[str, Free] | None = None
) -> tuple[MatmulCurve, float | None]:
    """The curve of rows and, where some are long runs, what these keep of its rate.

    `held` fixes parameters, `extra` adds or replaces free ones. The traffic of weight gradients that are
    summed in bf16 is not told apart: such rows are left out by the caller.
    """
    free = dict(MATMUL)
    if any(row["phase"] != "forward" for row in rows):
        free |= BACKWARD
    if any(row["casts"] == "1" for row in rows):
        free |= CAST
    if any(is_sustained(row) for row in rows):
        free |= LONG_RUN
    free |= extra or {}
    fixed = dict(held or {})
    free = {name: value for name, value in free.items() if name not in fixed}
    times = column(rows, "us") * 1e-6

    def model(values: Values) -> np.ndarray:
        known = {**fixed, **values}
        return predict_matmul(rows, matmul_curve(values, fixed), known.get("sustained", 1.0))

    values = fit(model, times, free)
    sustained = {**fixed, **values}.get("sustained")
    median, largest = errors_of(model(values), times)
    about = {
        "measured": _ranges(rows),
        "fit": Fit(points=len(rows), median_error=median, max_error=largest, source=sources(rows)),
    }
    return matmul_curve(values, fixed, **about), sustained


def _ranges(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """What was measured, in the forward's m (rows of one group), n and k."""
    ranges: dict[str, list[float]] = {"groups": [], "m": [], "n": [], "k": []}
    for row in rows:
        groups, m, n, k = (float(row[name]) for name in ("groups", "m", "n", "k"))
        if not groups and row["phase"] == "input_gradient":
            n, k = k, n
        if not groups and row["phase"] == "weight_gradient":
            m, n, k = k, m, n
        for name, value in (("groups", groups or 1), ("m", m), ("n", n), ("k", k)):
            ranges[name].append(value)
    return {name: (min(values), max(values)) for name, values in ranges.items()}


def summed_in_fp32(row: Row) -> bool:
    """Whether a row is what training runs: every forward and input gradient, and FP32 weight gradients."""
    return row["phase"] != "weight_gradient" or float(row["output_bytes"]) == ACCUMULATED_BYTES


FUSED: Mapping[str, Free] = {
    "rate": Free(0.7, 0.2, 0.95),
    "half_m": Free(64, 1, 512),
    "start_s": Free(3e-5, 1e-6, 3e-4),
    "moved": Free(8.0, 0.5, 40.0),
}


def fit_fused(rows: Sequence[Row], held: Values) -> tuple[dict[str, float], Fit]:
    """Rate and half_m of grouped matmuls from fused expert kernels: gate and up, then down, with a start and
    with `moved` bytes per row and hidden unit for what stands around them."""
    groups, m, hidden, width = (column(rows, name) for name in ("groups", "m", "hidden", "width"))
    times = column(rows, "us") * 1e-6

    def model(values: Values) -> np.ndarray:
        seconds = np.zeros(len(rows))
        for gpu in sorted({row["gpu"] for row in rows}):
            peak, bandwidth = machine(gpu, "bf16")
            curve = matmul_curve({k: values[k] for k in ("rate", "half_m")}, held)
            rates = matmul_rates(curve, peak, bandwidth, "bf16")
            up = matmul_seconds(rates, "forward", groups, groups * m, 2 * width, hidden)
            down = matmul_seconds(rates, "forward", groups, groups * m, hidden, width)
            rest = values["start_s"] + values["moved"] * groups * m * hidden / bandwidth
            chosen = np.array([row["gpu"] == gpu for row in rows])
            seconds = np.where(chosen, up + down + rest, seconds)
        return seconds

    values = fit(model, times, FUSED)
    median, largest = errors_of(model(values), times)
    return values, Fit(points=len(rows), median_error=median, max_error=largest, source=sources(rows))


ATTENTION: Mapping[str, Free] = {
    "rate": Free(0.6, 0.2, 0.95),
    "keys": Free(200, 1, 2000, 0.1),
    "fill": Free(2e4, 1e3, 3e5, 0.1),
    "wide": Free(0.9, 0.5, 1.2, 0.05),
    "narrow": Free(0.75, 0.4, 1.1, 0.05),
    "launch_s": Free(5e-6, 1e-6, 3e-5, 0.3),
}
WIDTHS = {"narrow": 64.0, "wide": 160.0}
"""Head widths (qk + v)/2 of 64, and of latent attention (192 + 128)."""


def attention_curve(values: Values, **about: Any) -> AttentionCurve:
    """A curve from its parameters."""
    widths = {"64": values["narrow"], "128": 1.0, "160": values["wide"]}
    numbers = {name: values[name] for name in ("rate", "keys", "fill", "launch_s")}
    return AttentionCurve(**numbers, widths=widths, **({"fit": NO_FIT} | about))


def predict_attention(rows: Sequence[Row], curve: AttentionCurve, sustained: float) -> np.ndarray:
    """Seconds of each row."""
    names = ("batch", "heads", "tokens", "tokens", "qk_dim", "v_dim")
    sizes = [column(rows, name) for name in names]
    batch, heads, tokens, _, qk_dim, v_dim = sizes
    pairs = batch * heads * np.where(column(rows, "causal") == 1, tokens * (tokens + 1) / 2, tokens**2)
    forward = rows[0]["pass"] == "forward"
    flops = pairs * (2 * (qk_dim + v_dim) if forward else 6 * qk_dim + 4 * v_dim)
    moved = batch * heads * tokens * 2 * (qk_dim + v_dim) * 2 * (1 if forward else 2)
    seconds = np.zeros(len(rows))
    for gpu in sorted({row["gpu"] for row in rows}):
        peak, bandwidth = machine(gpu, "bf16")
        chosen = np.array([row["gpu"] == gpu for row in rows])
        rates = attention_rates(curve, peak, bandwidth)
        seconds = np.where(chosen, attention_seconds(rates, forward, sizes, flops, moved), seconds)
    return np.asarray(seconds / np.array([sustained if is_sustained(row) else 1.0 for row in rows]))


def fit_attention(
    rows: Sequence[Row], sustained: float, held: Mapping[str, float] | None = None
) -> AttentionCurve:
    """The curve of one direction."""
    fixed = dict(held or {})
    free = {name: value for name, value in ATTENTION.items() if name not in fixed}
    times = column(rows, "us") * 1e-6

    def model(values: Values) -> np.ndarray:
        return predict_attention(rows, attention_curve({**fixed, **values}), sustained)

    values = fit(model, times, free)
    median, largest = errors_of(model(values), times)
    widths = (column(rows, "qk_dim") + column(rows, "v_dim")) / 2
    busy = column(rows, "batch") * column(rows, "heads") * column(rows, "tokens")
    tokens = column(rows, "tokens")
    measured = {
        "rows": (float(busy.min()), float(busy.max())),
        "keys": (float(tokens.min()), float(tokens.max())),
        "width": (float(widths.min()), float(widths.max())),
    }
    fitted = Fit(points=len(rows), median_error=median, max_error=largest, source=sources(rows))
    return attention_curve({**fixed, **values}, measured=measured, fit=fitted)
