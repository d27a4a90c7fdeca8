"""Time: a simulated timeline and a profiled one are joined by names of ops, in the order in which they run.

Here: in a profiled step every module that multiplies is the graph's, took time forward and backward, and
comes when the graph says; an op of another name or none is found. How far times are apart is no test:
`benchmarks/loop.py` measures it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("torch")

from graphs import change_ops
from layouts import Case
from steps import MATRIX, expected
from training_runs import write_corpus

from meshwright.ir.graph import Op, OpKind
from meshwright.ir.tasks import ComputeTask
from meshwright.profiling.trace import MODULE, rank_trace
from meshwright.runtime.profile import Session, profile_plan

WORK = (OpKind.MATMUL, OpKind.GROUPED_MATMUL)
MODELS = {case.model: case for case in MATRIX}


@dataclass(frozen=True)
class Timeline:
    """Modules of a profiled step in the order of their first forward, and seconds by module."""

    order: tuple[str, ...]
    forward: dict[str, float]
    backward: dict[str, float]


@cache
def profiled(model: str) -> Timeline:
    """A step of one process, under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        session = Session(Path(folder), Path(folder), 1, routes_evenly=True)
        (found,) = profile_plan(MODELS[model].alone("adamw"), session, "cpu")
        events = json.loads(found.trace.read_text("utf-8"))["traceEvents"]
    trace = rank_trace(0, events)
    starts = sorted((e["ts"], e["name"]) for e in events if str(e.get("name")).startswith(MODULE))
    order = dict.fromkeys(name.removeprefix(MODULE) for _, name in starts)
    return Timeline(tuple(order), dict(trace.forward), dict(trace.backward))


def said(case: Case, modules: Iterable[str]) -> tuple[str, ...]:
    """The modules of the graph's matmuls in its order; an op that stands in none by its own name. The head is
    the stage's own."""
    known, found = set(modules), {}
    for stage in expected(case).program.stages:
        for task in stage.tasks("forward"):
            if isinstance(task, ComputeTask) and task.kind in WORK and task.name != "head":
                found[_module(task.name, known)] = None
    return tuple(found)


def _module(op: str, known: set[str]) -> str:
    """The module of an op, or the one that holds the experts' or the router's weights."""
    holder = op.rpartition(".")[0]
    return op if op in known or not holder.endswith((".experts", ".router")) else holder


def multiplies(timeline: Timeline, modules: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules that ran, in their order."""
    asked = set(modules)
    return tuple(name for name in timeline.order if name in asked)


@cache
def _multiplying(model: str) -> tuple[str, ...]:
    """The modules that multiply, by the graph as it stands."""
    return said(MODELS[model], profiled(model).order)


@pytest.mark.parametrize("model", MODELS)
def test_every_matmul_runs_in_the_module_of_its_name_and_in_its_place(model: str) -> None:
    ran = profiled(model)
    names = _multiplying(model)
    assert multiplies(ran, names) == names
    assert all(ran.forward[name] > 0 for name in names)
    assert all(ran.backward[name] > 0 for name in names)


def test_an_op_of_another_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(op: Op) -> Op:
        return replace(op, name=f"{op.name}s")

    ran = multiplies(profiled("gated"), _multiplying("gated"))
    change_ops(monkeypatch, "attention.q", renamed)
    assert said(MODELS["gated"], profiled("gated").order) != ran


@pytest.mark.parametrize("name", ["attention.q", "attention.o", "moe.router"])
def test_an_op_taken_out_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = multiplies(profiled("gated"), _multiplying("gated"))
    change_ops(monkeypatch, name, lambda op: None)
    assert said(MODELS["gated"], profiled("gated").order) != ran
