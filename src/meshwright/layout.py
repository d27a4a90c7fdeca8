"""One Layout: the degrees of parallelism, and the groups of ranks that follow from them.

A rank is a mixed-radix number. Dense layers read it as `tp-cp-dp-pp` and expert layers read the same
number as `etp-ep-edp-pp`, leftmost fastest, which is Megatron's rank order `tp-cp-ep-dp-pp`. Expert
parallelism re-names ranks that tensor, context and data parallelism already hold; it never multiplies
the world. (Megatron-LM `megatron/core/parallel_state.py`, class RankGenerator.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd, isqrt, prod
from typing import Literal

from pydantic import model_validator

from meshwright.errors import InputError
from meshwright.files import Noun
from meshwright.units import Count

MAX_WORLD_SIZE = 2**20
_LARGEST_TRIAL = 2**20

DenseAxis = Literal["tp", "cp", "dp", "pp"]
ExpertAxis = Literal["etp", "ep", "edp", "pp"]
View = Literal["dense", "expert"]

DENSE_ORDER: tuple[DenseAxis, ...] = ("tp", "cp", "dp", "pp")
EXPERT_ORDER: tuple[ExpertAxis, ...] = ("etp", "ep", "edp", "pp")
GROUP_AXES: tuple[tuple[str, View], ...] = (
    ("tp", "dense"),
    ("dp_cp", "dense"),
    ("pp", "dense"),
    ("etp", "expert"),
    ("ep", "expert"),
    ("edp", "expert"),
)
"""Axes along which ranks speak, and the view that names them."""
REPLICA_AXES: tuple[tuple[str, View], ...] = (
    ("dp_shard", "dense"),
    ("dp_replica", "dense"),
    ("edp_shard", "expert"),
    ("edp_replica", "expert"),
)
"""The same where ZeRO's groups have replicas."""


class LayoutRequest(Noun):
    """The `layout` of a deployment file: given degrees are kept, missing ones are chosen.

    `dp_replicas` is never chosen: ZeRO divides over all data-parallel ranks unless a file says otherwise.
    """

    tp: Count | None = None
    cp: Count | None = None
    dp: Count | None = None
    pp: Count | None = None
    vpp: Count | None = None
    ep: Count | None = None
    etp: Count | None = None
    dp_replicas: Count = 1


