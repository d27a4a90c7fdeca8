"""The process groups of a layout: one for each axis, made from `Layout.groups`.

Every axis has a group of its own even where two axes join the same ranks, so that whoever watches
communication can tell by its group which axis a call belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from meshwright.layout import GROUP_AXES, REPLICA_AXES, Layout, View


@dataclass(frozen=True)
class Mesh:
    """One rank's place in a layout, and the groups that it speaks in.

    `groups` lacks the axes along which the layout has one rank: nothing is sent there. `kv_copies` joins the
    ranks of tp that hold the same key-value heads, `embedding` the first and the last stage. `coordination`
    joins all over gloo where the others speak NCCL, for what is no tensor.
    """

    layout: Layout
    rank: int
    device: torch.device
    groups: dict[str, ProcessGroup] = field(default_factory=dict)

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return self.layout.size(axis)

    def position(self, axis: str) -> int:
        """This rank's place along an axis; `dp_cp` counts context parallelism first."""
        view: View = "expert" if axis.startswith("e") else "dense"
        return self.layout.group_of(self.rank, axis, view).index(self.rank)

    def group(self, axis: str) -> ProcessGroup | None:
        """The group of an axis; None where it has one rank."""
        return self.groups.get(axis)

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """An axis as a DeviceMesh, or two of which the second one's ranks are neighbours; for what of PyTorch
        asks for one."""
        if len(axes) == 1:
            return DeviceMesh.from_group(self.groups[axes[0]], self.device.type, mesh_dim_names=axes)
        outer, inner = axes
        view: View = "expert" if inner.startswith("e") else "dense"
        rows = [
            self.layout.group_of(first, inner, view) for first in self.layout.group_of(self.rank, outer, view)
        ]
        groups = [self.groups[axis] for axis in axes]
        return DeviceMesh.from_group(groups, self.device.type, torch.tensor(rows), mesh_dim_names=axes)


def build_mesh(layout: Layout, rank: int, device: torch.device, kv_heads: int = 1) -> Mesh:
    """Make this rank's groups. Every rank of the world calls it once, after `init_process_group`."""
    groups: dict[str, ProcessGroup] = {}
    for axis, view in GROUP_AXES:
        if layout.size(axis) > 1:
            groups[axis] = _group(layout.group_of(rank, axis, view), axis)
    if layout.tp > kv_heads:
        groups["kv_copies"] = _kv_copies(layout, rank, kv_heads)
    if layout.world_size > 1:
        groups["world"] = _group(list(range(layout.world_size)), "world")
        if device.type == "cuda" and dist.get_backend() == "nccl":
            groups["coordination"] = dist.new_group(backend="gloo", group_desc="coordination")
    if layout.dp_replicas > 1:
        for axis, view in REPLICA_AXES:
            if layout.size(axis) > 1:
                groups[axis] = _group(layout.group_of(rank, axis, view), axis)
    if layout.pp > 1:  # last: torch names a group by how many its members have made before it
        stages = layout.group_of(rank, "pp")
        if rank in (stages[0], stages[-1]):
            groups["embedding"] = _group([stages[0], stages[-1]], "embedding")
    return Mesh(layout, rank, device, groups)


def _kv_copies(layout: Layout, rank: int, kv_heads: int) -> ProcessGroup:
    copies = layout.tp // kv_heads
    peers = layout.group_of(rank, "tp")
    first = peers.index(rank) // copies * copies
    return _group(peers[first : first + copies], "kv_copies")


def _group(ranks: list[int], axis: str) -> ProcessGroup:
    """A group that its members alone make: no rank waits for those outside."""
    group = dist.new_group(ranks, use_local_synchronization=True, group_desc=axis)
    if not isinstance(group, ProcessGroup):
        raise AssertionError(f"rank {dist.get_rank()} is no member of its own {axis} group {ranks}")
    return group


def single_process(device: torch.device) -> Mesh:
    """The mesh of one process, which speaks to nobody."""
    return Mesh(Layout(), 0, device)
