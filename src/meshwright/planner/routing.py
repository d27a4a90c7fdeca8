"""How uneven routing loads the fullest expert rank."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from meshwright.cost.collectives import UNIFORM, Fanout
from meshwright.model import Model
from meshwright.plan import Plan
from meshwright.planner.prices import Prices
from meshwright.workload import Lognormal, Routing, RoutingCounts, Zipf

DRAWS = 64
_SEED = 20


def has_fixed_capacity(model: Model) -> bool:
    """Whether every expert takes a fixed number of tokens, by dropping and padding."""
    return model.router.capacity_factor is not None or model.router.type == "gshard_top2"


def fanout_of(model: Model) -> Fanout:
    """How a token's experts spread over domains of experts."""
    if not model.is_moe:
        return UNIFORM
    limited = model.router.num_groups > 1
    return Fanout(
        model.num_experts,
        model.num_experts_per_tok,
        model.router.num_groups if limited else None,
        model.router.num_limited_groups if limited else None,
    )


def load_factor(plan: Plan, priced: Prices, balanced: bool = True) -> float:
    """Load of the fullest rank of an expert group over the mean.

    1 under balanced routing; where routing is real but not described, the fitted constant.
    """
    return load_over(plan.model, plan.workload.routing, plan.layout.ep, priced, balanced)


def load_over(model: Model, routing: Routing, ep: int, priced: Prices, balanced: bool = True) -> float:
    """The same for a model whose experts are divided over ep ranks."""
    if ep == 1 or not model.is_moe:
        return 1.0
    if routing == "balanced":
        return 1.0 if balanced else priced.constants.natural_routing.value
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
    rng = np.random.default_rng(_SEED)
    if isinstance(routing, Zipf):
        popular = np.arange(1, num_experts + 1, dtype=float) ** -routing.zipf
        loads = np.stack([rng.permutation(popular) for _ in range(DRAWS)])
    else:
        loads = np.exp(routing.lognormal * rng.standard_normal((DRAWS, num_experts)))
    return float(_fullest(loads, ep).mean())


def _fullest(loads: np.ndarray, ep: int) -> np.ndarray:
    ranks = loads.reshape(len(loads), ep, -1).sum(axis=2)
    return np.asarray(ranks.max(axis=1) / ranks.mean(axis=1))


def _of_counts(counts: RoutingCounts, num_experts: int, ep: int) -> float:
    layers: dict[int, np.ndarray] = {}
    for layer, expert, tokens in counts.tokens:
        layers.setdefault(layer, np.zeros(num_experts))[expert] += tokens
    loads = np.stack([load for load in layers.values() if load.sum()])
    return float(_fullest(loads, ep).mean())
