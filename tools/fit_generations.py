"""The curves of each GPU generation: what is fitted, and what is assumed after a relative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fit_kernels import (
    GROUPS,
    Row,
    column,
    fit_attention,
    fit_fused,
    fit_matmul,
    machine,
    predict_matmul,
    sources,
    summed_in_fp32,
)
from least_squares import errors_of
from meshwright.calibration import AttentionCurve, Fit, Generation, MatmulCurve, MemoryCurve
from meshwright.gpus import gpu_named

BEST_SHAPES = "stas-mamf"
REFERENCE = {"ampere": "a100-80gb", "hopper": "h100-sxm", "blackwell": "b200", "cdna3": "mi300x"}
MEASURED_ON = {
    "ampere": ("a100-80gb", "a100-pcie"),
    "hopper": ("h100-sxm", "h200", "h800"),
    "blackwell": ("b200", "b300", "gb200"),
    "cdna3": ("mi300x",),
}
NAMED = {
    "ampere": ("a100",),
    "hopper": ("h100", "h200", "h800", "h20", "gh200"),
    "blackwell": ("b200", "b300", "gb200", "gb300"),
    "cdna3": ("mi300x",),
}
"""First words of the catalogue names that a generation covers."""

FP4_OF_FP8 = 0.75
CDNA_FP8_OF_BF16 = 0.8
LAUNCH_S = 3e-6
HOPPER_GROUP_LAUNCH_S = 2e-6

MEMORY_SHARES: Mapping[str, float] = {
    "elementwise": 0.8,
    "norm": 0.7,
    "embedding": 0.5,
    "permute": 0.5,
    "route": 0.3,
    "loss": 0.6,
}
MEMORY_WHY = {
    "elementwise": "assumed: large copies reach 80-90 %, DeepGEMM's thin matmuls 60-80 % (H800)",
    "norm": "assumed: elementwise, less what reductions cost",
    "embedding": "assumed: rows at random",
    "permute": "assumed: rows at random; SimuMax fits 0.50 on B200 (configs/system/b200_bf16_ceperm.json)",
    "route": "assumed: many small kernels",
    "loss": "assumed: FP32 in several passes; SimuMax fits 0.32 and 0.28 on B200 by its own count of bytes",
}


def generations(
    matmul: Sequence[Row], attention: Sequence[Row], fused: Sequence[Row]
) -> dict[str, Generation]:
    """Every generation by name."""
    rows = [row for row in matmul if summed_in_fp32(row)]
    found = {name: _measured(name, rows, attention) for name in ("ampere", "hopper", "blackwell")}
    found["hopper"] = _with_fused(found["hopper"], found, fused)
    found["blackwell"] = _with_low_precision(found["blackwell"])
    found["cdna3"] = _cdna3(rows, found["hopper"])
    return found


def _measured(name: str, matmul: Sequence[Row], attention: Sequence[Row]) -> Generation:
    """A generation with the curves that its own measurements make."""
    rows = [r for r in matmul if r["gpu"] in MEASURED_ON[name] and r["source"] != BEST_SHAPES]
    dense: dict[str, MatmulCurve] = {}
    grouped: dict[str, MatmulCurve] = {}
    sustained: float | None = None
    for dtype in ("bf16", "fp8", "fp8_block"):
        of_type = [row for row in rows if row["dtype"] == dtype and row["groups"] == "0"]
        in_groups = [row for row in rows if row["dtype"] == dtype and row["groups"] != "0"]
        if of_type:
            # Casting and half_n grow alike, with m·k: what casts cannot tell from padding is held.
            casts = any(row["casts"] == "1" for row in of_type)
            held = {"half_n": 64.0, "launch_s": dense["bf16"].launch_s} if casts else {}
            dense[dtype], long_run = fit_matmul(of_type, held)
            sustained = long_run if dtype == "bf16" else sustained
        if in_groups:
            held = {"sustained": sustained} if sustained else {}
            grouped[dtype], _ = fit_matmul(in_groups, held, GROUPS)
    curves: dict[Any, AttentionCurve] = {}
    for direction in ("forward", "backward"):
        timed = [r for r in attention if r["gpu"] in MEASURED_ON[name] and r["pass"] == direction]
        curves[direction] = fit_attention(timed, sustained or 1.0)
    return Generation(
        gpus=NAMED[name],
        peak=gpu_named(REFERENCE[name]).peak_flops_per_s("bf16"),
        memory_bandwidth=gpu_named(REFERENCE[name]).memory_bandwidth,
        scale=_scales(name, matmul),
        sustained=sustained,
        matmul=dense,
        grouped_matmul=grouped,
        attention=curves,
        memory=_memory(),
    )


def _memory() -> dict[str, MemoryCurve]:
    return {
        kind: MemoryCurve(share=share, launch_s=LAUNCH_S, fit=Fit(points=0, source=MEMORY_WHY[kind]))
        for kind, share in MEMORY_SHARES.items()
    }


def _scales(name: str, matmul: Sequence[Row]) -> dict[str, float]:
    """Rate of each GPU over the reference's, by the best shapes measured on both; of GB300 as of GB200."""
    if name != "blackwell":
        return {}
    best: dict[str, dict[str, float]] = {}
    for row in matmul:
        if row["source"] == BEST_SHAPES and row["gpu"] in MEASURED_ON[name]:
            m, n, k, us = (float(row[key]) for key in ("m", "n", "k", "us"))
            peak, _ = machine(row["gpu"], row["dtype"])
            best.setdefault(row["gpu"], {})[row["dtype"]] = 2 * m * n * k / (us * 1e-6) / peak
    reference = best[REFERENCE[name]]
    ratios = {
        gpu: float(np.exp(np.mean([np.log(shares[dtype] / reference[dtype]) for dtype in shares])))
        for gpu, shares in best.items()
        if gpu != REFERENCE[name]
    }
    return {**ratios, "gb300": ratios["gb200"]}


