"""ZeRO 3: parameters divided by FSDP2, gathered for each block before its forward and its backward.

FSDP2 would average gradients over the data ranks, and scale those of experts by the wrong factor where they
have a mesh of their own (pytorch/pytorch#160285). Losses here are sums over tokens divided by the global
count, so gradients are plainly added: a divide factor of 1, and SUM as the reduction, which gloo has too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from meshwright.ir.sharding import replica_axis, zero_axes
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.model import Stage
from meshwright.runtime.shares import Held, Partial, Share, add_up_runs, end_to_end


def shard_stage(stage: Stage, mesh: Mesh, kind: torch.dtype) -> None:
    """Divide a stage's parameters in place: its layers, its ends, and each layer's experts over their own
    axis. Parameters along whose axis there is one rank stay as they are.

    A tied table that stands at both ends of one stage is gathered once for all of it.
    """
    if kind == torch.float32:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    else:
        policy = MixedPrecisionPolicy(kind, torch.float32, cast_forward_inputs=False)
    experts = {parameter for one in _experts(stage) for parameter in one.parameters()}
    over_dp, over_edp = (_data_mesh(mesh, axis) for axis in zero_axes(mesh.layout))
    if over_edp is not None:
        for one in _experts(stage):
            fully_shard(one, mesh=over_edp, mp_policy=policy)
        experts = {parameter for one in _experts(stage) for parameter in one.parameters()}
    if over_dp is None:
        assert over_edp is not None
        dense = set(stage.parameters()) - experts
        fully_shard(stage, mesh=over_edp, mp_policy=policy, ignored_params=dense)
    else:
        for block in _blocks(stage):
            fully_shard(block, mesh=over_dp, mp_policy=policy, ignored_params=experts)
        fully_shard(stage, mesh=over_dp, mp_policy=policy, ignored_params=experts)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _data_mesh(mesh: Mesh, axis: str) -> DeviceMesh | None:
    """The ranks over which FSDP2 divides, with replicas in a dim of their own; None where one rank is left to
    divide over."""
    if mesh.group(axis) is None:
        return None
    if mesh.layout.dp_replicas == 1:
        return mesh.device_mesh(axis)
    return mesh.device_mesh(replica_axis(axis), axis)


def _experts(stage: Stage) -> list[nn.Module]:
    return [moe.experts for moe in stage.moe_layers()]


def _blocks(stage: Stage) -> Iterator[nn.Module | list[nn.Module]]:
    """What is gathered together: the graph's blocks."""
    yield from stage.layers.values()
    tied = stage.has_embedding and stage.has_head and stage.head is None
    if tied:
        return
    first: list[nn.Module] = [part for part in (stage.embedding, stage.positions) if part is not None]
    last: list[nn.Module] = [part for part in (stage.norm, stage.head) if part is not None]
    if stage.has_embedding:
        yield first
    if stage.has_head:
        yield last if stage.head is not None else [*last, *first]


@dataclass(frozen=True)
class _Piece:
    held: Held
    local: Tensor
    first_row: int
    start: int
    stop: int


class Sharded:
    """The parameters of one data axis under FSDP2: it has reduced their gradients when backward is done."""

    def __init__(self, held: Sequence[Held], axis: str, mesh: Mesh, partial: Partial) -> None:
        self.mesh, self.axis = mesh, axis
        placed, self.partial_runs = end_to_end(held, partial, lambda one: _local(one.tensor).numel())
        self.pieces = [
            _Piece(one.held, _local(one.held.tensor), _first_row(one.held.tensor), one.start, one.stop)
            for one in placed
        ]
        size = max((piece.stop for piece in self.pieces), default=0)
        self.gradients = torch.zeros(size, dtype=torch.float32, device=mesh.device)
        self.shares = list(self._shares())

    def _shares(self) -> Iterator[Share]:
        for piece in self.pieces:
            if piece.local.numel():
                start = piece.first_row * (piece.local.numel() // piece.local.shape[0])
                stop = start + piece.local.numel()
                gradient = self.gradients[piece.start : piece.stop]
                yield Share(piece.held, start, stop, piece.local.view(-1), gradient)

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        for piece in self.pieces:
            piece.held.tensor.grad = None

    def collect(self) -> None:
        """The reduced gradients, end to end."""
        for piece in self.pieces:
            grad, place = piece.held.tensor.grad, self.gradients[piece.start : piece.stop]
            if grad is None:
                place.zero_()
            else:
                place.copy_(_local(grad).flatten())
            piece.held.tensor.grad = None

    def gradient(self, name: str) -> Tensor | None:
        """What this rank holds of a parameter's gradient, if it is here."""
        found = (piece for piece in self.pieces if piece.held.name == name)
        return next((self.gradients[piece.start : piece.stop] for piece in found), None)

    def add_partial_sums(self) -> None:
        """Add up what the ranks of tp, or of etp, each hold a part of."""
        add_up_runs(self.gradients, self.partial_runs, self.mesh)

    def reduce(self) -> None:
        """FSDP2 did so in backward."""

    def publish(self) -> None:
        """Masters are the parameters; FSDP2 gathers them when they are needed."""


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def _first_row(tensor: Tensor) -> int:
    """FSDP2 divides dim 0 in equal runs, the last of them shorter or empty (torch.chunk)."""
    assert isinstance(tensor, DTensor)
    rows, mesh = tensor.shape[0], tensor.device_mesh
    shards = mesh.ndim - 1  # replicas, where there are any, stand first
    return min(mesh.get_local_rank(shards) * -(-rows // mesh.size(shards)), rows)


def rebound(held: Iterable[Held], stages: Iterable[nn.Module]) -> list[Held]:
    """The same parameters after FSDP2 has put others in their place."""
    now = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
    return [replace(one, tensor=now[one.name]) for one in held]
