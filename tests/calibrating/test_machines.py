"""Which clusters a table prices, and what it leaves to curves and constants there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import MOE, small_deployment
from tables import table_for

from meshwright.__main__ import main
from meshwright.deployment import deployment_from
from meshwright.efficiency_table import EfficiencyTable, LinkPoint, OpPoint, write_table
from meshwright.errors import InputError
from meshwright.files import to_yaml
from meshwright.gpus import is_named
from meshwright.ir.graph import OpKind
from meshwright.ir.program import lower
from meshwright.ir.tasks import ComputeTask
from meshwright.machine import this_machine
from meshwright.plan import Plan, resolve
from meshwright.planner.confidence import confidence_of
from meshwright.planner.estimate import estimate, running_of
from meshwright.planner.prices import Conditions, Prices, prices
from meshwright.planner.times import (
    KERNELS,
    axis_groups,
    compute_in_step,
    price_collective,
    price_op,
)
from meshwright.runs import runs_in
from meshwright.simulator.simulate import simulate

H100 = "NVIDIA H100 80GB HBM3"


def local() -> dict[str, Any]:
    """A small deployment on two processes."""
    return small_deployment(MOE, ranks=2, ep=2, batch=(4, 16))


def two_nodes(**cluster: Any) -> dict[str, Any]:
    """Sixteen H100 in two nodes: experts inside each, data parallelism across both."""
    document = small_deployment({**MOE, "num_experts": 8}, ranks=16, ep=8, batch=(16, 16))
    return {
        **document,
        "cluster": {"nodes": 2, "gpu": "h100-sxm", **cluster},
        "workload": {**document["workload"], "precision": "bf16"},
    }


def of_gpu(gpu: str, points: tuple[OpPoint, ...] = (), **parts: Any) -> EfficiencyTable:
    """A table of eight GPUs of one node with some ops: by default one that no plan here has."""
    table = table_for(resolve(deployment_from(local(), Path())))
    unused = OpPoint(op="shared_scale", phase="forward", sizes=(8, 8), time_s=1.0)
    kernels = table.kernels[0].model_copy(
        update={"precision": "bf16", "ranks": 8, "points": points or (unused,)}
    )
    machine = table.machine.model_copy(update={"device": "cuda", "gpu": gpu})
    fields = {"machine": machine, "kernels": (kernels,), "links": ()}
    return table.model_copy(update={**fields, **parts})


def priced_by(table: EfficiencyTable | None) -> Plan:
    """The plan of two nodes, with a table or without."""
    beside = {} if table is None else {"calibration": table.model_dump(mode="json")}
    return resolve(deployment_from(two_nodes(**beside), Path()))


def with_host_of(table: EfficiencyTable, plan: Plan) -> EfficiencyTable:
    """The table with what launches and a step cost without it."""
    usual = prices(plan.cluster, plan.workload.precision, plan.policy.engine)
    host = {kind: usual.constants.host[kind].value for kind in ("dense", "experts")}
    kernels = table.kernels[0].model_copy(update={"host_s": host, "step_s": usual.step_s})
    return table.model_copy(update={"kernels": (kernels,)})


@pytest.mark.parametrize(
    ("name", "driver", "same"),
    [
        ("h100-sxm", H100, True),
        ("h100-sxm", "NVIDIA H100 PCIe", False),
        ("h100-sxm", "NVIDIA H100 NVL", False),
        ("h100-96gb", H100, False),
        ("h200", H100, False),
        ("a100-80gb", "NVIDIA A100-SXM4-80GB", True),
        ("a100-40gb", "NVIDIA A100-SXM4-80GB", False),
        ("gb200", "NVIDIA GB200", True),
        ("b200", "NVIDIA GB200", False),
        ("mi300x", "AMD Instinct MI300X", True),
        ("brief-64gb", H100, False),
        ("h100-sxm", "NVIDIA H100 96GB HBM3", False),
        ("h100-96gb", "NVIDIA H100 96GB HBM3", True),
        ("h100-sxm", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", False),
    ],
)
def test_a_driver_names_a_gpu_of_the_catalogue(name: str, driver: str, same: bool) -> None:
    assert is_named(name, driver) is same


def test_processors_price_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table = tmp_path / "plan.yaml", tmp_path / "here.yaml"
    file.write_text(to_yaml(two_nodes()), "utf-8")
    write_table(table_for(resolve(deployment_from(local(), Path()))), table)
    for command in ("plan", "simulate"):
        assert main([command, str(file), "--calibration", str(table)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "cluster.calibration: 'abacus, 2 processors" in said.err
        assert "processors were measured, and the cluster has h100-sxm" in said.err
        assert "cluster: local" in said.err
        assert len(said.err.strip().splitlines()) == 1


def test_another_gpu_is_refused_by_its_name() -> None:
    with pytest.raises(InputError, match="another GPU was measured than the cluster's h100-sxm") as caught:
        priced_by(of_gpu("NVIDIA H200"))
    assert caught.value.nearest == ("h200",)
    assert priced_by(of_gpu(H100)).defaults["cluster.calibration"].startswith("prices of ops and collectives")


def test_a_table_of_another_machine_is_noted_on_local_ranks() -> None:
    document = local()
    table = table_for(resolve(deployment_from(document, Path())))
    document["cluster"]["calibration"] = table.model_dump(mode="json")
    noted = resolve(deployment_from(document, Path())).defaults["cluster.calibration"]
    assert noted.endswith("that is not this machine")
    own = table.model_copy(update={"machine": this_machine()})
    document["cluster"]["calibration"] = own.model_dump(mode="json")
    assert (
        "not this machine" not in resolve(deployment_from(document, Path())).defaults["cluster.calibration"]
    )


def test_what_a_table_does_not_hold_costs_what_it_did() -> None:
    before = priced_by(None)
    after = priced_by(with_host_of(of_gpu(H100), before))
    one, other = estimate(before), estimate(after)
    assert one.parts["dp"] > 0
    assert dict(other.parts) == pytest.approx(dict(one.parts))
    assert simulate(after).step_time_s == pytest.approx(simulate(before).step_time_s)
    rates = [prices(p.cluster, p.workload.precision, p.policy.engine) for p in (before, after)]
    for name in ("slowdown", "grouped", "memory", "attention", "network", "exchange_s", "update"):
        assert getattr(rates[1], name) == getattr(rates[0], name)
    assert rates[1].network > 1
    assert rates[1].slowdown > 1


def test_a_measured_op_has_no_factor_and_leaves_the_others_theirs() -> None:
    before = priced_by(None)
    tasks = [
        task for stage in lower(before).stages for task in stage.tasks() if isinstance(task, ComputeTask)
    ]
    head = {task.phase: task for task in tasks if task.name == "head"}
    points = [OpPoint(op="matmul", phase=phase, sizes=task.sizes, time_s=1.0) for phase, task in head.items()]
    after = priced_by(of_gpu(H100, tuple(points)))
    usual, rates = (prices(p.cluster, "bf16", "native") for p in (before, after))
    running = running_of(after, rates, Conditions())

    def seconds(task: ComputeTask, charged: Prices) -> float:
        return float(
            compute_in_step({**dict.fromkeys(KERNELS, 0.0), **price_op(task, charged, running)}, charged)
        )

    for task in head.values():
        assert seconds(task, rates) == pytest.approx(1.0)
        assert seconds(task, usual) < 1e-3
    others = [task for task in tasks if task.kind is not OpKind.MATMUL]
    assert {OpKind.ATTENTION, OpKind.GROUPED_MATMUL, OpKind.NORM} <= {task.kind for task in others}
    assert [seconds(task, rates) for task in others] == [seconds(task, usual) for task in others]


def test_collectives_are_measured_inside_a_node_alone() -> None:
    links = tuple(
        LinkPoint(collective=kind, ranks=8, bytes=size, time_s=7.0)
        for kind in ("all_to_all", "reduce_scatter", "all_gather", "all_reduce")
        for size in (4, 1 << 30)
    )
    before, after = priced_by(None), priced_by(of_gpu(H100, links=links))
    program = lower(after)
    rates = prices(after.cluster, "bf16", "native")
    running = running_of(after, rates, Conditions())
    groups = axis_groups(after.cluster, after.layout.degrees())
    usual = prices(before.cluster, "bf16", "native")
    seen = set()
    for task, _ in program.collectives(0):
        if task.axis not in groups or task.num_ranks == 1:
            continue
        near, far = price_collective(task, rates, groups, running)
        seen.add(task.axis)
        if task.axis == "ep":
            assert float(near) == pytest.approx(7.0, rel=0.1)  # between two points far apart
            assert float(far) == 0.0
        else:
            expected = price_collective(task, usual, groups, running)
            assert (float(near), float(far)) == pytest.approx(tuple(map(float, expected)))
    assert {"ep", "dp_cp"} <= seen
    words = [open_ for open_ in confidence_of(program, rates, running).unmeasured if "over ep" in open_.what]
    assert words == []


def test_simulate_says_which_table_priced_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table = tmp_path / "plan.yaml", tmp_path / "here.yaml"
    file.write_text(to_yaml(local()), "utf-8")
    written = table_for(resolve(deployment_from(local(), Path())))
    write_table(written, table)
    assert main(["simulate", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] is None
    assert main(["simulate", str(file), "--calibration", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] == written.digest
    assert main(["simulate", str(file), "--calibration", str(table)]) == 0
    assert "measured on 2026-11-25, abacus" in " ".join(capsys.readouterr().out.split())


def test_a_scaled_down_plan_is_priced_by_the_table_of_this_machine(tmp_path: Path) -> None:
    """Its file is for GPUs, which processors do not price."""
    example = Path(__file__).parents[2] / "examples" / "brief-repaired.yaml"
    table, output = tmp_path / "here.yaml", tmp_path / "run"
    written = table_for(resolve(deployment_from(local(), Path())))
    write_table(written, table)
    asked = ["train", str(example), "--scale-down", "--nproc", "1", "--steps", "1"]
    assert main([*asked, "--calibration", str(table), "-o", str(output)]) == 0
    (kept,) = runs_in(output)
    assert kept.record.calibration == written.digest


def test_groups_larger_than_measured_cost_what_they_did() -> None:
    document = {**small_deployment(MOE, ranks=8, ep=2, batch=(16, 16))}
    plan = resolve(deployment_from(document, Path()))
    table = table_for(plan)
    assert {link.ranks for link in table.links} == {2}
    after = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"calibration": table})})
    usual, rates = (prices(p.cluster, "fp32", "native") for p in (plan, after))
    running = running_of(after, rates, Conditions())
    groups = axis_groups(after.cluster, after.layout.degrees())
    seen = set()
    for task, _ in lower(after).collectives(0):
        if task.axis not in groups or task.num_ranks == 1:
            continue
        found, before = (price_collective(task, one, groups, running) for one in (rates, usual))
        same = [float(one) for one in found] == pytest.approx([float(one) for one in before])
        seen.add((task.num_ranks, same))
    assert (2, False) in seen
    assert (8, True) in seen
    assert (8, False) not in seen
