"""Intervals come from residuals by group, and are wider where nothing was measured."""

from __future__ import annotations

from math import exp, log
from pathlib import Path

import pytest
from tests.validate.run_rows import EXPERTS, row_of
from tests.validate.synthetic import run_of

from meshwright.plan import Plan
from meshwright.planner.interval import (
    MOST_GPUS,
    UNMEASURED,
    closest,
    group_of,
    half_width_of,
    interval,
    residuals,
    width_of,
)
from meshwright.validate.described import GROUPS, read_runs

RUNS = Path(__file__).parents[2] / "benchmarks/accuracy/training_runs.csv"


def plan_of(**given: object) -> Plan:
    return run_of(row_of(**given)).candidates[0].plan


def test_every_group_of_runs_has_residuals() -> None:
    assert set(residuals()) >= set(GROUPS)
    assert {name.partition("/")[0] for name in residuals()} == set(GROUPS)
    for name, entry in residuals().items():
        assert 0 < half_width_of(name) < 1, "an 80 % interval within a factor of e"
        assert entry.rows > 0


def test_the_closest_runs_are_those_of_the_generation_where_there_are_enough() -> None:
    assert closest("dense", "hopper") == "dense/hopper"
    assert residuals()["dense/hopper"].rows >= 20
    assert closest("moe_efa", "hopper") == "moe_efa", "too few rows of it"
    assert closest("dense", "other") == "dense"
    assert closest("dense", "blackwell", 256) == "dense/blackwell"
    assert closest("dense", "blackwell", 512) == "dense", "no run there has so many GPUs"
    plan = plan_of()
    assert "dense runs on" in width_of(plan.model, plan.cluster, "megatron").words


def test_a_plan_belongs_to_the_runs_that_it_is_like() -> None:
    dense, experts = plan_of(), plan_of(**EXPERTS)
    over_efa = plan_of(interconnect="NVLink + EFA 32x100Gb/s per node", num_gpus=16, **EXPERTS)
    assert [group_of(p.model, p.cluster) for p in (dense, experts, over_efa)] == [
        "dense",
        "moe_full",
        "moe_efa",
    ]
    assert group_of(dense.model, over_efa.cluster) == "dense"


def test_an_interval_reaches_equally_far_both_ways_in_logarithms() -> None:
    plan = plan_of()
    low, high = interval(plan, 2.0)
    assert log(high / 2.0) == pytest.approx(log(2.0 / low)) == pytest.approx(half_width_of("dense/hopper"))
    again = interval(plan, 20.0)
    assert again == pytest.approx((10 * low, 10 * high))


def test_an_interval_is_wider_where_no_run_was_measured() -> None:
    plan = plan_of()
    known = width_of(plan.model, plan.cluster, "megatron")
    assert known.wider == ()
    assert f"within a factor {exp(known.half_width):.2f}" in known.words
    native = width_of(plan.model, plan.cluster, "native")
    assert native.half_width == pytest.approx(UNMEASURED * known.half_width)
    assert "no dense run of the native engine has been measured" in native.words
    other = plan.cluster.model_copy(update={"gpu": plan.cluster.gpu.model_copy(update={"name": "mi300x"})})
    assert "no run on mi300x has been measured" in width_of(plan.model, other, "megatron").words


def test_an_engine_and_a_size_count_as_measured_for_the_runs_that_a_plan_is_like() -> None:
    dense, experts = plan_of(), plan_of(**EXPERTS)
    assert width_of(dense.model, dense.cluster, "deepspeed").wider == ()
    assert width_of(experts.model, experts.cluster, "megatron").wider == ()
    (why,) = width_of(experts.model, experts.cluster, "deepspeed").wider
    assert "no MoE run of the deepspeed engine" in why
    many = experts.cluster.model_copy(update={"nodes": 64})
    (why,) = width_of(experts.model, many, "megatron").wider
    assert "more than 256 GPUs" in why


def test_the_largest_measured_runs_are_those_of_the_table() -> None:
    """Of a group by time or throughput; on a generation, whose own width is shipped, by time."""
    most = dict.fromkeys(MOST_GPUS, 0)
    for run in read_runs(RUNS).runs:
        names = [run.group, *([f"{run.group}/{run.generation}"] if run.measured_s else [])]
        for name in names:
            if name in most:
                most[name] = max(most[name], run.row.num_gpus or 0)
    assert most == MOST_GPUS