class Layout(Noun):
    """All degrees of a deployment; `edp` follows. Raises InputError when they cannot exist together.

    With `dp_replicas` R above 1 ZeRO divides within runs of dp·cp/R (for experts edp/R) neighbouring ranks,
    and R such runs hold the same: hybrid sharding, so that gathering stays on fast links.
    """

    tp: Count = 1
    cp: Count = 1
    dp: Count = 1
    pp: Count = 1
    vpp: Count = 1
    ep: Count = 1
    etp: Count = 1
    dp_replicas: Count = 1

    @model_validator(mode="after")
    def _experts_fold_into_the_dense_ranks(self) -> Layout:
        if self.world_size > MAX_WORLD_SIZE:
            raise InputError("world_size", self.world_size, f"at most {MAX_WORLD_SIZE:,} ranks")
        self.require_fold()
        for name, ranks in (("dp·cp", self.dp * self.cp), ("edp", self.edp)):
            if ranks % self.dp_replicas:
                both = gcd(self.dp * self.cp, self.edp)
                near = nearest_divisors(both, self.dp_replicas)
                raise InputError("dp_replicas", self.dp_replicas, f"must divide {name} = {ranks}", near)
        return self

    def require_fold(self) -> None:
        """Whether the experts' degrees fold into the ranks of a stage. Raises InputError when they do not."""
        stage_ranks = self.tp * self.cp * self.dp
        if stage_ranks % self.etp:
            rule = f"must divide tp·cp·dp = {stage_ranks}: experts re-name those ranks"
            raise InputError("etp", self.etp, rule, nearest_divisors(stage_ranks, self.etp))
        if stage_ranks % (self.etp * self.ep):
            product = self.etp * self.ep
            rule = f"etp·ep = {product} must divide tp·cp·dp = {stage_ranks}: experts re-name those ranks"
            raise InputError("ep", self.ep, rule, nearest_divisors(stage_ranks, self.ep, multiple=self.etp))

    @property
    def world_size(self) -> int:
        """tp·cp·dp·pp, which equals etp·ep·edp·pp."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def edp(self) -> int:
        """Expert data parallelism: how many ranks of a stage hold the same slice of the same expert."""
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    @property
    def num_stages(self) -> int:
        """Pipeline stages, counting every chunk of every rank."""
        return self.pp * self.vpp

    def size(self, axis: str) -> int:
        """Ranks along an axis; `dp_cp` is the data axis that replicates dense parameters, `world` all.

        `dp_shard` and `edp_shard` are the ranks over which ZeRO divides, `dp_replica` and `edp_replica` those
        that hold the same share.
        """
        match axis:
            case "dp_cp":
                return self.dp * self.cp
            case "world":
                return self.world_size
            case "dp_shard":
                return self.dp * self.cp // self.dp_replicas
            case "edp_shard":
                return self.edp // self.dp_replicas
            case "dp_replica" | "edp_replica":
                return self.dp_replicas
        if axis not in ("tp", "cp", "dp", "pp", "vpp", "ep", "etp", "edp"):
            raise KeyError(axis)
        return int(getattr(self, axis))

    def coordinates(self, rank: int, view: View = "dense") -> dict[str, int]:
        """Position of a rank along each axis of a view. Raises InputError outside the world."""
        self._require_rank(rank)
        position, coordinates = rank, {}
        for axis in _order(view):
            position, coordinates[axis] = divmod(position, self.size(axis))
        return coordinates

    def rank(self, coordinates: Mapping[str, int], view: View = "dense") -> int:
        """The rank at a position: inverse of `coordinates`."""
        rank = 0
        for axis in reversed(_order(view)):
            rank = rank * self.size(axis) + coordinates[axis]
        return rank

    def groups(self, axis: str, view: View = "dense") -> list[list[int]]:
        """Every group of ranks that differ along one axis only, in order of their first rank.

        `dp_cp` is an axis of the dense view here, as in `size`.
        """
        stride = self.stride(axis, view)
        size = self.size(axis)
        span = stride * size
        return [
            list(range(block + offset, block + offset + span, stride))
            for block in range(0, self.world_size, span)
            for offset in range(stride)
        ]

    def group_of(self, rank: int, axis: str, view: View = "dense") -> list[int]:
        """Members of the group along an axis that a rank belongs to. Raises InputError outside the world."""
        self._require_rank(rank)
        stride, size = self.stride(axis, view), self.size(axis)
        first = rank - rank // stride % size * stride
        return list(range(first, first + stride * size, stride))

    def stride(self, axis: str, view: View = "dense") -> int:
        """Distance in ranks between neighbours along an axis. Raises KeyError for one the view has not."""
        order = _order(view)
        prefix = {"dense": "dp", "expert": "edp"}[view]
        if axis == f"{prefix}_replica":
            return self.stride(f"{prefix}_shard", view) * self.size(f"{prefix}_shard")
        if axis == "edp_shard" and view == "expert":
            axis = "edp"
        if axis in ("dp_cp", "dp_shard") and view == "dense":
            axis = "cp"  # cp and dp stand side by side in the order, so their ranks form one axis
        if axis not in order:
            raise KeyError(axis)
        return prod(self.size(inner) for inner in order[: order.index(axis)])

    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            rule = f"a rank of this layout lies between 0 and {self.world_size - 1}"
            raise InputError("rank", rank, rule, [min(max(rank, 0), self.world_size - 1)])

    def degrees(self) -> dict[str, int]:
        """Every degree by name, with the world size and edp; `dp_replicas` where there are several."""
        names = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp", "edp", "world_size")
        replicas = {"dp_replicas": self.dp_replicas} if self.dp_replicas > 1 else {}
        return {**{name: getattr(self, name) for name in names}, **replicas}


def _order(view: View) -> tuple[str, ...]:
    return DENSE_ORDER if view == "dense" else EXPERT_ORDER


def divisors(number: int) -> list[int]:
    """All divisors in ascending order; above 2^40 only those that are, or whose cofactor is, at most 2^20."""
    small = [d for d in range(1, min(isqrt(number), _LARGEST_TRIAL) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def nearest_divisors(number: int, wanted: int, multiple: int = 1, count: int = 3) -> list[int]:
    """The divisors d of `number` nearest to `wanted` for which d·multiple divides it too."""
    valid = [d for d in divisors(number) if number % (d * multiple) == 0]
    return sorted(sorted(valid, key=lambda d: (abs(d - wanted), d))[:count])


def nearest_to(wanted: int, valid: Sequence[int], count: int = 3) -> list[int]:
    """The values of a list nearest to the wanted one, ascending."""
    return sorted(sorted(valid, key=lambda v: (abs(v - wanted), v))[:count])
