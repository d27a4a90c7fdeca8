"""Ways into and out of a tensor-parallel region, and what every module knows of its surroundings.

Shape letters: S tokens of a sequence, B sequences of a micro-batch, H hidden. The residual stream is
sequence-first, [S, B, H]: its shares under sequence parallelism are then slices of dim 0, which collectives
join without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from meshwright.model import Model
from meshwright.plan import Plan
from meshwright.policy import Policy
from meshwright.runtime.collectives import gather, scatter_sum, sum_gradient, sum_over
from meshwright.runtime.mesh import Mesh


@dataclass
class LossScales:
    """What one unit of each loss is worth in the scalar that backward starts from.

    Set before every step: 1 over the global number of targets, sequences or micro-batches, times the
    loss scale under fp16. `inverse` undoes the loss scale where a loss is reported.
    """

    token: float = 1.0
    sequence: float = 1.0
    micro_batch: float = 1.0
    inverse: float = 1.0


@dataclass(frozen=True)
class Setting:
    """What every module of a rank knows: the model, how it is run, and the rank's place.

    `routes_evenly` replaces the router's choices by exactly balanced ones, so that what a step sends can be
    held against the graph, which describes balanced routing.
    """

    model: Model
    policy: Policy
    mesh: Mesh
    routes_evenly: bool = False
    scales: LossScales = field(default_factory=LossScales)

    @classmethod
    def of(cls, plan: Plan, mesh: Mesh, routes_evenly: bool = False) -> Setting:
        """The setting of a plan on one rank."""
        return cls(plan.model, plan.policy, mesh, routes_evenly)

    @property
    def divides_sequence(self) -> bool:
        """Whether the residual stream is divided over tp between the tensor-parallel regions."""
        return self.policy.sequence_parallel and self.mesh.size("tp") > 1

    def enter(self, x_SBH: Tensor) -> Tensor:
        """All tokens for the rank's share of a width: gathers the sequence, or adds up gradients."""
        group = self.mesh.group("tp")
        return gather(x_SBH, group) if self.divides_sequence else sum_gradient(x_SBH, group)

    def leave(self, x_SBH: Tensor) -> Tensor:
        """The sum of the ranks' partial results: this rank's share of the sequence, or all of it."""
        group = self.mesh.group("tp")
        return scatter_sum(x_SBH, group) if self.divides_sequence else sum_over(x_SBH, group)

    def own_tokens(self, x_S: Tensor) -> Tensor:
        """This rank's share along dim 0 of something that all ranks of tp hold for the whole sequence."""
        if not self.divides_sequence:
            return x_S
        return x_S.chunk(self.mesh.size("tp"))[self.mesh.position("tp")]
