"""FLOPs: matmuls, grouped matmuls and attention that ran are the graph's; a graph without one is found."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

from binding import stem
from graphs import change_ops
from layouts import Case
from steps import MATRIX, expected, steps_of

from meshwright.dryrun.checks import flops_check
from meshwright.ir.graph import Op, OpKind
from meshwright.ir.tasks import ComputeTask

WORK = (OpKind.MATMUL, OpKind.GROUPED_MATMUL, OpKind.ATTENTION)


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_every_stage_does_the_graph_s_work(case: Case) -> None:
    check = flops_check(expected(case), steps_of(case))
    assert check.worst == 0, check.why


def _stems() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for case in MATRIX:
        for stage in expected(case).program.stages:
            for task in stage.tasks("forward"):
                if isinstance(task, ComputeTask) and task.kind in WORK:
                    found.setdefault(stem(task.name), case)
    return found


def _narrower(op: Op) -> Op:
    *dims, last = op.dims
    return replace(op, dims=(*dims, replace(last, size=last.size - 1)))


def test_an_op_taken_out_or_a_column_narrower_is_found() -> None:
    for name, case in _stems().items():
        for change in (lambda op: None, _narrower):
            with pytest.MonkeyPatch.context() as patch:
                change_ops(patch, name, change)
                assert not flops_check(expected(case), steps_of(case)).holds, name
