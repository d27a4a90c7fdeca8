"""How tokens choose experts, as functions of tensors; the weight that makes the logits is held elsewhere.

`route` gives choices, weights and the decision to replay; losses and counts are computed from its result.
"""

from meshwright.runtime.routing.correction import updated_bias
from meshwright.runtime.routing.decision import Decision, Routing
from meshwright.runtime.routing.gshard import GShard
from meshwright.runtime.routing.losses import (
    Balance,
    attach,
    batch_balance,
    gshard_balance,
    sequence_balance,
    z_loss,
)
from meshwright.runtime.routing.router import route
from meshwright.runtime.routing.statistics import RoutingCounts, routing_counts, routing_log
from meshwright.runtime.routing.topk import forced

__all__ = [
    "Balance",
    "Decision",
    "GShard",
    "Routing",
    "RoutingCounts",
    "attach",
    "batch_balance",
    "forced",
    "gshard_balance",
    "route",
    "routing_counts",
    "routing_log",
    "sequence_balance",
    "updated_bias",
    "z_loss",
]
