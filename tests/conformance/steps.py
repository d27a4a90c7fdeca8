"""Whole steps of dry runs, kept for all tests of a process: the graph they are held against changes."""

from __future__ import annotations

from functools import cache

from binding import CASES as BOUND
from layouts import Case

from meshwright.dryrun.expected import Expected
from meshwright.ir.observed import Observed
from meshwright.runtime.dryrun.rehearse import observe

_NAMES = (
    "gated-dp2-ep2-z1-selective",
    "gated-dp4-ep2-z3-full-bf16",
    "gated-dp2-ep2-z2-allgather-fp16",
    "plain-tp2-dp2-ep2-etp2-z2-mb4",
    "plain-tp2-dp4-ep2-etp2-z3-mb2",
    "tied-tp4-ep2-etp2-z1-mb8",
    "tied-pp2-dp4-ep2-dp_replicas2-z3-1F1B",
    "tied-pp2-dp2-ep2-vpp2-z2-ZBVZeroBubble",
    "balanced-tp2-pp2-ep2-z1-mb4-1F1B-full",
    "sigmoid-tp2-dp2-ep2-z1-mb4",
    "gated-pp2-dp2-ep2-vpp2-z1-InterleavedZeroBubble-selective",
    "gated-tp2-pp2-dp2-ep2-vpp2-z1-DualPipeV",
    "gated-pp4-dp2-ep2-z1-1F1B",
)
MATRIX = tuple(case for case in BOUND if str(case) in _NAMES)
"""Models and layouts: every kind of model but that with sinks, whose attention is matmuls of its own; every
axis, ZeRO stage, dispatcher, recompute, and schedules with whole and with split backwards."""
assert len(MATRIX) == len(_NAMES)


@cache
def steps_of(case: Case) -> tuple[Observed, ...]:
    """The step of the first rank of each stage."""
    plan = case.plan("adamw")
    per_stage = case.world // plan.layout.pp
    return tuple(observe(plan, pp_rank * per_stage) for pp_rank in range(plan.layout.pp))


def expected(case: Case) -> Expected:
    """What the graph says now."""
    return Expected(case.plan("adamw"))
