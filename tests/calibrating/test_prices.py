"""A table's prices: what was measured comes back, between it something in between, and what is covered."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import DENSE, MOE, small_deployment
from hypothesis import given
from hypothesis import strategies as st
from tables import linear, table_for

from meshwright.calibrating.answer import _shapes, coverage
from meshwright.calibrating.references import FEW, MORE, constants_from, references
from meshwright.calibrating.shapes import MOST_WORK, of_programs
from meshwright.cost.measured import MeasuredRates, Surface, measured_rates, op_label
from meshwright.deployment import deployment_from
from meshwright.efficiency_table import EfficiencyTable, LinkPoint, OpPoint
from meshwright.ir.graph import CollectiveKind
from meshwright.ir.program import lower
from meshwright.ir.tasks import ComputeTask
from meshwright.plan import Plan, resolve
from meshwright.planner.answer import plan_deployment
from meshwright.planner.estimate import estimate
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import simulate


def plan(feed_forward: dict[str, Any] = MOE, **parts: Any) -> Plan:
    """A small plan."""
    return resolve(deployment_from(small_deployment(feed_forward, **parts), Path()))


def with_table(one: Plan, table: EfficiencyTable) -> Plan:
    """The plan on a machine that was measured."""
    return one.model_copy(update={"cluster": one.cluster.model_copy(update={"calibration": table})})


def tasks_of(one: Plan) -> list[ComputeTask]:
    """Every op of a plan in every phase."""
    return [t for stage in lower(one).stages for t in stage.tasks() if isinstance(t, ComputeTask)]


def points_at(*rows: tuple[tuple[int, ...], float]) -> Surface:
    """A surface through points of one op."""
    points = [OpPoint(op="matmul", phase="forward", sizes=sizes, time_s=s) for sizes, s in rows]
    return Surface.through(points, [sizes for sizes, _ in rows])


DIMS = st.tuples(*[st.integers(1, 10_000)] * 3)


@given(rows=st.dictionaries(DIMS, st.floats(1e-6, 1.0), min_size=1, max_size=12), other=DIMS)
def test_a_surface_passes_through_its_points_and_stays_positive(
    rows: dict[tuple[int, ...], float], other: tuple[int, ...]
) -> None:
    surface = points_at(*rows.items())
    for sizes, seconds in rows.items():
        assert surface.has(sizes)
        assert float(surface.seconds(sizes)) == pytest.approx(seconds, rel=1e-3)
    assert float(surface.seconds(other)) > 0


def test_between_two_points_of_one_rate_the_rate_holds() -> None:
    surface = points_at(((64, 64, 64), 1e-6 + 64**3 * 1e-9), ((512, 64, 64), 1e-6 + 8 * 64**3 * 1e-9))
    found = float(surface.seconds((256, 64, 64)))
    assert 1e-6 + 3 * 64**3 * 1e-9 < found < 1e-6 + 6 * 64**3 * 1e-9


def test_arrays_are_priced_as_their_elements_are() -> None:
    surface = points_at(((64, 64, 64), 1e-4), ((512, 64, 128), 5e-4), ((128, 256, 64), 4e-4))
    m, n = np.array([32, 64, 4096]), np.array([64, 64, 8])
    together = surface.seconds((m, n, 64))
    alone = [float(surface.seconds((int(a), int(b), 64))) for a, b in zip(m, n, strict=True)]
    assert together.tolist() == pytest.approx(alone)


@pytest.mark.parametrize("feed_forward", [DENSE, MOE], ids=["dense", "experts"])
def test_every_shape_of_its_plan_is_measured(feed_forward: dict[str, Any]) -> None:
    one = plan(feed_forward)
    rates = measured_rates(table_for(one), "fp32", 1)
    for task in tasks_of(one):
        assert rates.op_basis(task) == "measured"
        phase = "forward" if task.phase == "recompute" else task.phase
        expected = linear((op_label(task), phase, task.sizes))
        assert float(rates.op_seconds(task, task.sizes)) == pytest.approx(expected, rel=1e-6)


def test_other_shapes_are_interpolated_and_other_ops_not_covered() -> None:
    one, longer = plan(DENSE), plan(DENSE, batch=(2, 24))
    rates = measured_rates(table_for(one), "fp32", 1)
    words = {rates.op_basis(task) for task in tasks_of(longer)}
    assert words <= {"measured", "interpolated"}
    assert "interpolated" in words
    routed = [task for task in tasks_of(plan(MOE)) if ".moe." in task.name]
    assert {rates.op_basis(t) for t in routed if t.kind.value == "grouped_matmul"} == {"assumed"}
    with_more = measured_rates(table_for(one), "fp32", 4)
    assert {with_more.op_basis(task) for task in tasks_of(one)} == {"interpolated"}
    assert all(rates.op_seconds(t, t.sizes) is None for t in routed if t.kind.value == "grouped_matmul")


def test_collectives_are_measured_within_payloads_and_groups() -> None:
    rates = measured_rates(table_for(plan()), "fp32", 1)
    kind = CollectiveKind.ALL_REDUCE
    assert rates.collective_basis(kind, 5_000, 2) == "measured"
    assert rates.collective_basis(kind, 5_000, 4) == "assumed"
    assert rates.collective_basis(kind, 10**9, 2) == "interpolated"
    assert float(rates.collective_seconds(kind, 1_000_000, 2)) == pytest.approx(1.1e-3)
    assert rates.collective_seconds(kind, np.array([4, 4]), np.array([1, 2]))[0] == 0.0
    larger = [link.model_copy(update={"ranks": 8}) for link in table_for(plan()).links]
    both = measured_rates(table_for(plan(), links=(*table_for(plan()).links, *larger)), "fp32", 1)
    assert both.collective_basis(kind, 5_000, 4) == "interpolated"
    bare = measured_rates(table_for(plan(), links=()), "fp32", 1)
    assert bare.collective_seconds(kind, 4, 2) is None
    assert bare.collective_basis(kind, 4, 2) == "assumed"


def test_coverage_adds_up_and_names_what_is_open() -> None:
    one = plan(DENSE)
    whole = coverage(one, table_for(one))
    assert whole.shares["measured"] == pytest.approx(1.0)
    assert whole.unmeasured == ()
    foreign = coverage(plan(MOE), table_for(one))
    assert sum(foreign.shares.values()) == pytest.approx(1.0)
    assert foreign.shares["assumed"] > 0
    assert any(open_.basis == "assumed" and "grouped_matmul" in open_.what for open_ in foreign.unmeasured)


def test_a_step_of_one_rank_is_the_sum_of_its_measured_ops() -> None:
    one = plan(DENSE, layers=2)
    table = table_for(one)
    rates = measured_rates(table, "fp32", 1)
    ops = sum(float(rates.op_seconds(task, task.sizes)) for task in tasks_of(one))
    update = max(p.sizes[0] for p in table.kernels[0].points if p.op == "optimizer")
    expected = one.num_micro_batches * ops + float(rates.update_seconds(update))
    found = estimate(with_table(one, table)).total_s
    assert found == pytest.approx(expected, rel=1e-6)
    assert simulate(with_table(one, table)).step_time_s == pytest.approx(found, rel=1e-9)


def test_launches_add_up_on_processors() -> None:
    one = plan(DENSE)
    table = table_for(one)
    slow = table.kernels[0].model_copy(update={"host_s": {"dense": 1e-3, "experts": 1e-3}, "step_s": 0.5})
    before = estimate(with_table(one, table))
    after = estimate(with_table(one, table.model_copy(update={"kernels": (slow,)})))
    launched = one.num_micro_batches * len(tasks_of(one)) * 1e-3
    assert after.total_s - before.total_s == pytest.approx(launched + 0.5)
    assert after.parts["other"] - before.parts["other"] == pytest.approx(0.5)


def test_tokens_of_one_sender_stand_in_order_already() -> None:
    alone, divided = plan(MOE), plan(MOE, ranks=2, ep=2)
    sorts = [task for task in tasks_of(alone) if task.name.endswith((".sort", ".unsort"))]
    assert sorts

    def costly(shape: Any) -> float:
        return 1.0 if shape[0] in ("sort", "unsort") else linear(shape)

    table = table_for(alone, divided, seconds=costly)
    assert estimate(with_table(alone, table)).total_s < 0.1
    assert estimate(with_table(divided, table)).total_s > 1.0


def test_the_search_prices_as_the_plan_does() -> None:
    document = small_deployment(MOE, ranks=2, batch=(4, 16))
    document["layout"], document["policy"] = {"pp": 1}, {"engine": "native", "micro_batch_size": 1}
    one = plan(MOE, ranks=2, batch=(4, 16))
    document["cluster"] = {"local": 2, "calibration": table_for(one).model_dump(mode="json")}
    best = plan_deployment(deployment_from(document, Path())).plans
    assert best
    assert all(row.plan.cluster.calibration is not None for row in best)
    for row in best:
        assert row.step.total_s == pytest.approx(estimate(row.plan).total_s, rel=1e-6)


def test_constants_come_back_from_steps_that_they_made() -> None:
    asked = references(None, "fp32")
    assert {(one.kind, one.layers) for one in asked} == {
        (kind, count) for kind in ("dense", "experts") for count in (FEW, MORE)
    }
    table = table_for(*(one.plan for one in asked))
    host = {"dense": 2e-5, "experts": 7e-5}
    truth = table.kernels[0].model_copy(update={"host_s": host, "step_s": 3e-3})
    full = table.model_copy(update={"kernels": (truth,)})
    seconds = [estimate(with_table(one.plan, full)).total_s for one in asked]
    found = constants_from(asked, seconds, table, is_serial=True)
    # The embedding and the head count with the kind of the model's blocks, so that a step's own time takes up
    # what they differ by.
    assert found.host_s == pytest.approx(host, rel=1e-3)
    assert found.step_s == pytest.approx(3e-3, rel=0.2)


def test_a_gpu_runs_beside_its_host() -> None:
    one = plan(DENSE)
    table = table_for(one)
    on_gpu = table.model_copy(
        update={"machine": table.machine.model_copy(update={"device": "cuda", "gpu": "H100"})}
    )
    rates: MeasuredRates = measured_rates(on_gpu, "fp32", 1)
    assert not rates.is_serial
    slow = on_gpu.kernels[0].model_copy(update={"host_s": {"dense": 1e-6, "experts": 1e-6}})
    beside = estimate(with_table(one, on_gpu.model_copy(update={"kernels": (slow,)})))
    serial = estimate(with_table(one, table.model_copy(update={"kernels": (slow,)})))
    assert beside.total_s < serial.total_s
    assert simulate(with_table(one, table), Options()).step_time_s > 0


def test_links_of_more_ranks_take_their_own_points() -> None:
    one = plan()
    links = tuple(
        LinkPoint(collective="all_gather", ranks=ranks, bytes=1000, time_s=1e-4 * ranks) for ranks in (2, 4)
    )
    rates = measured_rates(table_for(one, links=links), "fp32", 1)
    found = [float(rates.collective_seconds(CollectiveKind.ALL_GATHER, 1000, ranks)) for ranks in (2, 4)]
    assert found == pytest.approx([2e-4, 4e-4])


def test_long_ops_are_timed_on_fewer_rows() -> None:
    huge = plan(DENSE, batch=(1, 1 << 22))
    shapes = of_programs([lower(huge)], "cpu")
    matmuls = [sizes for op, _, sizes in shapes if op == "matmul"]
    asked = {task.sizes for task in tasks_of(huge) if task.kind.value == "matmul"}
    assert max(2 * prod(sizes) for sizes in asked) > MOST_WORK["cpu"]
    assert max(2 * prod(sizes) for sizes in matmuls) <= MOST_WORK["cpu"]
    assert {sizes[1:] for sizes in matmuls} == {sizes[1:] for sizes in asked}
    assert len(set(shapes)) == len(shapes)


def test_ranks_at_work_measure_the_ops_of_plans_of_as_many() -> None:
    one, two = plan(DENSE), plan(DENSE, ranks=2, batch=(4, 48))
    asked = references(one, "fp32")
    by_ranks = [set(_shapes([one, two], asked, ranks, "cpu")) for ranks in (1, 2, 3)]
    assert by_ranks[0] != by_ranks[1]
    assert by_ranks[2] == by_ranks[0] | by_ranks[1]
