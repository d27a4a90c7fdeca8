"""What DCP's planners need to be told about pieces: which object stands behind an index, and that the
rectangles of all ranks make up every tensor.

DCP tells rectangles of one tensor apart by their offsets alone, both when it drops the copies of replicas and
when it looks one up. Two parts that begin at the same place and differ in size would lose data in silence, so
everything is checked before DCP drops anything. Its own check comes later and is left out: it repeats the
work for every tensor, while most tensors of a model are cut in one of a few ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from meshwright.errors import MeshwrightError
from meshwright.runtime.checkpoint.pieces import Pieces
from meshwright.runtime.checkpoint.rectangles import Rectangle, tiling_problem


class Tilings:
    """Checks that rectangles make up a whole tensor, once for each way of cutting one."""

    def __init__(self) -> None:
        self._right: set[tuple[Any, ...]] = set()

    def check(self, name: str, shape: tuple[int, ...], parts: set[Rectangle]) -> None:
        """Raise MeshwrightError unless distinct rectangles are disjoint and cover the tensor."""
        key = (shape, *sorted(parts))
        if key in self._right:
            return
        problem = tiling_problem(shape, parts)
        if problem is not None:
            raise MeshwrightError(f"{name}: {problem}")
        self._right.add(key)


class PiecesSavePlanner(DefaultSavePlanner):
    """DCP's planner over a mapping of names to Pieces."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """This rank's rectangles, and the shape and dtype of every tensor that it names."""
        plan = super().create_local_plan()
        declared = {}
        for name, pieces in self.state_dict.items():
            offsets = [piece.offsets for piece in pieces.filled]
            if len(set(offsets)) < len(offsets):
                raise MeshwrightError(f"{name}: one rank holds two parts that begin at the same place")
            declared[name] = (pieces.shape, pieces.dtype)
        return dataclasses.replace(plan, planner_data=declared)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Which rank writes which rectangle: copies go to the rank with the fewest bytes so far."""
        _check_plans(all_plans)
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The tensor behind a rectangle; DCP's own look-up takes nothing but tensors."""
        return _tensor_at(self.state_dict, index)


def _check_plans(plans: list[SavePlan]) -> None:
    """All ranks mean the same tensors, and together hold every element of them."""
    declared: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for plan in plans:
        for name, (shape, dtype) in plan.planner_data.items():
            known = declared.setdefault(name, (shape, dtype))
            if known != (shape, dtype):
                raise MeshwrightError(
                    f"{name}: one rank has it as {known[0]} {known[1]}, another as {shape} {dtype}"
                )
    parts: dict[str, set[Rectangle]] = {name: set() for name in declared}
    for plan in plans:
        for item in plan.items:
            if item.tensor_data is not None:
                chunk = item.tensor_data.chunk
                parts[item.index.fqn].add((tuple(chunk.offsets), tuple(chunk.sizes)))
    tilings = Tilings()
    for name, (shape, _) in declared.items():
        tilings.check(name, shape, parts[name])


class PiecesLoadPlanner(DefaultLoadPlanner):
    """DCP's planner over a mapping of names to Pieces."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the mapping as it is; DCP's own set-up replaces objects that it does not know by None."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor that a rectangle is read into."""
        return _tensor_at(self.state_dict, index)


def _tensor_at(state: Mapping[str, Pieces], index: MetadataIndex) -> Tensor:
    return state[index.fqn].__get_tensor_shard__(index).detach()


def check_saved(saved: Mapping[str, TensorStorageMetadata], rank: int, num_ranks: int) -> None:
    """Raise MeshwrightError unless each tensor of a checkpoint is all there; each rank checks a share."""
    tilings = Tilings()
    for name in sorted(saved)[rank::num_ranks]:
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in saved[name].chunks]
        if len(set(chunks)) < len(chunks):
            raise MeshwrightError(f"{name}: the checkpoint holds one part twice")
        tilings.check(name, tuple(saved[name].size), set(chunks))


def check_wanted(state: Mapping[str, Pieces], saved: Mapping[str, TensorStorageMetadata]) -> None:
    """Raise MeshwrightError unless a checkpoint's tensors are those that are wanted, in shape and dtype.

    A part inside the shape is then covered, because the checkpoint holds every element of its tensors.
    """
    for name, pieces in state.items():
        if name not in saved:
            raise MeshwrightError(f"{name}: the checkpoint has no such tensor")
        shape, dtype = tuple(saved[name].size), saved[name].properties.dtype
        if shape != tuple(pieces.shape):
            raise MeshwrightError(f"{name}: the checkpoint has shape {shape}, wanted is {pieces.shape}")
        if dtype != pieces.dtype:
            raise MeshwrightError(f"{name}: the checkpoint has {dtype}, wanted is {pieces.dtype}")
        check_pieces(name, pieces)


def check_pieces(name: str, pieces: Pieces) -> None:
    """Raise MeshwrightError, with the tensor's name, where pieces are wrong by themselves."""
    problem = pieces.problem()
    if problem is not None:
        raise MeshwrightError(f"{name}: {problem}")
