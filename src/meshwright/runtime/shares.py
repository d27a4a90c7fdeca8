"""What a rank holds of the parameters and which part of that it updates: the stores' common words.

A rank holds a slice of each parameter (`ir/sharding.py`). Under ZeRO it updates a flat range of each slice
alone, in FP32; without ZeRO all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.ir.parameters import Param
from meshwright.ir.program import StageProgram
from meshwright.ir.sharding import LocalSlice, local_shape, local_slice
from meshwright.layout import Layout
from meshwright.runtime.mesh import Mesh

Partial = Sequence[tuple[str, frozenset[str]]]
"""Axes along which ranks hold partial sums of gradients, each with the parameters' names."""


@dataclass(frozen=True)
class Held:
    """One parameter on one rank.

    `slice`: its indices in the whole parameter, without the rows that only pad a vocabulary. `is_first`:
    whether this rank is the first of those that hold the same slice beside the data axes, so that it alone
    counts in a norm.
    """

    param: Param
    tensor: nn.Parameter
    slice: LocalSlice
    is_first: bool

    @property
    def name(self) -> str:
        """The parameter's name in the graph."""
        return self.param.name

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms, biases and sinks."""
        return len(self.param.shape) > 1 and not self.param.name.endswith("_bias")


@dataclass(frozen=True)
class Share:
    """The part of a held parameter that this rank updates: elements [start, stop) of its local tensor.

    `master` and `gradient` are FP32, flat, and views of the store's buffers.
    """

    held: Held
    start: int
    stop: int
    master: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Placed:
    """Where a held parameter's gradient lies in a store's flat buffer: elements [start, stop)."""

    held: Held
    start: int
    stop: int


@dataclass(frozen=True)
class PartialRun:
    """Elements [start, stop) of a flat buffer that are partial sums over an axis."""

    axis: str
    start: int
    stop: int


def end_to_end(
    held: Sequence[Held], partial: Partial, size: Callable[[Held], int]
) -> tuple[list[Placed], list[PartialRun]]:
    """Places in one buffer, of `size` elements each. Partial sums over the same axis stand side by side,
    before all else, so that each such sum is one call."""
    placed: list[Placed] = []
    runs: list[PartialRun] = []
    place = 0
    named = {name for _, names in partial for name in names}
    for axis, names in (*partial, ("", frozenset(h.name for h in held) - named)):
        first = place
        for one in (h for h in held if h.name in names):
            placed.append(Placed(one, place, place + size(one)))
            place = placed[-1].stop
        if axis and place > first:
            runs.append(PartialRun(axis, first, place))
    return placed, runs


def add_up_runs(gradients: Tensor, runs: Iterable[PartialRun], mesh: Mesh) -> None:
    """Add up, in place, what the ranks of tp, or of etp, each hold a part of."""
    for run in runs:
        group = mesh.group(run.axis)
        if group is not None:
            dist.all_reduce(gradients[run.start : run.stop], group=group)


class Part(Protocol):
    """The parameters that one data axis reduces: dense ones over dp·cp, or routed experts over edp."""

    shares: list[Share]

    def clear(self) -> None:
        """Forget the gradients of the step before."""

    def collect(self) -> None:
        """Bring gradients to where they are added up, once backward is done."""

    def add_partial_sums(self) -> None:
        """Add up what the ranks of another axis each hold a part of."""

    def gradient(self, name: str) -> Tensor | None:
        """What this rank holds of a parameter's gradient, if it is here."""

    def reduce(self) -> None:
        """Add up over the data axis, where backward has not done so."""

    def publish(self) -> None:
        """Bring updated masters to all ranks' weights."""


class NotBoundError(AssertionError):
    """The modules are not those of the graph."""


def held_parameters(stages: Iterable[tuple[StageProgram, nn.Module]], mesh: Mesh) -> list[Held]:
    """The parameters of a rank, each once, bound to the graph by name and shape.

    Raises NotBoundError where the modules have other parameters than the graph says, or of other shapes.
    """
    found: dict[str, Held] = {}
    for stage, module in stages:
        declared = {param.name: param for param in stage.params}
        tensors = dict(module.named_parameters())
        if declared.keys() != tensors.keys():
            missing, surplus = declared.keys() - tensors.keys(), tensors.keys() - declared.keys()
            raise NotBoundError(f"stage {stage.index}: missing {_some(missing)}, surplus {_some(surplus)}")
        for name, param in declared.items():
            shape = local_shape(param, mesh.layout)
            if tuple(tensors[name].shape) != shape:
                raise NotBoundError(f"{name}: {tuple(tensors[name].shape)} where the graph has {shape}")
            held = Held(
                param,
                tensors[name],
                local_slice(param, mesh.layout, mesh.rank),
                _is_first(param, mesh.layout, mesh.rank) and not _is_copy(param, stage),
            )
            if name in found and found[name].tensor is not tensors[name]:
                raise NotBoundError(f"{name}: two tensors on one rank")
            found.setdefault(name, held)
    return list(found.values())


def _some(names: Set[str]) -> str:
    shown = sorted(names)[:3]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more if shown else "none"


def _is_first(param: Param, layout: Layout, rank: int) -> bool:
    """Whether no rank before this one along tp (etp for experts) holds the same slice."""
    axis = "etp" if param.is_expert else "tp"
    position = layout.coordinates(rank, "expert" if param.is_expert else "dense")[axis]
    if axis not in param.shard:
        return position == 0
    ranks = layout.size(axis)
    if param.blocks is not None and ranks > param.blocks:
        return position % (ranks // param.blocks) == 0
    return True


def _is_copy(param: Param, stage: StageProgram) -> bool:
    """Whether this is the last stage's copy of a tied embedding."""
    return param.part == "embedding" and not stage.has_embedding


def fill(held: Held, values: Tensor) -> None:
    """Put a slice's values into the local tensor; rows that only pad become zero."""
    with torch.no_grad():
        held.tensor.zero_()
        region = tuple(slice(0, size) for size in held.slice.shape)
        held.tensor[region] = values.to(held.tensor.dtype)
