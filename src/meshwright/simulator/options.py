"""What a simulation is asked beyond the plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from meshwright.cost.constants import Constants
from meshwright.planner.prices import Conditions
from meshwright.simulator.draws import Factors
from meshwright.workload import Routing

Imbalance = Literal["mean", "described"] | Routing | Factors


@dataclass(frozen=True)
class Options:
    """How a step is simulated.

    `point_to_point`: whether sends between stages take time. `contention`: whether transfers that cross the
    same link tier of a rank share its bandwidth while they overlap. `imbalance`: `mean` gives every layer the
    mean load of the fullest rank, as the estimate does; `described` draws one for each layer and micro-batch
    from the workload's routing; another routing, or a distribution of factors, is drawn in its place.
    `stragglers` draws how much longer each rank computes. `every_rank` runs every pipeline whose ranks wait
    for one another only when gradients are reduced, instead of one that stands for all. `sequence_length` is
    the longest unless told; `conditions` what a run states about its execution, as for the estimate;
    `constants` replace the catalogue's.
    """

    point_to_point: bool = True
    contention: bool = True
    imbalance: Imbalance = "mean"
    stragglers: Factors | None = None
    every_rank: bool = False
    seed: int = 0
    sequence_length: int | None = None
    conditions: Conditions = field(default_factory=Conditions)
    constants: Constants | None = None
