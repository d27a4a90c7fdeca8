"""The comparison finds mistakes: each is put in at one place, and an error goes beyond its limit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from layouts import GIVEN, limits
from mutations import MUTATIONS, Mutation, double_expert_gradients
from parity_runs import compared

LEAST = 20.0
"""By how many limits a mistake is seen."""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mistake_is_found(mutation: Mutation, corpus: Path) -> None:
    errors = compared(mutation.case, "sgd", corpus, mutation.steps, mutation.mutate)
    limit = limits(mutation.case, "sgd")
    assert len(errors.beyond(limit)) >= len(mutation.found)
    for kind in mutation.found:
        assert getattr(errors, kind) > LEAST * limit[kind], kind


def test_adamw_hides_doubled_expert_gradients_from_its_loss(corpus: Path) -> None:
    """Why gradients, norms and SGD's weights are compared: AdamW divides a constant factor away."""
    case = next(mutation.case for mutation in MUTATIONS if mutation.mutate is double_expert_gradients)
    hidden = compared(case, "adamw", corpus, mutate=double_expert_gradients)
    assert hidden.loss < 1e-5
    assert hidden.gradient > 0.5


def test_without_a_mistake_the_same_layouts_are_within_their_limits(corpus: Path) -> None:
    checked = {str(case) for case in GIVEN}
    for case in {str(m.case): m.case for m in MUTATIONS}.values():
        if str(case) not in checked:  # else `test_parity.py` has
            assert compared(case, "sgd", corpus, 2).beyond(limits(case, "sgd")) == []
