"""Ranks hold what the graph says and send what the graph says; and a graph that says otherwise is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from binding import CASES, Done, differences, done, said_groups, said_shapes, stem, stems
from layouts import MODELS, Case

from meshwright.ir import program as lowered
from meshwright.ir.graph import Block, Collective, CollectiveKind, Node
from meshwright.ir.parameters import Param, parameters
from meshwright.ir.program import lower
from meshwright.ir.sharding import zero_degree
from meshwright.ir.tasks import CommTask
from meshwright.model import Model
from meshwright.runtime.build import build
from meshwright.runtime.mesh import single_process
from meshwright.runtime.shares import NotBoundError

# what ranks do


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_sends_what_the_graph_says(case: Case, corpus: Path) -> None:
    assert differences(case, done(case, corpus)) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_holds_what_the_graph_says(case: Case, corpus: Path) -> None:
    program = lower(case.plan("adamw"))
    for one in done(case, corpus):
        assert one.shapes == said_shapes(program, one.pp_rank)
    if case.policy["zero_stage"] == 3:
        _require_divided(program, done(case, corpus))


def _require_divided(program: lowered.Program, found: list[Done]) -> None:
    """Of each parameter, a rank keeps no more than its rows: dim 0 over the data ranks, rounded up."""
    params = {param.name: param for param in parameters(program.plan.model)}
    for one in found:
        for name, elements in one.elements.items():
            rows, *rest = one.shapes[name]
            most = -(-rows // zero_degree(params[name], program.plan.layout))
            assert elements <= most * torch.Size(rest).numel(), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_speaks_to_whom_the_layout_says(case: Case, corpus: Path) -> None:
    plan = case.plan("adamw")
    for rank, one in enumerate(done(case, corpus)):
        assert one.groups == said_groups(plan, rank)


def test_copies_of_heads_are_added_up_along_tp(corpus: Path) -> None:
    """In groups of their own, which the graph counts to tp."""
    case = next(case for case in CASES if str(case).startswith("dense-tp4"))
    for one in done(case, corpus):
        assert any(kind == "all_reduce" and axis == "tp" and ranks == 2 for kind, axis, ranks, _ in one.calls)


# graphs that are wrong

Change = Callable[[Any], Any]
"""Makes another collective or task of one; None leaves it out."""


def _half(one: Any) -> Any:
    if isinstance(one, CommTask):
        return replace(one, bytes=one.bytes // 2)
    return replace(one, bytes_per_element=one.bytes_per_element / 2)


def _other_kind(one: Any) -> Any:
    other = {
        CollectiveKind.ALL_REDUCE: CollectiveKind.ALL_GATHER,
        CollectiveKind.ALL_GATHER: CollectiveKind.REDUCE_SCATTER,
        CollectiveKind.REDUCE_SCATTER: CollectiveKind.ALL_REDUCE,
        CollectiveKind.ALL_TO_ALL: CollectiveKind.ALL_GATHER,
        CollectiveKind.SEND_RECV: CollectiveKind.ALL_TO_ALL,
    }
    if isinstance(one, CommTask):
        return replace(one, kind=other[one.kind])
    if one.forward is None:
        return replace(one, backward=other[one.backward])
    return replace(one, forward=other[one.forward])


def _without_forward(one: Any) -> Any:
    return replace(one, forward=None) if isinstance(one, Collective) and one.forward else None


def _without_backward(one: Any) -> Any:
    return replace(one, backward=None) if isinstance(one, Collective) and one.backward else None


CHANGES: dict[str, Change] = {
    "left out": lambda one: None,
    "half the bytes": _half,
    "another kind": _other_kind,
    "no forward": _without_forward,
    "no backward": _without_backward,
}
STEMS = stems()


def _change_blocks(monkeypatch: pytest.MonkeyPatch, name: str, change: Change) -> None:
    """Change the nodes of a name in every block, and the tasks of that name that are no nodes."""

    def changed(nodes: Iterable[Any]) -> Iterator[Any]:
        for node in nodes:
            if stem(node.name) != name or not isinstance(node, Collective | CommTask):
                yield node
            elif (other := change(node)) is not None:
                yield other

    for build_block in ("layer_block", "embedding_block", "head_block"):
        original = getattr(lowered, build_block)

        def block(*args: Any, original: Any = original) -> Block:
            made = original(*args)
            nodes: tuple[Node, ...] = tuple(changed(made.nodes))
            return Block(made.name, nodes)

        monkeypatch.setattr(lowered, build_block, block)
    for make_tasks in ("step_tasks", "parameter_gathers", "gradient_reductions", "_sends"):
        original = getattr(lowered, make_tasks)

        def tasks(*args: Any, original: Any = original) -> Iterator[Any]:
            return changed(original(*args))

        monkeypatch.setattr(lowered, make_tasks, tasks)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", STEMS)
def test_a_wrong_collective_is_found(
    name: str, change: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = STEMS[name]
    found = done(case, corpus)
    _change_blocks(monkeypatch, name, CHANGES[change])
    assert differences(case, found) != []


def test_an_unchanged_graph_is_not_found_wrong(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = done(CASES[-1], corpus)
    _change_blocks(monkeypatch, "moe.dispatch", lambda one: one)
    assert differences(CASES[-1], found) == []


def test_a_collective_too_many_is_found(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = done(CASES[0], corpus)
    step_tasks = lowered.step_tasks

    def more(*args: Any) -> Iterator[CommTask]:
        for task in step_tasks(*args):
            yield from (task, task)

    monkeypatch.setattr(lowered, "step_tasks", more)
    assert differences(CASES[0], found) != []


def _parameters() -> Iterator[tuple[str, str]]:
    """Every kind of parameter, with the first model that has it."""
    seen = set()
    for model, sizes in MODELS.items():
        for param in parameters(Model(**sizes)):
            if (name := stem(param.name)) not in seen:
                seen.add(name)
                yield name, model


@pytest.mark.parametrize("change", ["left out", "another shape", "another name"])
@pytest.mark.parametrize(("name", "model"), list(_parameters()))
def test_a_wrong_parameter_is_found(
    name: str, model: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(params: Iterable[Param]) -> Iterator[Param]:
        for param in params:
            if stem(param.name) != name:
                yield param
            elif change == "another shape":
                yield replace(param, shape=(*param.shape[:-1], param.shape[-1] * 2))
            elif change == "another name":
                yield replace(param, name=f"{param.name}s")

    for give in ("layer_parameters", "embedding_parameters", "head_parameters"):
        original = getattr(lowered, give)
        monkeypatch.setattr(lowered, give, lambda *a, original=original: changed(original(*a)))
    with pytest.raises(NotBoundError):
        build(Case(model, {}).alone("sgd"), single_process(torch.device("cpu")))
