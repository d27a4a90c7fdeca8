"""Prices of ops: against the carried measurements, against physics, and arrays against numbers."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.calibration import curves, generation_for
from meshwright.cost.compute import ComputeRates, compute_basis, compute_rates, compute_seconds
from meshwright.errors import InputError
from meshwright.files import decode
from meshwright.gpus import gpu_catalogue, gpu_named
from meshwright.hardware import Efficiency, Gpu
from meshwright.ir.graph import OpKind
from meshwright.ir.tasks import PHASES, Phase

ROOT = Path(__file__).resolve().parents[2]
MEMORY_KINDS = [k for k in OpKind if k not in (OpKind.MATMUL, OpKind.GROUPED_MATMUL, OpKind.ATTENTION)]


def measured(name: str) -> list[dict[str, str]]:
    """The rows of a carried table."""
    text = files("meshwright").joinpath(f"catalog/measured/{name}.csv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))


def rates_of(gpu: str, dtype: str = "bf16") -> ComputeRates:
    """The rates of a catalogue GPU for a number type of the tables."""
    recipe: Any = "block" if dtype == "fp8_block" else "tensor"
    precision: Any = "fp8" if dtype.startswith("fp8") else dtype
    return compute_rates(gpu_named(gpu), precision, None, recipe)


def seconds_of(row: dict[str, str]) -> float:
    """The price of a measured matmul, casts and the clock of long runs included."""
    rates = rates_of(row["gpu"], row["dtype"])
    phase: Any = row["phase"]
    groups, m, n, k = (float(row[key]) for key in ("groups", "m", "n", "k"))
    cast = 0.0
    if groups:
        price = compute_seconds(rates, OpKind.GROUPED_MATMUL, phase, (groups, m * groups, n, k), 0, 0)
    else:
        # A dense row states what ran: an input gradient as [m, n]·[n, k], a weight gradient as [n, m]·[m, k].
        forward = {"forward": (m, n, k), "input_gradient": (m, k, n), "weight_gradient": (k, m, n)}[phase]
        price = compute_seconds(rates, OpKind.MATMUL, phase, forward, 0, 0)
        curve = rates.generation.matmul[row["dtype"]]
        if row["casts"] == "1":
            cast = curve.cast_launch_s + m * k * curve.cast_bytes / gpu_named(row["gpu"]).memory_bandwidth
    long_run = row["source"].startswith("simumax")
    return float(price + cast) / ((rates.sustained_fraction or 1.0) if long_run else 1.0)


def median_error(rows: list[dict[str, str]], price: Callable[[dict[str, str]], float]) -> float:
    """Median relative error of time."""
    assert len(rows) > 3
    return float(np.median([abs(price(row) / (float(row["us"]) * 1e-6) - 1) for row in rows]))


@pytest.mark.parametrize(
    ("source", "dtype", "grouped", "most"),
    [
        ("aic-gemm-a100", "bf16", False, 0.04),
        ("aic-gemm-h100", "bf16", False, 0.04),
        ("aic-gemm-h200", "bf16", False, 0.05),
        ("aic-gemm-b200", "bf16", False, 0.08),
        ("aic-gemm-h100", "fp8", False, 0.04),
        ("aic-gemm-h200", "fp8", False, 0.04),
        ("aic-gemm-b200", "fp8", False, 0.08),
        ("aic-gemm-h100", "fp8_block", False, 0.04),
        ("aic-gemm-h200", "fp8_block", False, 0.04),
        ("aic-gemm-b200", "fp8_block", False, 0.03),
        ("deepgemm-a6d97a1", "fp8_block", False, 0.15),
        ("deepgemm-a6d97a1", "fp8_block", True, 0.06),
        ("simumax-b200", "bf16", False, 0.08),
        ("simumax-b200", "bf16", True, 0.11),
    ],
)
def test_matmuls_meet_their_measurements(source: str, dtype: str, grouped: bool, most: float) -> None:
    rows = [
        row
        for row in measured("matmul")
        if (row["source"], row["dtype"], row["groups"] != "0") == (source, dtype, grouped)
        and (row["phase"] != "weight_gradient" or row["output_bytes"] == "8")
    ]
    assert median_error(rows, seconds_of) <= most


def attention_seconds_of(row: dict[str, str]) -> float:
    rates, forward = rates_of(row["gpu"]), row["pass"] == "forward"
    batch, heads, tokens, qk, v = (float(row[k]) for k in ("batch", "heads", "tokens", "qk_dim", "v_dim"))
    pairs = batch * heads * (tokens * (tokens + 1) / 2 if row["causal"] == "1" else tokens**2)
    flops = pairs * (2 * (qk + v) if forward else 6 * qk + 4 * v)
    phase: Phase = "forward" if forward else "input_gradient"
    price = compute_seconds(rates, OpKind.ATTENTION, phase, (batch, heads, tokens, tokens, qk, v), flops, 0)
    return float(price) / ((rates.sustained_fraction or 1.0) if row["source"].startswith("simumax") else 1.0)


@pytest.mark.parametrize(
    ("gpus", "direction", "most"),
    [
        (("h100-sxm",), "forward", 0.09),
        (("h100-sxm",), "backward", 0.06),
        (("b200", "gb200"), "forward", 0.10),
        (("b200", "gb200"), "backward", 0.08),
    ],
)
def test_attention_meets_its_measurements(gpus: tuple[str, ...], direction: str, most: float) -> None:
    rows = [row for row in measured("attention") if row["gpu"] in gpus and row["pass"] == direction]
    assert median_error(rows, attention_seconds_of) <= most


def test_grouped_matmuls_on_hopper_lie_below_the_fused_experts_that_hold_them() -> None:
    """Two matmuls of a fused kernel cannot take longer than the whole of it, but for the fit's own error."""
    ratios = []
    for row in measured("fused_experts"):
        groups, m, hidden, width = (float(row[k]) for k in ("groups", "m", "hidden", "width"))
        up = (groups, groups * m, 2 * width, hidden)
        down = (groups, groups * m, hidden, width)
        rates = rates_of(row["gpu"])
        price = sum(compute_seconds(rates, OpKind.GROUPED_MATMUL, "forward", s, 0, 0) for s in (up, down))
        ratios.append(price / (float(row["us"]) * 1e-6))
    assert 0.5 < np.median(ratios) < 1.0


