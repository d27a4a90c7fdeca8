"""Time: what joins a simulated timeline and a profiled one is the op's name.

Here: every op that works has a module or a parameter of its name in the stage that runs it, so that a profile
by modules can be joined; an op of another name is found.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch
from graphs import change_ops
from layouts import Case
from steps import MATRIX, expected

from meshwright.ir.graph import Op, OpKind
from meshwright.ir.tasks import ComputeTask
from meshwright.runtime.build import build
from meshwright.runtime.dryrun.rehearse import rehearsal
from meshwright.runtime.mesh import single_process

WORK = (OpKind.MATMUL, OpKind.GROUPED_MATMUL)
MODELS = {case.model: case for case in MATRIX}


def nameless(case: Case) -> list[str]:
    """Ops of a model that stand nowhere among its modules and parameters."""
    plan = case.alone("adamw")
    with rehearsal(plan):
        stages = build(plan, single_process(torch.device("cpu"))).stages.values()
    names = {name for stage in stages for name, _ in stage.named_modules()}
    names |= {name for stage in stages for name, _ in stage.named_parameters()}
    tasks = (task for stage in expected(case).program.stages for task in stage.tasks("forward"))
    ops = {task.name for task in tasks if isinstance(task, ComputeTask) and task.kind in WORK}
    return sorted(op for op in ops if op not in names and op != "head")


@pytest.mark.parametrize("model", MODELS)
def test_every_matmul_has_a_module_of_its_name(model: str) -> None:
    assert nameless(MODELS[model]) == []


def test_an_op_of_another_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(op: Op) -> Op:
        return replace(op, name=f"{op.name}s")

    change_ops(monkeypatch, "attention.q", renamed)
    assert nameless(MODELS["gated"])
