"""Figures of speed: each against the step-time model, and against arithmetic done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.audit.test_figures import BASE

from meshwright.audit import Checked, audit
from meshwright.audit.speed import on_fewer_gpus
from meshwright.cost.memory import memory, worst
from meshwright.deployment import deployment_from
from meshwright.ir.program import lower, model_flops
from meshwright.plan import Plan, resolve
from meshwright.planner.estimate import estimate
from meshwright.planner.interval import interval, ratio_factor
from meshwright.units import SECONDS

RANGE = {"global_batch_size": 64, "sequence_length": {"min": 128, "max": 4096}}
WIDER = {**BASE["model"], "hidden_size": 1024, "moe_intermediate_size": 2048}
STEEP: dict[str, Any] = {  # from waiting for launches to computing: the intervals at the ends are far apart
    "workload": {"global_batch_size": 64, "sequence_length": {"min": 128, "max": 16384}},
    "model": {**WIDER, "hidden_size": 4096},
}


def described(**changes: dict[str, Any]) -> dict[str, Any]:
    """The small deployment of test_figures with keys of its parts changed; a model stands for itself."""
    merged = {key: {**value, **changes.get(key, {})} for key, value in BASE.items()}
    return merged | {key: value for key, value in changes.items() if key not in BASE or key == "model"}


def one(figure: str, value: Any, at: dict[str, int] | None = None, **changes: Any) -> Checked:
    document = described(**changes)
    document["claims"] = {"figures": [{"id": figure, "value": value, "at": at or {}}]}
    return audit(deployment_from(document, Path())).claims[0]


def planned(**changes: Any) -> Plan:
    return resolve(deployment_from(described(**changes), Path()))


def at_lengths(checked: Checked) -> dict[int, tuple[float, float, float]]:
    return {at.sequence_length: (at.value, at.low, at.high) for at in checked.by_length}


def test_a_step_time_is_the_models_at_both_ends_of_a_range() -> None:
    plan = planned(workload=RANGE)
    checked = one("step_time", "1 s", workload=RANGE)
    found = at_lengths(checked)
    assert found.keys() == {128, 4096}
    for length, (value, low, high) in found.items():
        step = estimate(plan, sequence_length=length).total_s
        assert value == pytest.approx(step, rel=1e-12)
        assert (low, high) == pytest.approx(interval(plan, step), rel=1e-12)
    assert checked.computed == found[4096][0]


def test_rate_and_mfu_follow_from_the_step_time() -> None:
    plan = planned(workload=RANGE)
    times = at_lengths(one("step_time", "1 s", workload=RANGE))
    rates = at_lengths(one("sequences_per_s", 1, workload=RANGE))
    shares = at_lengths(one("mfu", "1%", workload=RANGE))
    for length, (value, low, high) in times.items():
        assert rates[length] == pytest.approx((64 / value, 64 / high, 64 / low), rel=1e-12)
        flops = model_flops(plan, length) / (16 * 500e12)
        assert shares[length] == pytest.approx((flops / value, flops / high, flops / low), rel=1e-12)


@pytest.mark.parametrize(("share", "verdict"), [(0.5, "holds"), (-0.2, "fails"), (1.2, "fails")])
@pytest.mark.parametrize("figure", ["step_time", "sequences_per_s", "mfu", "strong_scaling_efficiency"])
def test_inside_the_interval_holds_and_outside_fails(figure: str, share: float, verdict: str) -> None:
    """`share` of the way from the interval's low end to its high end, at one length."""
    units = {"step_time": " s", "sequences_per_s": "", "mfu": "%", "strong_scaling_efficiency": "%"}
    placeholder = f"1{units[figure]}" if units[figure] else 1
    ((_, low, high),) = at_lengths(one(figure, placeholder)).values()
    stated = low + share * (high - low)
    value = stated if figure == "sequences_per_s" else f"{stated * (100 if '%' in units[figure] else 1):.9f}"
    checked = one(figure, f"{value}{units[figure]}" if units[figure] else value)
    assert checked.verdict == verdict, checked.why


def test_between_the_ends_it_depends_on_the_length() -> None:
    """A step within the interval of the longest sequence alone: undetermined, with the length in words."""
    times = at_lengths(one("step_time", "1 s", **STEEP))
    assert times[16384][1] > times[128][2]  # the two intervals are apart
    checked = one("step_time", f"{times[16384][0]:.9f} s", **STEEP)
    assert checked.verdict == "undetermined"
    assert "can hold above about" in checked.why
    between = (times[128][2] + times[16384][1]) / 2
    checked = one("step_time", f"{between:.9f} s", **STEEP)
    assert checked.verdict == "undetermined"
    assert "can hold between about" in checked.why


