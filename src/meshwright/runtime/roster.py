"""Who computes what: every rank's place, its part of the model, and the bytes that it really holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshwright.runtime.mesh import Mesh
from meshwright.runtime.step import Trainer


@dataclass(frozen=True)
class RankFacts:
    """One rank as it was built. `experts`: the first and the last of each layer that it holds.
    `weight_bytes` is counted from the tensors that exist."""

    rank: int
    coordinates: dict[str, int]
    layers: tuple[int, ...]
    has_embedding: bool
    has_head: bool
    experts: tuple[int, int] | None
    weight_bytes: int
    device: str


def roster(trainer: Trainer) -> list[RankFacts]:
    """The facts of all ranks, in order, on every rank."""
    own = _own_facts(trainer)
    world = trainer.mesh.layout.world_size
    if world == 1:
        return [own]
    everyone: list[RankFacts] = [own] * world
    dist.all_gather_object(everyone, own, group=trainer.mesh.group("coordination"))
    return everyone


def _own_facts(trainer: Trainer) -> RankFacts:
    mesh, replica = trainer.mesh, trainer.replica
    stages = replica.program.stages_of(mesh.position("pp"))
    return RankFacts(
        mesh.rank,
        _coordinates(mesh),
        tuple(layer for stage in stages for layer in stage.layers),
        any(stage.has_embedding for stage in stages),
        any(stage.has_head for stage in stages),
        _experts(trainer),
        sum(_bytes(held.tensor) for held in replica.held),
        mesh.device.type,
    )


def _coordinates(mesh: Mesh) -> dict[str, int]:
    layout = mesh.layout
    expert = layout.coordinates(mesh.rank, "expert")
    return {**layout.coordinates(mesh.rank), **{axis: expert[axis] for axis in ("etp", "ep", "edp")}}


def _experts(trainer: Trainer) -> tuple[int, int] | None:
    if next(trainer.moe_layers(), None) is None:
        return None
    local = trainer.plan.model.num_experts // trainer.mesh.size("ep")
    first = trainer.mesh.position("ep") * local
    return first, first + local - 1


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
