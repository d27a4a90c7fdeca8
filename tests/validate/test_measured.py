"""What a row measured, in SI units."""

from __future__ import annotations

from typing import Any

import pytest
from tests.validate.run_rows import row_of

from meshwright.cost.memory import memory, worst
from meshwright.ir.program import lower
from meshwright.validate.described import Run, describe
from meshwright.validate.footprint import memory_bytes
from meshwright.validate.measured import (
    MeasuredMemory,
    Throughput,
    memory_of,
    seen_bytes,
    step_time_of,
    throughput_of,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"iteration_time_s": 2.0, "iteration_time_derived_s": 3.0}, 2.0),
        ({"iteration_time_s": None, "iteration_time_derived_s": 3.0}, 3.0),
        ({"iteration_time_s": None, "tokens_per_s_per_gpu": 4096.0}, 64 * 2048 / (4096 * 8)),
        ({"iteration_time_s": None, "tokens_per_s_per_gpu": 1.0, "global_batch_size": None}, None),
        ({"iteration_time_s": 0.0}, None),
    ],
)
def test_the_step_time(given: dict[str, Any], expected: float | None) -> None:
    assert step_time_of(row_of(**given)) == expected


def test_what_ranks_rows_without_a_time() -> None:
    figures = {"tflops_per_gpu": 400.0, "tflops_definition": "model", "mfu_percent": 40.0}
    assert throughput_of(row_of(**figures)) == Throughput(400.0, "TFLOP/s: model")
    assert throughput_of(row_of(**{**figures, "tflops_per_gpu": None})) == Throughput(40.0, "MFU: model")
    assert throughput_of(row_of(tokens_per_s_per_gpu=7.0)) == Throughput(7.0, "tokens/s/GPU")
    assert throughput_of(row_of()) is None


@pytest.mark.parametrize(
    ("definition", "unit", "view"),
    [
        ("GiB torch max_allocated over ranks (per-rank in json); reserved 70.885 GiB", GIB, "allocated"),
        ("GiB max across ranks (torchtitan: reserved)", GIB, "reserved"),
        ("GB as printed (torch max allocated)", 10**9, "allocated"),
        ("mem-max-allocated GB (1e9), max over logged steps", 10**9, "allocated"),
        ("GB reserved (45552 MB)", 10**9, "reserved"),
        ("GB as printed", 10**9, "unstated"),
        ("GiB", GIB, "unstated"),
    ],
)
def test_memory_in_the_unit_and_view_of_its_definition(definition: str, unit: int, view: str) -> None:
    row = row_of(memory=50.0, memory_definition=definition)
    assert memory_of(row) == MeasuredMemory(50 * unit, view)  # type: ignore[arg-type]


def test_what_is_no_measurement_of_memory() -> None:
    assert memory_of(row_of(memory=None, memory_definition="GiB")) is None
    assert memory_of(row_of(memory=9.0, memory_definition="GB breakdown: weights+grads 36.4")) is None


def test_three_views_of_one_rank() -> None:
    run = describe(row_of())
    assert isinstance(run, Run)
    rank = worst(memory(lower(run.candidates[0].plan)))
    allocated, reserved = (seen_bytes(rank, view) for view in ("allocated", "reserved"))
    assert reserved == allocated + rank.line("allocator slack")
    assert rank.total_bytes == reserved + rank.line("runtime context")
    assert seen_bytes(rank, "unstated") == allocated


def test_the_footprint_of_a_run_is_the_median_of_its_plans() -> None:
    assert memory_bytes(_run(memory=None)) is None
    one, two = (_run(micro_batch_size=size, memory=9.0, memory_definition="GB reserved") for size in (1, 4))
    several = _run(micro_batch_size=None, global_batch_size=32, memory=9.0, memory_definition="GB reserved")
    assert len(several.candidates) == 3
    low, middle, high = memory_bytes(one), memory_bytes(several), memory_bytes(two)
    assert low is not None
    assert middle is not None
    assert high is not None
    assert low < middle < high


def _run(**given: Any) -> Run:
    run = describe(row_of(**given))
    assert isinstance(run, Run)
    return run
