"""Numerics: any layout gives one process' losses, gradients and weights; a mistake in one is found.

The whole matrix stands in `tests/runtime/test_parity.py`, and every mistake in `test_mutations.py`; here a
layout of every axis, and the mistake that AdamW hides best.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from layouts import _case, limits
from mutations import double_expert_gradients
from parity_runs import compared

CASE = _case("gated", "pp2 dp2 ep2", "z1", "mb2", "1F1B")


def test_a_layout_trains_as_one_process_does(corpus: Path) -> None:
    assert compared(CASE, "sgd", corpus, 2).beyond(limits(CASE, "sgd")) == []


def test_a_mistake_is_found(corpus: Path) -> None:
    errors = compared(CASE, "sgd", corpus, 2, double_expert_gradients)
    assert errors.gradient > 20 * limits(CASE, "sgd")["gradient"]
