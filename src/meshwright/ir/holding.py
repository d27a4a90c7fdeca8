"""What a rank holds of some parameters, summed by what happens to them. Elementwise.

Sums are all that memory, the optimizer and a step's communication need, and sums of kinds of layer add up to
those of any stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from meshwright.ir.parameters import Param
from meshwright.ir.sharding import AxisSizes, local_numel, zero_degree


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
        return Holding(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Holding)))

    def times(self, count: int) -> Holding:
        """That of equal blocks."""
        return Holding(*(getattr(self, f.name) * count for f in fields(Holding)))

    @property
    def total(self) -> int:
        """All elements, whole."""
        return self.dense + self.experts

    @property
    def share(self) -> int:
        """All elements that are this rank's under ZeRO."""
        return self.dense_share + self.expert_share


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
