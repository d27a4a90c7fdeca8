"""Checks by themselves: a rank that holds or gives something else than the plan says is found and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from meshwright.dryrun import Answer, Check
from meshwright.dryrun.checks import checks_of_all, checks_of_steps
from meshwright.dryrun.expected import Expected
from meshwright.ir.observed import Observed, Peak, StageFacts

VICTIM = 13
"""A rank of the second stage that stands for no class."""


def checked(answer: Answer, change: Callable[[Observed], Observed]) -> dict[str, Check]:
    """The checks of all ranks, one of which was seen otherwise."""
    seen = [Observed(row.facts, row.step.conduct) for row in answer.rows]
    seen[VICTIM] = change(seen[VICTIM])
    return {check.name: check for check in checks_of_all(Expected(answer.plan), seen)}


def with_stage(seen: Observed, change: Callable[[StageFacts], StageFacts]) -> Observed:
    return replace(seen, conduct=replace(seen.conduct, stages=tuple(map(change, seen.conduct.stages))))


def test_what_was_seen_holds(answer: Answer) -> None:
    found = checked(answer, lambda seen: seen)
    assert [name for name, check in found.items() if not check.holds] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: replace(one, layers=(0,)), "rank 13, stage 1: layers 0–0, not 1–1"),
        (lambda one: replace(one, index=0), "rank 13 holds stages [0], not [1]"),
        (lambda one: replace(one, has_head=False), "rank 13, stage 1: has no head"),
        (lambda one: replace(one, has_embedding=True), "rank 13, stage 1: has the embedding"),
        (
            lambda one: replace(one, takes=("fp32", one.takes[1])),
            "takes fp32 (64, 2, 64), not bf16 (64, 2, 64)",
        ),
        (lambda one: replace(one, gives=one.takes), "gives bf16 (64, 2, 64), not nothing"),
    ],
)
def test_a_stage_that_is_built_otherwise_is_found(
    answer: Answer, change: Callable[[StageFacts], StageFacts], words: str
) -> None:
    found = checked(answer, lambda seen: with_stage(seen, change))["stages"]
    assert not found.holds
    assert words in found.why


def shifted(seen: Observed) -> Observed:
    """With the rows of its neighbour along tp."""
    name = "layers.1.attention.q.weight"
    (start, stop), columns = seen.facts.slices[name]
    moved = {**seen.facts.slices, name: ((0, stop - start), columns)}
    return replace(seen, facts=replace(seen.facts, slices=moved))


def cut(seen: Observed) -> Observed:
    """With fewer rows of a parameter than there are."""
    name = "layers.1.attention.q.weight"
    (start, stop), columns = seen.facts.slices[name]
    less = {**seen.facts.slices, name: ((start, stop - 1), columns)}
    return replace(seen, facts=replace(seen.facts, slices=less))


def test_slices_that_do_not_cover_a_parameter_once_are_found(answer: Answer) -> None:
    for change, words in ((shifted, "ranks hold layers.1.attention.q.weight"), (cut, "cover")):
        found = checked(answer, change)["slices"]
        assert not found.holds
        assert "rank 13" in found.why or "3 ranks hold" in found.why
        assert words in found.why


def test_a_rank_that_holds_more_than_its_share_is_found(answer: Answer) -> None:
    def more(seen: Observed) -> Observed:
        first, *rest = seen.conduct.parameters
        return replace(
            seen, conduct=replace(seen.conduct, parameters=(replace(first, bytes=first.bytes + 2), *rest))
        )

    found = checked(answer, more)["parameters"]
    assert not found.holds
    assert found.why.startswith("rank 13: ")


def test_a_rank_that_needs_more_than_a_gpu_has_is_found(answer: Answer) -> None:
    room = answer.plan.cluster.gpu.memory
    steps = [row.step for row in answer.run]
    fuller = replace(steps[1], peak=Peak({"activations": room}, "update"))
    for seen, fits in ((steps, True), ([steps[0], fuller], False)):
        checks = {check.name: check for check in checks_of_steps(Expected(answer.plan), seen, None)}
        assert checks["fits"].holds is fits
    assert checks["fits"].why.startswith(f"rank {steps[1].facts.rank} needs")
