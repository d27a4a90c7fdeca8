"""Collectives: kinds, axes, counts and bytes that ran are the graph's; a graph that says otherwise is found.

Real ranks are held against the graph in `tests/runtime/test_binding.py`, by the same changes.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from binding import stem
from layouts import Case
from steps import MATRIX, expected, steps_of
from test_binding import CHANGES, _change_blocks

from meshwright.dryrun.checks import collectives_check


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_every_stage_sends_what_the_graph_says(case: Case) -> None:
    check = collectives_check(expected(case), steps_of(case))
    assert check.holds, check.why


def _stems() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for case in MATRIX:
        program = expected(case).program
        for pp_rank in range(program.plan.layout.pp):
            for task, _ in program.collectives(pp_rank):
                found.setdefault(stem(task.name), case)
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_collective_is_found(change: str) -> None:
    for name, case in _stems().items():
        with pytest.MonkeyPatch.context() as patch:
            _change_blocks(patch, name, CHANGES[change])
            assert not collectives_check(expected(case), steps_of(case)).holds, name
