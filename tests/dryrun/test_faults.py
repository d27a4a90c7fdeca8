"""Faults on a rank that stands for no class are found by the command's default, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

from layouts import Case, _case
from seeded import FAULTS, VICTIM

from meshwright.dryrun.answer import Answer
from meshwright.dryrun.command import dry_run

CASE = _case("gated", "pp2 dp2 ep2", "z1", "mb2", "1F1B")


def run(case: Case) -> Answer:
    return dry_run(case.plan("adamw"), None, lambda what, done, of: None)


@pytest.mark.parametrize(("fault", "check", "words"), FAULTS, ids=lambda one: getattr(one, "__name__", ""))
def test_a_fault_is_found_and_named(
    fault: Callable[[Any], None], check: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    answer = run(CASE)
    found = next(one for one in answer.checks if one.name == check)
    assert not found.holds
    assert f"rank {VICTIM}" in found.why
    assert words in found.why
    assert found.worst > 0


def test_without_a_fault_one_rank_of_each_stage_stands_for_the_others() -> None:
    answer = run(CASE)
    assert [one.name for one in answer.checks if not one.holds and one.name != "memory"] == []
    assert {row.facts.rank: row.same_as for row in answer.rows} == {0: None, 1: 0, 2: None, 3: 2}
