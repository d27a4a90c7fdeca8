"""From a whole parameter and a layout to what one rank holds of it.

Sizes on one rank are elementwise: where degrees are NumPy arrays, one call answers for many layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

from meshwright.ir.parameters import Param
from meshwright.layout import Layout


class AxisSizes(Protocol):
    """What sizes on a rank need of a layout, or of many at once."""

    def size(self, axis: str) -> int:
        """Ranks along an axis, as `Layout.size`. `dp_replica` is a whole number always."""


@dataclass(frozen=True, slots=True)
class LocalSlice:
    """The part of a parameter on one rank: half-open index ranges per dim, before any ZeRO sharding."""

    name: str
    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        return tuple(stop - start for start, stop in self.ranges)


def local_dim(size: int, ranks: int, blocks: int | None = None) -> int:
    """Elements of a divided dim on one rank.

    Blocks (heads) are never cut: with more ranks than blocks each block is replicated. Dims without
    blocks are padded up to a multiple of the ranks, as engines pad the vocabulary. Elementwise.
    """
    if blocks is None:
        return -(-size // ranks)
    return size // blocks * (blocks // ranks + (blocks < ranks))


def local_shape(param: Param, layout: AxisSizes) -> tuple[int, ...]:
    """Shape of a parameter on each rank that holds it, before ZeRO sharding."""
    return tuple(
        size if axis is None else local_dim(size, layout.size(axis), param.blocks)
        for size, axis in zip(param.shape, param.shard, strict=True)
    )


def local_slice(param: Param, layout: Layout, rank: int) -> LocalSlice:
    """Which indices of a parameter a rank holds, before ZeRO sharding.

    Under expert sharding the coordinates are those of the expert view. A padded tail is cut off.
    """
    coordinates = layout.coordinates(rank, "expert" if param.is_expert else "dense")
    ranges = []
    for size, axis, width in zip(param.shape, param.shard, local_shape(param, layout), strict=True):
        if axis is None:
            ranges.append((0, size))
            continue
        position = coordinates[axis]
        if param.blocks is not None and layout.size(axis) > param.blocks:
            position //= layout.size(axis) // param.blocks
        start = min(position * width, size)
        ranges.append((start, min(start + width, size)))
    return LocalSlice(param.name, tuple(ranges))


def local_numel(param: Param, layout: AxisSizes) -> int:
    """Elements of a parameter on one rank, before ZeRO sharding."""
    return prod(local_shape(param, layout))


def zero_degree(param: Param, layout: AxisSizes) -> int:
    """Over how many ranks ZeRO divides a parameter: dp·cp for dense ones, edp for routed experts, of each the
    share of one replica."""
    return layout.size("edp_shard" if param.is_expert else "dp_shard")


def zero_axes(layout: AxisSizes) -> tuple[str, str]:
    """The axes over which ZeRO divides dense parameters and routed experts: the data axes, or one replica's
    share of them."""
    return ("dp_cp", "edp") if layout.size("dp_replica") == 1 else ("dp_shard", "edp_shard")


def replica_axis(axis: str) -> str:
    """The axis of the ranks that hold the same share, given one of `zero_axes`; it has one rank where that is
    a whole data axis."""
    return "edp_replica" if axis in ("edp", "edp_shard") else "dp_replica"


def copies(param: Param, layout: Layout) -> int:
    """How many ranks of a stage hold each element of a parameter (before ZeRO)."""
    stage_ranks = layout.world_size // layout.pp
    pieces = prod(layout.size(axis) for axis in param.shard if axis is not None)
    if param.blocks is not None and pieces > param.blocks:
        pieces = param.blocks
    return stage_ranks // pieces