def test_the_break_even_length_is_where_the_model_crosses() -> None:
    plan = planned(**STEEP)
    times = at_lengths(one("step_time", "1 s", **STEEP))
    stated = times[16384][1] * 1.01
    text = one("step_time", f"{stated:.9f} s", **STEEP).why
    length = int(text.split("can hold above about ")[1].split(" ")[0].replace(",", ""))
    reach = interval(plan, estimate(plan, sequence_length=length).total_s)[1]
    assert reach == pytest.approx(stated, rel=0.12)


def test_a_figures_own_length_decides_it() -> None:
    at = {"sequence_length": 1024}
    checked = one("step_time", "1 s", at, workload=RANGE, model=WIDER)
    assert at_lengths(checked).keys() == {128, 1024, 4096}
    assert checked.computed == at_lengths(checked)[1024][0]
    exact = one("step_time", f"{checked.computed:.9f} s", at, workload=RANGE, model=WIDER)
    assert exact.verdict == "holds"


def test_a_figures_own_batch_is_that_of_its_step_and_of_its_bound() -> None:
    """Two sequences a replica are eight in all: an eighth of the FLOPs, and of the bound."""
    whole, part = one("step_time", "1 ns"), one("step_time", "1 ns", {"sequences_per_replica": 2})
    assert whole.verdict == part.verdict == "fails"

    def bound_s(checked: Checked) -> float:
        return SECONDS.parse(checked.why.split("Compute alone takes at least ")[1].split(" at ")[0])

    assert bound_s(whole) == pytest.approx(8 * bound_s(part), rel=1e-3)
    plan = planned(workload={**BASE["workload"], "global_batch_size": 8})
    assert part.computed == pytest.approx(estimate(plan).total_s, rel=1e-12)


def test_no_interval_reaches_below_what_compute_alone_takes() -> None:
    """At a stated efficiency of 100 %, the interval's lower end would lie below the FLOPs at peak."""
    gpu = {**BASE["cluster"]["gpu"], "memory_bandwidth": "50 TB/s"}
    flat = {"efficiency": {"compute": "100%"}, "nodes": 1, "gpus_per_node": 1, "gpu": gpu}
    dense = {"num_hidden_layers": 8, "hidden_size": 8192, "num_attention_heads": 64, "vocab_size": 100}
    changes: dict[str, Any] = {
        "cluster": {**BASE["cluster"], **flat},
        "model": {**dense, "intermediate_size": 32768},
        "layout": {"tp": 1, "pp": 1, "dp": 1, "ep": 1},
        "workload": {"global_batch_size": 1, "sequence_length": 8192},
    }
    ((value, low, _),) = at_lengths(one("step_time", "1 s", **changes)).values()
    plan = planned(**changes)
    bound = model_flops(plan, 8192) / 500e12
    assert interval(plan, value)[0] < bound
    assert low == pytest.approx(bound, rel=1e-12)


def test_strong_scaling_is_that_of_a_quarter_of_the_gpus() -> None:
    """4 of 16 GPUs with dp 1 instead of 4: the bubble of two stages falls from 1/17 to 1/65."""
    plan = planned()
    fewer = on_fewer_gpus(plan)
    assert fewer is not None
    assert fewer.layout == plan.layout.model_copy(update={"dp": 1, "ep": 2})
    assert fewer.cluster.num_gpus == 4
    assert (fewer.num_micro_batches, plan.num_micro_batches) == (64, 16)
    expected = estimate(fewer).total_s * 4 / (estimate(plan).total_s * 16)
    checked = one("strong_scaling_efficiency", "90%")
    ((value, low, high),) = at_lengths(checked).values()
    assert value == pytest.approx(expected, rel=1e-12)
    assert value == pytest.approx((65 / 4) / 17, rel=0.05)  # slots of a step, where all slots are equal
    factor = ratio_factor(plan.model, plan.cluster)
    assert (low, high) == pytest.approx((value / factor, value * factor), rel=1e-12)
    for words in ("16 GPUs against 4", "DP 4 -> 1", "EP 4 -> 2", "64 micro-batches instead of 16"):
        assert words in checked.why


