"""How a plan's tokens spread over its expert ranks."""

from __future__ import annotations

from meshwright.cost.collectives import UNIFORM, Fanout
from meshwright.cost.routing import described_load
from meshwright.model import Model
from meshwright.plan import Plan
from meshwright.planner.prices import Prices
from meshwright.workload import Routing


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
    if ep > 1 and model.is_moe and routing == "balanced" and not balanced:
        return priced.constants.natural_routing.value
    return described_load(model, routing, ep)
