"""Which ops at which sizes a calibration measures: those of plans, or a grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

from meshwright.cost.measured import OPTIMIZER, shapes_of
from meshwright.engines import engine_of
from meshwright.ir.program import Program
from meshwright.ir.tasks import ComputeTask
from meshwright.planner.step import moved_bytes

ShapeKey = tuple[str, str, tuple[int, ...]]
"""An op's label, phase and sizes."""

SPLIT = ("forward", "input_gradient", "weight_gradient")
WHOLE = ("forward", "input_gradient")
MOST_WORK = {"cpu": 4e9, "cuda": 4e13}
"""FLOPs of the largest op that is timed: some hundredth of a second. Longer ones are timed on fewer rows."""
_HALVINGS = (1, 4, 16)


def of_programs(programs: Iterable[Program], device: str) -> list[ShapeKey]:
    """The distinct ops of plans, each with its update's bytes, and half of them: shapes of no op twice."""
    found: dict[ShapeKey, None] = {}
    for program in programs:
        tasks = [task for stage in program.stages for task in stage.tasks() if isinstance(task, ComputeTask)]
        for op, phase, sizes in shapes_of(tasks):
            found[op, phase, _bounded(op, sizes, device)] = None
        for size in _updates(program):
            found[OPTIMIZER, "step", (size,)] = None
    return list(found)


def _updates(program: Program) -> Iterator[int]:
    plan, width = program.plan, engine_of(program.plan.policy).gradient_bytes.value
    for held in program.held:
        moved = moved_bytes(
            plan.workload.optimizer, plan.workload.compute_bytes, held.total, held.total, width
        )
        yield from (max(int(moved) // part, 1) for part in _HALVINGS[:2])


def _bounded(op: str, sizes: tuple[int, ...], device: str) -> tuple[int, ...]:
    """The same op on so few rows that it takes no longer than what is timed at most."""
    if op not in ("matmul", "grouped_matmul", "attention"):
        return sizes
    rows = 1 if op == "grouped_matmul" else 0
    dims = list(sizes)
    while 2 * prod(dims[-3:] if op != "attention" else dims) > MOST_WORK[device] and dims[rows] > 1:
        dims[rows] = max(dims[rows] // 2, 1)
    return tuple(dims)


def grid(device: str) -> list[ShapeKey]:
    """A coarse grid over what small models do on processors, and large ones on a GPU."""
    scale = 1 if device == "cpu" else 8
    rows, widths = (128 * scale, 1024 * scale), (128 * scale, 512 * scale)
    found: list[ShapeKey] = []
    found += _all("matmul", SPLIT, [(m, n, k) for m in rows for n in widths for k in widths])
    found += _all("matmul", SPLIT, [(rows[0], 8, widths[0]), (rows[1], 8, widths[1])])
    groups = [(g, m, n, n) for g in (2, 8) for m in rows for n in widths]
    found += _all("grouped_matmul", SPLIT, groups)
    heads = [(b, h, s, s, 64, 64) for b, h in ((1, 4), (2, 8)) for s in (128 * scale, 512 * scale)]
    found += _all("attention", WHOLE, heads)
    spread = [(tokens, width) for tokens in rows for width in widths]
    for op in _MEMORY_OPS:
        found += _all(op, WHOLE, spread)
    found += _all("route", WHOLE, [(tokens, experts) for tokens in rows for experts in (8, 64)])
    found += _all("loss", WHOLE, [(tokens, 256 * scale) for tokens in rows])
    found += _all(OPTIMIZER, ("step",), [(size * scale,) for size in (1 << 20, 1 << 24, 1 << 26)])
    return found


_MEMORY_OPS = (
    "norm",
    "activation",
    "gated_activation",
    "residual",
    "rope_q",
    "rope_k",
    "permute",
    "combine_tokens",
    "sort",
    "unsort",
    "embedding",
    "elementwise",
)


def _all(op: str, phases: Sequence[str], sizes: Iterable[tuple[int, ...]]) -> list[ShapeKey]:
    return [(op, phase, size) for size in sizes for phase in phases]
