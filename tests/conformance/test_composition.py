"""Composition: estimate and simulation price the same tasks and differ in how they compose them alone.

Every order and example is compared in `tests/simulator/test_simulate.py`; here the pair that must be exact,
and that a task taken out of one of the two is found.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright.deployment import Deployment
from meshwright.ir.program import lower
from meshwright.plan import Plan, open_placement, resolve
from meshwright.planner.estimate import compose, measure_program
from meshwright.planner.prices import Conditions, prices
from meshwright.simulator import work
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import simulate

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "brief-repaired.yaml"
SCHEDULES = {"GPipe": "layout.vpp=1", "1F1B": "layout.vpp=1", "Interleaved1F1B": "layout.vpp=2"}


def plan_of(schedule: str) -> Plan:
    changes = (f"policy.schedule={schedule}", SCHEDULES[schedule], "model.vocab_size=512")
    return resolve(open_placement(str(EXAMPLE), Deployment, changes))


def difference(plan: Plan) -> float:
    """Of the two step times without the time of sends, relative."""
    rates = prices(plan.cluster, plan.workload.precision, plan.policy.engine)
    length = plan.workload.max_sequence_length
    measured = measure_program(lower(plan), rates, Conditions(), length)
    estimated = compose(replace(measured, sends=tuple({} for _ in measured.sends)), rates).total_s
    found = simulate(plan, Options(point_to_point=False, contention=False)).step_time_s
    return abs(found - estimated) / estimated


@pytest.mark.parametrize(("schedule", "limit"), [("GPipe", 1e-6), ("1F1B", 1e-6), ("Interleaved1F1B", 0.02)])
def test_the_estimate_and_the_simulation_are_one(schedule: str, limit: float) -> None:
    assert difference(plan_of(schedule)) <= limit


def test_a_task_that_one_of_them_leaves_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    program_of = work.priced_program

    def shorter(program: Any, *args: Any, **options: Any) -> Any:
        stages = tuple(
            replace(stage, blocks=tuple(replace_tasks(block) for block in stage.blocks))
            for stage in program.stages
        )
        return program_of(replace(program, stages=stages), *args, **options)

    def replace_tasks(block: Any) -> Any:
        if not block.name.startswith("layers."):
            return block
        kept = tuple(task for task in block.tasks if not task.name.endswith(".moe.experts.up"))
        return (
            type(block)(block.template, block.name)
            if hasattr(block, "template")
            else replace(block, tasks=kept)
        )

    from meshwright.simulator import simulate as simulation

    monkeypatch.setattr(simulation, "priced_program", shorter)
    assert difference(plan_of("1F1B")) > 1e-4