GPUS = [name for name in gpu_catalogue() if name != "brief-64gb"]
SIZE = st.integers(1, 2**16)
PHASE = st.sampled_from(PHASES)


@given(st.sampled_from(GPUS), PHASE, st.integers(1, 256), SIZE, SIZE, SIZE)
def test_no_matmul_beats_the_peak_or_the_memory(
    gpu: str, phase: Phase, groups: int, m: int, n: int, k: int
) -> None:
    stated = gpu_named(gpu)
    for precision in ("bf16", "fp8", "fp4", "fp32"):
        if precision not in stated.peak:
            continue
        rates = compute_rates(stated, precision, None)
        price = compute_seconds(rates, OpKind.GROUPED_MATMUL, phase, (groups, m * groups, n, k), 0, 0)
        assert price >= 2 * m * groups * n * k / stated.peak_flops_per_s(precision)
        assert price >= groups * n * k * rates.matmul.operand_bytes / stated.memory_bandwidth


@given(
    st.sampled_from(GPUS),
    PHASE,
    st.integers(1, 64),
    st.integers(1, 128),
    st.integers(1, 2**17),
    st.sampled_from([(64, 64), (128, 128), (192, 128), (256, 256)]),
)
def test_no_attention_beats_the_peak(
    gpu: str, phase: Phase, batch: int, heads: int, tokens: int, dims: tuple[int, int]
) -> None:
    stated = gpu_named(gpu)
    qk, v = dims
    flops = (
        batch
        * heads
        * (tokens * (tokens + 1) // 2)
        * (2 * (qk + v) if phase == "forward" else 6 * qk + 4 * v)
    )
    sizes = (batch, heads, tokens, tokens, qk, v)
    price = compute_seconds(rates_of(gpu), OpKind.ATTENTION, phase, sizes, flops, 0)
    assert price >= flops / stated.peak_flops_per_s("bf16")


@given(st.sampled_from(GPUS), PHASE, st.sampled_from(MEMORY_KINDS), st.integers(0, 2**36))
def test_no_other_op_beats_the_memory(gpu: str, phase: Phase, kind: OpKind, moved: int) -> None:
    price = compute_seconds(rates_of(gpu), kind, phase, (1, 1), 0, moved)
    assert price >= moved / gpu_named(gpu).memory_bandwidth
    assert price <= compute_seconds(rates_of(gpu), kind, phase, (1, 1), 0, 2 * moved + 1)


@given(
    st.sampled_from(GPUS),
    PHASE,
    st.lists(SIZE, min_size=4, max_size=4),
    st.integers(0, 3),
    st.integers(1, 4096),
)
def test_a_larger_matmul_takes_longer(
    gpu: str, phase: Phase, sizes: list[int], which: int, more: int
) -> None:
    groups, m, n, k = sizes
    rates = rates_of(gpu)

    def price(groups: int, m: int, n: int, k: int) -> float:
        return float(compute_seconds(rates, OpKind.GROUPED_MATMUL, phase, (groups, m, n, k), 0, 0))

    larger = [groups, m, n, k]
    larger[which] += more
    assert price(*larger) > price(groups, m, n, k)


@given(
    st.sampled_from(GPUS),
    PHASE,
    st.lists(st.tuples(st.integers(1, 64), SIZE, SIZE, SIZE), min_size=1, max_size=6),
)
def test_arrays_are_priced_as_numbers_are(gpu: str, phase: Phase, shapes: list[tuple[int, ...]]) -> None:
    rates = rates_of(gpu)
    columns = [np.array(column) for column in zip(*shapes, strict=True)]
    groups, m, n, k = columns
    cases: list[tuple[OpKind, Any, Any]] = [
        (OpKind.MATMUL, (m, n, k), lambda s: s[1:]),
        (OpKind.GROUPED_MATMUL, (groups, m, n, k), lambda s: s),
        (OpKind.ATTENTION, (groups, 8, n, k, 128, 128), lambda s: (s[0], 8, s[2], s[3], 128, 128)),
        (OpKind.NORM, (m, n), lambda s: s[1:3]),
    ]
    for kind, together, alone in cases:
        found = compute_seconds(rates, kind, phase, together, m * n * k, m * n)
        for i, shape in enumerate(shapes):
            flops, moved = shape[1] * shape[2] * shape[3], shape[1] * shape[2]
            one = compute_seconds(rates, kind, phase, alone(shape), flops, moved)
            assert found[i] == pytest.approx(one, rel=1e-12)


def test_many_small_groups_are_slower_than_one_matmul() -> None:
    rates = rates_of("h100-sxm")
    one = compute_seconds(rates, OpKind.MATMUL, "forward", (8192, 4096, 4096), 0, 0)
    many = compute_seconds(rates, OpKind.GROUPED_MATMUL, "forward", (128, 8192, 4096, 4096), 0, 0)
    assert many > 1.5 * one


def test_fp8_is_faster_than_bf16_but_not_twice() -> None:
    sizes = (8192, 8192, 8192)
    low, fine = (
        compute_seconds(rates_of("h100-sxm", t), OpKind.MATMUL, "forward", sizes, 0, 0)
        for t in ("fp8", "bf16")
    )
    assert 1.5 < fine / low < 2.0


def test_a_flat_efficiency_replaces_the_curves() -> None:
    gpu = gpu_named("h100-sxm")
    flat = compute_rates(gpu, "bf16", decode(Efficiency, {"compute": "50%", "bandwidth": "25%"}))
    for kind in (OpKind.MATMUL, OpKind.GROUPED_MATMUL, OpKind.ATTENTION):
        sizes = (1, 1, 1, 1, 1, 1)
        price = compute_seconds(flat, kind, "forward", sizes, 10**12, 1)
        assert price == pytest.approx(1e12 / (0.5 * gpu.peak_flops_per_s("bf16")))
        assert compute_basis(flat, kind, "forward", sizes) == "assumed"
    price = compute_seconds(flat, OpKind.NORM, "forward", (1, 1), 0, 10**9)
    assert price == pytest.approx(1e9 / (0.25 * gpu.memory_bandwidth))
    assert flat.memory_bytes_per_s == pytest.approx(0.25 * gpu.memory_bandwidth)


def test_a_type_without_a_peak_is_refused() -> None:
    with pytest.raises(InputError):
        compute_rates(gpu_named("a100-80gb"), "fp8", None)


INLINE = decode(
    Gpu,
    {
        "memory": "64 GB",
        "memory_bandwidth": "1.8 TB/s",
        "peak": {"bf16": "400 TFLOP/s", "fp8": "800 TFLOP/s"},
    },
)


def test_a_gpu_without_curves_takes_the_nearest_generation() -> None:
    generation, is_own = generation_for(INLINE)
    assert not is_own
    assert generation is curves().generations["ampere"]
    sizes = (8192, 8192, 8192)
    rates = compute_rates(INLINE, "bf16", None)
    theirs = compute_seconds(rates, OpKind.MATMUL, "forward", sizes, 0, 0)
    a100 = compute_seconds(rates_of("a100-80gb"), OpKind.MATMUL, "forward", sizes, 0, 0)
    assert theirs / a100 == pytest.approx(312 / 400, rel=0.02)
    assert compute_basis(rates, OpKind.MATMUL, "forward", sizes) == "assumed"
    compute_rates(INLINE, "fp8", None)  # of a generation that has no fp8: the shape of bf16


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_of_the_catalogue_has_curves(name: str) -> None:
    assert generation_for(gpu_named(name))[1], name


@pytest.mark.parametrize(
    ("gpu", "dtype", "kind", "phase", "sizes", "basis"),
    [
        ("h100-sxm", "bf16", OpKind.MATMUL, "forward", (4096, 4096, 4096), "measured"),
        ("h100-sxm", "bf16", OpKind.MATMUL, "recompute", (4096, 4096, 4096), "measured"),
        ("h100-sxm", "bf16", OpKind.MATMUL, "weight_gradient", (4096, 4096, 4096), "interpolated"),
        ("h100-sxm", "bf16", OpKind.MATMUL, "forward", (65536, 4096, 4096), "interpolated"),
        ("b200", "bf16", OpKind.MATMUL, "weight_gradient", (4096, 4096, 4096), "measured"),
        ("h100-sxm", "bf16", OpKind.GROUPED_MATMUL, "forward", (8, 8192, 4096, 4096), "interpolated"),
        ("h100-sxm", "fp8", OpKind.GROUPED_MATMUL, "forward", (8, 8192, 4096, 4096), "assumed"),
        ("h100-sxm", "fp8_block", OpKind.GROUPED_MATMUL, "forward", (8, 8192, 4096, 4096), "measured"),
        ("b200", "bf16", OpKind.GROUPED_MATMUL, "weight_gradient", (32, 32768, 4096, 7168), "measured"),
        ("b200", "bf16", OpKind.GROUPED_MATMUL, "forward", (2, 32768, 4096, 7168), "interpolated"),
        ("b200", "fp4", OpKind.MATMUL, "forward", (4096, 4096, 4096), "assumed"),
        ("h100-sxm", "fp32", OpKind.MATMUL, "forward", (4096, 4096, 4096), "assumed"),
        ("h100-sxm", "bf16", OpKind.ATTENTION, "forward", (1, 64, 8192, 8192, 128, 128), "measured"),
        ("h100-sxm", "bf16", OpKind.ATTENTION, "forward", (1, 4, 4096, 4096, 128, 128), "interpolated"),
        ("mi300x", "bf16", OpKind.MATMUL, "forward", (8192, 8192, 8192), "interpolated"),
        ("mi300x", "bf16", OpKind.ATTENTION, "forward", (1, 64, 8192, 8192, 128, 128), "assumed"),
        ("h100-sxm", "bf16", OpKind.NORM, "forward", (8192, 8192), "assumed"),
    ],
)
def test_a_price_says_what_stands_behind_it(
    gpu: str, dtype: str, kind: OpKind, phase: Phase, sizes: tuple[int, ...], basis: str
) -> None:
    assert compute_basis(rates_of(gpu, dtype), kind, phase, sizes) == basis


def test_the_curves_are_what_the_tables_give() -> None:
    done = subprocess.run(
        [sys.executable, "tools/fit_curves.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_row_has_a_source() -> None:
    known = {row["source"] for row in measured("sources")}
    used = {
        row["source"]
        for name in ("matmul", "attention", "fused_experts", "collectives")
        for row in measured(name)
    }
    assert used == known


def test_the_carried_tables_stay_small() -> None:
    folder = ROOT / "src" / "meshwright" / "catalog" / "measured"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