def _assumed(curve: MatmulCurve, why: str, **update: Any) -> MatmulCurve:
    return curve.model_copy(update={**update, "measured": {}, "fit": Fit(points=0, source=f"assumed: {why}")})


def _gradients(curves: Sequence[MatmulCurve]) -> dict[str, Any]:
    """The ratios of relatives, for a curve whose forward alone was timed: their geometric mean."""
    names = ("input_gradient", "weight_gradient")
    means = {name: float(np.exp(np.mean([np.log(getattr(c, name)) for c in curves]))) for name in names}
    return {**means, "forward_only": True}


def _with_fused(hopper: Generation, found: Mapping[str, Generation], fused: Sequence[Row]) -> Generation:
    """Hopper's grouped matmuls in bf16 after fused expert kernels; gradients after A100 and B200."""
    near = [found["ampere"], found["blackwell"]]
    backward = _gradients([generation.matmul["bf16"] for generation in near])
    matmul = {dtype: curve.model_copy(update=backward) for dtype, curve in hopper.matmul.items()}
    dense = matmul["bf16"]
    held = {name: getattr(dense, name) for name in ("half_n", "half_k", "memory", "launch_s")}
    values, how_well = fit_fused(fused, held)
    in_groups: dict[str, Any] = {
        **_gradients([generation.grouped_matmul["bf16"] for generation in near]),
        "group_launch_s": HOPPER_GROUP_LAUNCH_S,
    }
    padded = {**in_groups, "half_m": values["half_m"]}
    # Nothing counts as measured: what was timed holds more than the matmuls.
    about = {"rate": values["rate"], "measured": {}, "fit": how_well}
    why = "the dense curve, with the padding and the gradients of bf16 in groups"
    by_type = {
        "bf16": dense.model_copy(update={**padded, **about}),
        "fp8": _assumed(matmul["fp8"], why, **padded),
        "fp8_block": hopper.grouped_matmul["fp8_block"].model_copy(update=in_groups),
    }
    return hopper.model_copy(update={"matmul": matmul, "grouped_matmul": by_type})


def _with_low_precision(blackwell: Generation) -> Generation:
    """Blackwell's fp8 in groups after its dense fp8 and its bf16 in groups, and fp4 after fp8."""
    grouped = blackwell.grouped_matmul["bf16"]
    backward = _gradients([blackwell.matmul["bf16"]])
    dense = {
        dtype: curve if dtype == "bf16" else curve.model_copy(update=backward)
        for dtype, curve in blackwell.matmul.items()
    }
    dense["fp4"] = _assumed(
        dense["fp8"], f"fp8 at {FP4_OF_FP8} of its share of the peak", rate=FP4_OF_FP8 * dense["fp8"].rate
    )
    by_type = {"bf16": grouped}
    for dtype, curve in dense.items():
        if dtype != "bf16":
            by_type[dtype] = _assumed(
                curve,
                "the dense curve, with the padding, launches and gradients of bf16 in groups",
                half_m=grouped.half_m,
                group_launch_s=grouped.group_launch_s,
                input_gradient=grouped.input_gradient,
                weight_gradient=grouped.weight_gradient,
            )
    return blackwell.model_copy(update={"matmul": dense, "grouped_matmul": by_type})


def _cdna3(matmul: Sequence[Row], hopper: Generation) -> Generation:
    """MI300X: the rate of its few best shapes on Hopper's curve; all else is assumed."""
    rows = [row for row in matmul if row["gpu"] == "mi300x"]
    times = column(rows, "us") * 1e-6
    base = hopper.matmul["bf16"]
    ratio = float(np.exp(np.mean(np.log(predict_matmul(rows, base) / times))))
    median, largest = errors_of(predict_matmul(rows, base) / ratio, times)
    about = Fit(points=len(rows), median_error=median, max_error=largest, source=sources(rows))
    dense = base.model_copy(update={"rate": base.rate * ratio, "measured": {}, "fit": about})
    why = "Hopper's curve at the ratio of their dense rates"
    fp8 = {
        dtype: _assumed(hopper.matmul[dtype], why, rate=CDNA_FP8_OF_BF16 * dense.rate)
        for dtype in ("fp8", "fp8_block")
    }
    grouped = {
        dtype: _assumed(curve, why, rate=curve.rate * ratio) for dtype, curve in hopper.grouped_matmul.items()
    }
    attention = {
        direction: curve.model_copy(
            update={
                "rate": curve.rate * ratio,
                "measured": {},
                "fit": Fit(points=0, source=f"assumed: {why}"),
            }
        )
        for direction, curve in hopper.attention.items()
    }
    return Generation(
        gpus=NAMED["cdna3"],
        peak=gpu_named("mi300x").peak_flops_per_s("bf16"),
        memory_bandwidth=gpu_named("mi300x").memory_bandwidth,
        matmul={"bf16": dense, **fp8},
        grouped_matmul=grouped,
        attention=attention,
        memory=_memory(),
    )
