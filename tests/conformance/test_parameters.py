"""Parameters: names, local shapes and bytes of the modules are the graph's; a graph without one is found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from binding import stem
from layouts import Case
from steps import MATRIX, expected, steps_of

from meshwright.dryrun.checks import parameters_check
from meshwright.ir import program as lowered
from meshwright.ir.parameters import Param


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_every_stage_holds_the_graph_s_parameters(case: Case) -> None:
    check = parameters_check(expected(case), steps_of(case))
    assert check.holds, check.why


def _stems() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for case in MATRIX:
        for held in (held for step in steps_of(case) for held in step.conduct.parameters):
            found.setdefault(stem(held.name), case)
    return found


def test_a_parameter_taken_out_or_of_another_shape_is_found() -> None:
    for name, case in _stems().items():
        for change in ("left out", "another shape"):
            with pytest.MonkeyPatch.context() as patch:
                _change(patch, name, change)
                assert not parameters_check(expected(case), steps_of(case)).holds, (name, change)


def _change(patch: pytest.MonkeyPatch, name: str, change: str) -> None:
    def changed(params: Iterable[Param]) -> Iterator[Param]:
        for param in params:
            if stem(param.name) != name:
                yield param
            elif change == "another shape":
                yield replace(param, shape=(*param.shape[:-1], param.shape[-1] * 2))

    for give in ("layer_parameters", "embedding_parameters", "head_parameters"):
        original = getattr(lowered, give)
        patch.setattr(lowered, give, lambda *a, original=original: changed(original(*a)))
