"""What a rank holds of some parameters, summed by what happens to them. Elementwise.

Sums are all that memory, the optimizer and a step's communication need, and sums of kinds of layer add up to
those of any stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshwright.ir.parameters import Param
from meshwright.ir.sharding import AxisSizes, local_numel, zero_degree

Kind = tuple[bool, bool] | str
"""A kind of layer (see Model.layer_kind), `embedding`, `head`, or `table`: the copy of a tied embedding that
stands with the head."""


@dataclass(frozen=True, slots=True)
class Holding:
    """Elements on one rank.

    `dense`, `experts`: whole. `dense_share`, `expert_share`: this rank's share under ZeRO, each parameter
    rounded up. `partial`: of those whose gradients are partial sums over tp under sequence parallelism;
    `partial_by_heads`: without it too. `replicated`: of those that have more ranks of tp than blocks.
    `uncut`: of expert parameters that etp does not divide. `routers`: how many routers there are.
    """

    dense: int = 0
    experts: int = 0
    dense_share: int = 0
    expert_share: int = 0
    partial: int = 0
    partial_by_heads: int = 0
    replicated: int = 0
    uncut: int = 0
    routers: int = 0

    def __add__(self, other: Holding) -> Holding:
        return Holding(*(getattr(self, name) + getattr(other, name) for name in _SUMS))

    def times(self, count: int) -> Holding:
        """That of equal blocks."""
        return Holding(*(getattr(self, name) * count for name in _SUMS))

    @property
    def total(self) -> int:
        """All elements, whole."""
        return self.dense + self.experts

    @property
    def share(self) -> int:
        """All elements that are this rank's under ZeRO."""
        return self.dense_share + self.expert_share


_SUMS = tuple(Holding.__slots__)


def holding(params: Iterable[Param], sizes: AxisSizes) -> Holding:
    """What one rank holds of these parameters."""
    total = Holding()
    for param in params:
        whole = local_numel(param, sizes)
        share = -(-whole // zero_degree(param, sizes))
        expert = param.is_expert
        total += Holding(
            dense=0 if expert else whole,
            experts=whole if expert else 0,
            dense_share=0 if expert else share,
            expert_share=share if expert else 0,
            partial=whole if param.partial_over_tp else 0,
            partial_by_heads=whole if param.partial_over_tp and param.shared_by_heads else 0,
            replicated=0 if param.blocks is None else whole * (sizes.size("tp") > param.blocks),
            uncut=whole if expert and "etp" not in param.shard else 0,
            routers=int(param.part == "router" and len(param.shape) == 2),
        )
    return total


def sum_of_kinds(kinds: Mapping[Kind, Holding], counted: Mapping[Kind, int]) -> Holding:
    """What blocks hold together, given one of each kind and how many there are."""
    total = Holding()
    for kind, count in counted.items():
        total += kinds[kind].times(count)
    return total