def test_the_pipeline_is_shortened_where_dp_cannot_be() -> None:
    plan = planned(layout={"tp": 2, "pp": 8, "dp": 1, "ep": 2})
    fewer = on_fewer_gpus(plan)
    assert fewer is not None
    assert (fewer.layout.pp, fewer.layout.dp, fewer.cluster.num_gpus) == (2, 1, 4)
    assert fewer.policy.layers_per_stage == (4, 4)


def test_a_smaller_part_that_does_not_fit_is_not_taken() -> None:
    """Model states of dp 1 do not fit beside a context of 3 GB in a GPU that holds those of dp 2."""
    plan = planned()
    sizes = {}
    for share in (1, 2, 4):
        layout = {"tp": 2, "pp": 2, "dp": 4 // share, "ep": min(4, 8 // share)}
        cluster = {**BASE["cluster"], "nodes": 1, "gpus_per_node": 16 // share}
        sizes[share] = worst(memory(lower(planned(layout=layout, cluster=cluster)))).total_bytes
    assert sizes[4] > sizes[2]
    capacity = (sizes[2] + sizes[4]) // 2
    small = plan.cluster.gpu.model_copy(update={"memory": capacity})
    tight = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"gpu": small})})
    half = on_fewer_gpus(tight)
    assert half is not None
    assert half.cluster.num_gpus == 8
    none = plan.cluster.gpu.model_copy(update={"memory": sizes[2] // 2})
    tiny = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"gpu": none})})
    assert on_fewer_gpus(tiny) is None


def test_on_one_gpu_scaling_stays_open() -> None:
    single = {
        "cluster": {**BASE["cluster"], "nodes": 1, "gpus_per_node": 1},
        "layout": {"tp": 1, "pp": 1, "dp": 1, "ep": 1},
    }
    checked = one("strong_scaling_efficiency", "90%", **single)
    assert checked.verdict == "undetermined"
    assert "fits neither a quarter nor half of the 1 GPUs" in checked.why


def test_a_plan_that_breaks_a_rule_has_no_step_time() -> None:
    broken: dict[str, Any] = {"layout": {"vpp": 1}, "policy": {"engine": "native", "schedule": "DualPipeV"}}
    checked = one("step_time", "1 s", **broken)
    assert checked.verdict == "undetermined"
    assert "No step time: layout.vpp: 1" in checked.why
    assert checked.by_length == ()
    assert one("step_time", "1 ns", **broken).verdict == "fails"
    assert one("strong_scaling_efficiency", "90%", **broken).why.startswith("No step time: layout.vpp: 1")


def test_stages_that_do_not_add_up_leave_speed_open_on_repairs_too() -> None:
    """A document whose own stages fit no layout that can exist is audited all the same."""
    document = described(
        layout={"tp": 2, "pp": 2, "dp": 2, "ep": 4},
        policy={"layers_per_stage": [5, 2, 1]},
        claims={"figures": [{"id": "step_time", "value": "1 s"}]},
    )
    report = audit(deployment_from(document, Path()))
    assert not report.possible
    assert report.nearest_layouts


def test_stated_efficiencies_price_kernels_and_say_so() -> None:
    slow = {**BASE["cluster"], "efficiency": {"compute": "10%"}}
    fast = {**BASE["cluster"], "efficiency": {"compute": "80%"}}
    work = {"workload": {"global_batch_size": 64, "sequence_length": 4096}, "model": WIDER}
    checked = one("step_time", "1 s", cluster=slow, **work)
    assert "kernels at the stated 10 % of peak" in checked.why
    assert checked.computed > one("step_time", "1 s", cluster=fast, **work).computed  # type: ignore[operator]
    bandwidth = {**BASE["cluster"], "efficiency": {"bandwidth": "80%"}}
    assert "prices memory and links" in one("bandwidth_utilization", "80%", cluster=bandwidth).why


def test_json_lists_what_was_computed_by_length() -> None:
    document = json.loads(json.dumps(one("step_time", "1 s", workload=RANGE).document()))
    entries = document["computed_by_length"]
    assert [entry["sequence_length"] for entry in entries] == [128, 4096]
    assert all(entry["low"] < entry["value"] < entry["high"] for entry in entries)
    assert document["computed"] == entries[-1]["value"]
    assert one("world_size", 16).document()["computed_by_length"] == []
