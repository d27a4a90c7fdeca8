"""Prices from a machine's own measurements: at measured shapes what was measured, between them interpolated.

All of it is elementwise: sizes and bytes may be numpy arrays. What a table does not hold has no price here,
and the curves of the catalogue take its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from meshwright.calibration import Basis
from meshwright.efficiency_table import EfficiencyTable, Kernels, LinkPoint, OpPoint
from meshwright.ir.graph import CollectiveKind, OpKind
from meshwright.ir.tasks import ComputeTask
from meshwright.workload import Precision

Array = Any
"""A number or a numpy array of numbers."""

OPTIMIZER = "optimizer"
"""The op of an update; its one size is the bytes that it moves."""
SAME = 0.02
"""Relative difference of sizes up to which a shape counts as measured."""
_LOCALITY = 4
"""Power of the distance by which nearer points count more (Shepard, 1968)."""
_NAMED = ("rope_q", "rope_k", "permute", "sort", "unsort", "combine_tokens", "shared_scale")
GATED_TENSORS = 5
"""Tensors that an unfused gated activation moves forward; an ungated one moves two."""


def op_label(task: ComputeTask) -> str:
    """Which measured op prices a task: its kind, and among those that memory bounds what it does."""
    if task.kind not in (OpKind.ELEMENTWISE, OpKind.PERMUTE):
        return task.kind.value
    word = task.name.rpartition(".")[2]
    if word == "activation":
        return "gated_activation" if _is_gated(task) else "activation"
    if word.endswith("residual"):
        return "residual"
    return word if word in _NAMED else task.kind.value


def _is_gated(task: ComputeTask) -> bool:
    """Whether the task moves as many tensors as silu(gate)·up does in two ops, in either direction."""
    tensors = task.traffic_bytes / np.maximum(prod(task.sizes), 1)
    forward = task.phase in ("forward", "recompute")
    least = GATED_TENSORS if forward else GATED_TENSORS + 2
    return bool(np.all(tensors >= 2 * least))


@dataclass(frozen=True)
class Surface:
    """The seconds of one op over its sizes.

    t = (floor + work/rate)·exp(c): the roofline of the points' fastest and cheapest, times a correction that
    is exact at every point, and between points the mean of the nearest ones', weighted by distance in log
    sizes to the power of −4. `work` is the product of the sizes.
    """

    log_sizes: np.ndarray
    corrections: np.ndarray
    floor_s: float
    s_per_work: float

    @classmethod
    def through(cls, points: Sequence[OpPoint | LinkPoint], sizes: Sequence[Sequence[int]]) -> Surface:
        """The surface through some points at these sizes."""
        table = np.maximum(np.array(sizes, dtype=float), 1.0)
        seconds = np.array([point.time_s for point in points])
        work = table.prod(axis=1)
        floor, rate = float(seconds.min()), float((seconds / work).min())
        return cls(np.log(table), np.log(seconds / (floor + work * rate)), floor, rate)

    def seconds(self, sizes: Sequence[Array]) -> Array:
        """Seconds at sizes that may be arrays."""
        at = [np.maximum(np.asarray(size, dtype=float), 1.0) for size in sizes]
        work: Array = prod(at, start=np.float64(1.0))
        apart: Array = np.float64(0.0)
        for position, size in enumerate(at):
            apart = apart + (self.log_sizes[:, position] - np.log(size)[..., None]) ** 2
        weights = 1.0 / (apart + 1e-12) ** (_LOCALITY / 2)
        correction = (weights * self.corrections).sum(axis=-1) / weights.sum(axis=-1)
        return (self.floor_s + work * self.s_per_work) * np.exp(correction)

    def has(self, sizes: Sequence[int]) -> bool:
        """Whether a point of these sizes was measured."""
        apart = np.abs(self.log_sizes - np.log(np.maximum(np.array(sizes, dtype=float), 1.0)))
        return bool((apart.max(axis=1) <= SAME).any())


@dataclass(frozen=True)
class MeasuredRates:
    """What a table says for one number type and so many ranks at work; resolved once."""

    table: EfficiencyTable
    kernels: Kernels
    ops: Mapping[tuple[str, str], Surface]
    links: Mapping[CollectiveKind, Surface]
    ranks: Mapping[CollectiveKind, frozenset[int]]
    num_ranks: int
    is_serial: bool

    @property
    def has_update(self) -> bool:
        """Whether an optimizer's step was measured."""
        return (OPTIMIZER, "step") in self.ops

    def op_seconds(self, task: ComputeTask, sizes: Sequence[Array]) -> Array | None:
        """Seconds of an op at sizes that may be arrays; None where no such op was measured."""
        surface = self.ops.get(self._key(task))
        return None if surface is None else surface.seconds(sizes)

    def op_basis(self, task: ComputeTask) -> Basis:
        """measured: this op at this shape, and as many ranks at work; interpolated: the op at other
        shapes, or with more or fewer ranks at work;
        assumed: not covered, priced by the catalogue's curves."""
        surface = self.ops.get(self._key(task))
        if surface is None:
            return "assumed"
        exact = self.kernels.ranks == self.num_ranks and surface.has(task.sizes)
        return "measured" if exact else "interpolated"

    def update_seconds(self, moved_bytes: Array) -> Array | None:
        """Seconds of an optimizer step that moves so many bytes; None where none was measured."""
        surface = self.ops.get((OPTIMIZER, "step"))
        return None if surface is None else surface.seconds((moved_bytes,))

    def collective_seconds(self, kind: CollectiveKind, payload_bytes: Array, ranks: Array) -> Array | None:
        """Seconds of a collective of some ranks, 0 for one; None where no such collective was measured."""
        surface = self.links.get(kind)
        if surface is None:
            return None
        return np.where(np.greater(ranks, 1), surface.seconds((payload_bytes, ranks)), 0.0)[()]

    def covers(self, kind: CollectiveKind, ranks: Array) -> Array:
        """Whether groups of so many ranks are priced here: no larger than those that were measured."""
        return ranks <= max(self.ranks.get(kind, {0}))

    def collective_basis(self, kind: CollectiveKind, payload_bytes: int, ranks: int) -> Basis:
        """measured: this kind in groups of this size, between the smallest and the largest payload measured;
        interpolated: another size of group, or beyond those payloads; assumed: not covered, and groups of
        more ranks than any that was measured."""
        surface = self.links.get(kind)
        if surface is None or not self.covers(kind, ranks):
            return "assumed"
        low, high = np.exp(surface.log_sizes[:, 0].min()), np.exp(surface.log_sizes[:, 0].max())
        inside = low * (1 - SAME) <= payload_bytes <= high * (1 + SAME)
        return "measured" if inside and ranks in self.ranks[kind] else "interpolated"

    @staticmethod
    def _key(task: ComputeTask) -> tuple[str, str]:
        return op_label(task), "forward" if task.phase == "recompute" else task.phase


