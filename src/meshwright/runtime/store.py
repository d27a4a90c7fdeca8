"""All parameters of a rank, in two parts: dense ones, and routed experts, which have their own data axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from meshwright.ir.sharding import zero_axes
from meshwright.runtime.buckets import Bucket
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.sharded import Sharded
from meshwright.runtime.shares import Held, Part, Partial, Share


class Store:
    """Where weights and gradients live, and how they are reduced, divided and published."""

    def __init__(
        self,
        held: Sequence[Held],
        mesh: Mesh,
        kind: torch.dtype,
        zero_stage: int,
        sequence_parallel: bool,
        shares_table: bool = False,
    ) -> None:
        """`kind`: the compute type. `shares_table`: a tied embedding stands here and on the pipeline's other
        end too."""
        self.mesh, self.shares_table = mesh, shares_table
        dense = [h for h in held if not h.param.is_expert]
        experts = [h for h in held if h.param.is_expert]
        self.has_experts = bool(experts)
        self.parts: list[Part] = []
        axes = zero_axes(mesh.layout) if zero_stage else ("dp_cp", "edp")
        partial_sums = (_dense_partial(dense, mesh, sequence_parallel), _expert_partial(experts))
        for axis, own, partial in zip(axes, (dense, experts), partial_sums, strict=True):
            if own and isinstance(own[0].tensor, DTensor):
                self.parts.append(Sharded(own, axis, mesh, partial))
            elif own:
                self.parts.append(Bucket(axis, own, mesh, kind, zero_stage > 0, partial))
        self.shares: list[Share] = [share for part in self.parts for share in part.shares]

    def clear_gradients(self) -> None:
        """Forget the gradients of the step before."""
        for part in self.parts:
            part.clear()

    def reduce_gradients(self) -> None:
        """Partial sums first, then the two ends of a tied embedding, then the data axes."""
        for part in self.parts:
            part.collect()
        for part in self.parts:
            part.add_partial_sums()
        if self.shares_table:
            table = next(g for part in self.parts if (g := part.gradient("embedding.weight")) is not None)
            dist.all_reduce(table, group=self.mesh.group("embedding"))
        for part in self.parts:
            part.reduce()

    def publish(self) -> None:
        """Masters to weights, everywhere."""
        for part in self.parts:
            part.publish()


def _dense_partial(held: Sequence[Held], mesh: Mesh, sequence_parallel: bool) -> Partial:
    """Over tp those of which each rank saw its share of the tokens, or of the heads; and those that several
    ranks hold a copy of, each used with other heads."""
    copied = mesh.group("kv_copies") is not None
    partial = frozenset(
        h.name for h in held if h.param.partial_over_tp and (sequence_parallel or h.param.shared_by_heads)
    )
    copies = frozenset(
        h.name for h in held if copied and h.param.blocks is not None and mesh.size("tp") > h.param.blocks
    )
    return [("tp", partial), ("kv_copies", copies)]


def _expert_partial(held: Sequence[Held]) -> Partial:
    """Over etp the biases that are added after its partial sums."""
    return [("etp", frozenset(h.name for h in held if "etp" not in h.param.shard))]
