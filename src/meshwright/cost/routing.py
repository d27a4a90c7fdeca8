"""How uneven routing loads the fullest rank of an expert group."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from meshwright.model import Model
from meshwright.workload import Lognormal, Routing, RoutingCounts, Zipf

if TYPE_CHECKING:
    import numpy as np

DRAWS = 64
_SEED = 20


def described_load(model: Model, routing: Routing, ep: int) -> float:
    """Load of the fullest of ep expert ranks over the mean, as the workload describes its routing."""
    if ep == 1 or not model.is_moe or routing == "balanced":
        return 1.0
    return fullest_rank(routing, model.num_experts, ep)


def fullest_rank(routing: Routing, num_experts: int, ep: int) -> float:
    """Max over mean of the ranks' loads when experts stand in order, equally many on each rank.

    Zipf: the expert at popularity k gets k^−s; log-normal: loads are exp(σ·z). Which expert is popular is
    not known beforehand, so both are the mean over random orders. A histogram's layers are averaged as they
    stand.
    """
    match routing:
        case "balanced":
            return 1.0
        case RoutingCounts() as counts:
            return _of_counts(counts, num_experts, ep)
        case Zipf() | Lognormal():
            return _drawn(routing, num_experts, ep)
        case _:
            raise AssertionError("a routing histogram is read before it gets here")


@lru_cache(maxsize=256)
def _drawn(routing: Zipf | Lognormal, num_experts: int, ep: int) -> float:
    import numpy as np  # here: audits of even routing need none of it

    rng = np.random.default_rng(_SEED)
    if isinstance(routing, Zipf):
        popular = np.arange(1, num_experts + 1, dtype=float) ** -routing.zipf
        loads = np.stack([rng.permutation(popular) for _ in range(DRAWS)])
    else:
        loads = np.exp(routing.lognormal * rng.standard_normal((DRAWS, num_experts)))
    return float(_fullest(loads, ep).mean())


def _fullest(loads: np.ndarray, ep: int) -> np.ndarray:
    ranks = loads.reshape(len(loads), ep, -1).sum(axis=2)
    fullest: np.ndarray = ranks.max(axis=1) / ranks.mean(axis=1)
    return fullest


def _of_counts(counts: RoutingCounts, num_experts: int, ep: int) -> float:
    import numpy as np  # here: audits of even routing need none of it

    layers: dict[int, np.ndarray] = {}
    for layer, expert, tokens in counts.tokens:
        layers.setdefault(layer, np.zeros(num_experts))[expert] += tokens
    loads = np.stack([load for load in layers.values() if load.sum()])
    return float(_fullest(loads, ep).mean())
