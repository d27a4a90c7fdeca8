"""Blocks by parts against the estimator's block times, part by part of the price."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.simulator.plans import RUNNABLE, example, plan

from meshwright.ir.program import lower
from meshwright.ir.schedule import ActionKind
from meshwright.plan import Plan
from meshwright.planner.estimate import distinct_blocks
from meshwright.planner.times import AXES, MICRO_BATCH_PHASES, axis_groups, block_times
from meshwright.simulator.options import Options
from meshwright.simulator.parts import COMPUTE, NO_TIER, priced_phases
from meshwright.simulator.passages import Passage, settle
from meshwright.simulator.work import Priced, priced_program

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor and experts in a node": ({"tp": 2, "ep": 4}, {"expert_overlap": True}),
    "experts between nodes": ({"ep": 16}, {"recompute": "full"}),
    "context": ({"cp": 2, "ep": 8}, {"recompute": "selective"}),
    "expert tensors": ({"tp": 4, "etp": 2, "ep": 4}, {"dispatcher": "allgather"}),
    "a pipeline": ({"tp": 2, "pp": 4, "vpp": 2, "ep": 2}, {}),
    "fp8 in place": ({"pp": 2, "ep": 8}, {"engine": "torchtitan", "zero_stage": 3}),
}


def priced_of(asked: Plan) -> Priced:
    return priced_program(lower(asked), Options(contention=False))


def by_part(passage: Passage) -> dict[str, float]:
    """Seconds by what the estimator calls them."""
    found = dict.fromkeys(("compute", *AXES, "host"), 0.0)
    for part, seconds in zip(passage.parts, passage.shown_s, strict=True):
        found["compute" if part.kind == COMPUTE else str(part.axis)] += float(seconds)
    for hidden in passage.hidden:
        found[hidden.axis] += float(hidden.left_s)
    return found | {"host": float(passage.host_s)}


PLANS = {**{name: lambda name=name: example(name) for name in RUNNABLE}} | {
    words: (lambda layout=layout, policy=policy: plan(layout, policy))
    for words, (layout, policy) in LAYOUTS.items()
}


@pytest.mark.parametrize("name", PLANS)
def test_parts_of_a_block_add_up_to_the_estimate(name: str) -> None:
    """By phase and by what takes the time: compute, each axis, waiting for launches."""
    asked = PLANS[name]()
    priced = priced_of(asked)
    blocks, _ = distinct_blocks(priced.program)
    running, rates = priced.measured.running, priced.prices
    groups = axis_groups(asked.cluster, asked.layout.degrees())
    for block, kernels in zip(blocks, priced.measured.kinds, strict=True):
        expected = block_times(kernels, rates, running)
        phases = priced_phases(block, kernels, rates, groups, running)
        for phase in MICRO_BATCH_PHASES:
            settled = settle(phases[phase], contention=False)
            wanted = {part: float(seconds) for part, seconds in expected[phase].items()}
            assert by_part(settled) == pytest.approx(wanted, rel=1e-9, abs=1e-15), (block.name, phase)
            assert float(settled.total_s) == pytest.approx(sum(wanted.values()), rel=1e-9, abs=1e-15)


def test_each_collective_is_a_part_of_its_own_and_each_op_in_one() -> None:
    program = lower(plan({"tp": 2, "ep": 4}))
    priced = priced_program(program, Options())
    for kind, phases in (
        (ActionKind.FORWARD, ["forward"]),
        (ActionKind.WEIGHT_GRADIENT, ["weight_gradient"]),
    ):
        tasks = [t for stage in program.stages for phase in phases for t in stage.tasks(phase)]  # type: ignore[arg-type]
        passages = priced.passages[kind][0]
        parts = [part for passage in passages for part in passage.parts]
        assert sum(part.kind != COMPUTE for part in parts) == sum(hasattr(task, "axis") for task in tasks)
        assert all((part.tier == NO_TIER) == (part.kind == COMPUTE) for part in parts)


def test_backward_runs_from_the_last_op() -> None:
    program = lower(plan({"tp": 2, "ep": 4}))
    priced = priced_program(program, Options())
    forward = [part.name for part in priced.passages[ActionKind.FORWARD][0][1].parts]
    backward = [part.name for part in priced.passages[ActionKind.INPUT_GRADIENT][0][-2].parts]
    assert forward.index("moe.dispatch") < forward.index("moe.combine")
    assert backward.index("moe.combine") < backward.index("moe.dispatch")
    assert priced.blocks[ActionKind.INPUT_GRADIENT][0][-1] == "embedding"


def test_parameters_are_gathered_before_a_block_uses_them() -> None:
    priced = priced_of(plan({"ep": 8}, {"engine": "torchtitan", "zero_stage": 3}))
    for kind in (ActionKind.FORWARD, ActionKind.INPUT_GRADIENT):
        names = [part.name for part in priced.passages[kind][0][1].parts]
        assert names[:2] == ["gather_dense", "gather_experts"]


@pytest.mark.parametrize("faster", [1.0, 5.0, 20.0])
def test_contention_never_helps_and_hurts_where_the_link_is_full(faster: float) -> None:
    """Tensor and expert communication hide beside the same compute over one tier: with short compute their
    even shares leave more than each would alone."""
    asked = plan({"tp": 4, "ep": 8}, {"expert_overlap": True})
    priced = priced_of(asked)
    block = distinct_blocks(priced.program)[0][1]
    groups = axis_groups(asked.cluster, asked.layout.degrees())
    phases = priced_phases(block, priced.measured.kinds[1], priced.prices, groups, priced.measured.running)
    alone, sharing = (settle(phases["forward"], 1 / faster, contention) for contention in (False, True))
    assert {hidden.tier for hidden in sharing.hidden} == {0}
    left = [sum(float(hidden.left_s) for hidden in one.hidden) for one in (alone, sharing)]
    assert left[1] >= left[0]
    assert (left[1] > left[0]) is (faster > 1)


def test_arrays_are_their_elements() -> None:
    """Loads and slowdowns as arrays give what each gives alone."""
    asked = plan({"tp": 2, "ep": 8}, {"expert_overlap": True})
    priced = priced_of(asked)
    block = distinct_blocks(priced.program)[0][1]
    groups = axis_groups(asked.cluster, asked.layout.degrees())
    loads, slow = np.array([1.0, 1.3, 2.0]), np.array([1.0, 1.05, 1.2])

    def settled(load: Any, slowdown: Any) -> Passage:
        running = replace(priced.measured.running, load=load)
        phases = priced_phases(block, priced.measured.kinds[1], priced.prices, groups, running)
        return settle(phases["forward"], slowdown)

    together = settled(loads, slow)
    for index in range(3):
        assert together.total_s[index] == pytest.approx(settled(loads[index], slow[index]).total_s, rel=1e-12)
    assert list(together.total_s) == sorted(together.total_s)