def measured_rates(table: EfficiencyTable, precision: Precision, num_ranks: int) -> MeasuredRates:
    """The rates of a table for a number type, with so many ranks at work on the machine.

    `is_serial`: processors launch an op and then run it, so that launching adds to every op; a GPU runs
    beside its host. Raises InputError for a number type that was not measured.
    """
    kernels = table.kernels_of(precision, num_ranks)
    by_op: dict[tuple[str, str], list[OpPoint]] = {}
    for point in kernels.points:
        by_op.setdefault((point.op, point.phase), []).append(point)
    by_kind: dict[CollectiveKind, list[LinkPoint]] = {}
    for link in table.links:
        by_kind.setdefault(CollectiveKind(link.collective), []).append(link)
    return MeasuredRates(
        table=table,
        kernels=kernels,
        ops={key: Surface.through(points, [p.sizes for p in points]) for key, points in by_op.items()},
        links={kind: _link_surface(points) for kind, points in by_kind.items()},
        ranks={kind: frozenset(point.ranks for point in points) for kind, points in by_kind.items()},
        num_ranks=num_ranks,
        is_serial=table.machine.device == "cpu",
    )


def _link_surface(points: Sequence[LinkPoint]) -> Surface:
    return Surface.through(points, [(point.bytes, point.ranks) for point in points])


def shapes_of(tasks: Sequence[ComputeTask]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The distinct ops, phases and sizes of some tasks, in order: what a calibration of a plan measures."""
    seen = set()
    for task in tasks:
        key = (op_label(task), "forward" if task.phase == "recompute" else task.phase, task.sizes)
        if key not in seen:
            seen.add(key)
            yield key
