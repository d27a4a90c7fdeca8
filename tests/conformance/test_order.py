"""Order: the actions that torch's pipelining ran are those of `ir/schedule.py`; another order is found."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

from layouts import Case
from steps import MATRIX, expected, steps_of

from meshwright.dryrun.checks import order_check
from meshwright.ir import program as lowered
from meshwright.ir.schedule import Schedule, build_schedule

PIPELINES = tuple(case for case in MATRIX if case.layout.get("pp", 1) > 1)


@pytest.mark.parametrize("case", PIPELINES, ids=str)
def test_every_stage_runs_in_the_schedule_s_order(case: Case) -> None:
    check = order_check(expected(case), steps_of(case))
    assert check.holds, check.why
    assert all(step.conduct.order for step in steps_of(case))


@pytest.mark.parametrize("change", ["an action left out", "two actions swapped"])
@pytest.mark.parametrize("case", PIPELINES, ids=str)
def test_another_order_is_found(case: Case, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*args: object) -> Schedule:
        schedule = build_schedule(*args)  # type: ignore[arg-type]
        first = [action for action in schedule.orders[0] if action is not None]
        wrong = first[1:] if change == "an action left out" else [first[1], first[0], *first[2:]]
        return replace(schedule, orders=(tuple(wrong), *schedule.orders[1:]))

    monkeypatch.setattr(lowered, "build_schedule", changed)
    assert not order_check(expected(case), steps_of(case)).holds
