"""Tasks: ops and collectives with the sizes of one rank, in one phase of one micro-batch or step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meshwright.ir.graph import CollectiveKind, OpKind

Phase = Literal["forward", "recompute", "input_gradient", "weight_gradient", "step"]
PHASES: tuple[Phase, ...] = ("forward", "input_gradient", "weight_gradient")
"""The phases that every op has; `recompute` repeats some forward tasks just before the input gradient."""


@dataclass(frozen=True, slots=True)
class ComputeTask:
    """One op on one rank in one phase: local sizes, FLOPs, and bytes through device memory."""

    name: str
    phase: Phase
    kind: OpKind
    sizes: tuple[int, ...]
    flops: int
    traffic_bytes: int


@dataclass(frozen=True, slots=True)
class CommTask:
    """One collective on one rank: kind, axis, ranks in its group, and payload (see CollectiveKind)."""

    name: str
    phase: Phase
    kind: CollectiveKind
    axis: str
    num_ranks: int
    bytes: int


Task = ComputeTask | CommTask
