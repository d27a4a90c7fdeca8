"""A table of made-up measurements that covers every op of small models, and a plan that it prices."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from meshwright.calibrating.shapes import ShapeKey, of_programs
from meshwright.efficiency_table import EfficiencyTable, Kernels, LinkPoint, OpPoint
from meshwright.ir.graph import CollectiveKind
from meshwright.ir.program import lower
from meshwright.machine import Machine
from meshwright.plan import Plan

MACHINE = Machine(processor="abacus", processors=2, memory_bytes=16_000_000_000, torch="2.13.0")
SIZES = (4, 1_000, 1_000_000)


def linear(shape: ShapeKey) -> float:
    """Seconds that grow with an op's work: 10 µs, and 1 ns for each unit."""
    return 1e-5 + 1e-9 * prod(shape[2])


def table_for(*plans: Plan, seconds: Callable[[ShapeKey], float] = linear, **parts: Any) -> EfficiencyTable:
    """A table with every shape of these plans, measured with as many ranks as the first of them has."""
    kernels = Kernels(
        ranks=plans[0].layout.world_size,
        threads=1,
        precision=plans[0].workload.precision,
        host_s={"dense": 0.0, "experts": 0.0},
        step_s=0.0,
        points=tuple(
            OpPoint(op=shape[0], phase=shape[1], sizes=shape[2], time_s=seconds(shape), samples=5)
            for shape in of_programs([lower(plan) for plan in plans], "cpu")
        ),
    )
    links = tuple(
        LinkPoint(collective=kind.value, ranks=2, bytes=size, time_s=1e-4 + 1e-9 * size)
        for kind in CollectiveKind
        for size in SIZES
    )
    fields = {"machine": MACHINE, "date": "2026-11-25", "subject": "a test", "wall_s": 1.0, "links": links}
    return EfficiencyTable(**{**fields, "kernels": (kernels,), **parts})
