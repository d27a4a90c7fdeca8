"""From a plan to what one rank trains: its stages with first weights, its store and its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from meshwright.ir.program import Program, lower
from meshwright.ir.sharding import zero_axes
from meshwright.plan import Plan
from meshwright.runtime.initial import initial_values
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.model import Stage
from meshwright.runtime.pipeline import COMPUTE_TYPES, Pipeline
from meshwright.runtime.region import Setting
from meshwright.runtime.sharded import rebound, shard_stage
from meshwright.runtime.shares import Held, fill, held_parameters
from meshwright.runtime.store import Store

Values = Callable[[Held], Tensor]
"""Gives the values of a held slice, in any float type."""


def values_of(weights: Mapping[str, Tensor]) -> Values:
    """Values from whole parameters by name: another model's weights, or those of a test."""

    def give(held: Held) -> Tensor:
        return weights[held.name][tuple(slice(*run) for run in held.slice.ranges)]

    return give


def load_biases(stages: Iterable[Stage], weights: Mapping[str, Tensor]) -> None:
    """Take correction biases, which are no parameters, from another model's state."""
    for stage in stages:
        for moe in stage.moe_layers():
            bias = moe.router.correction_bias
            name = f"layers.{moe.layer}.moe.router.correction_bias"
            if bias is not None and name in weights:
                bias.copy_(weights[name])


@dataclass(frozen=True)
class Replica:
    """Everything of a model that one rank holds."""

    plan: Plan
    program: Program
    mesh: Mesh
    setting: Setting
    stages: dict[int, Stage]
    held: list[Held]
    store: Store
    pipeline: Pipeline


def build(plan: Plan, mesh: Mesh, values: Values | None = None, routes_evenly: bool = False) -> Replica:
    """Build this rank's part of a plan that holds every rule of `verify`. First weights come from the plan's
    seed unless `values` gives others. Raises NotBoundError where the modules are not those of the graph."""
    program, setting = lower(plan), Setting.of(plan, mesh, routes_evenly)
    pp_rank = mesh.position("pp")
    kind = COMPUTE_TYPES[plan.workload.precision]
    stages: dict[int, Stage] = {}
    for stage in program.stages_of(pp_rank):
        with mesh.device:
            stages[stage.index] = Stage(setting, stage.layers, stage.has_embedding, stage.has_head)
    _share_table(list(stages.values()))
    held = held_parameters([(s, stages[s.index]) for s in program.stages_of(pp_rank)], mesh)
    seed = plan.training.seed if plan.training is not None else 0
    give = values or (lambda one: initial_values(plan.model, one.param, one.slice, seed))
    for one in held:
        fill(one, give(one).to(mesh.device))
    policy = plan.policy
    if policy.zero_stage == 3 and any(mesh.group(axis) for axis in zero_axes(plan.layout)):
        for module in stages.values():
            shard_stage(module, mesh, kind)
        held = rebound(held, stages.values())
    split = _splits_table(plan, stages)
    store = Store(held, mesh, kind, policy.zero_stage, policy.sequence_parallel, split)
    return Replica(plan, program, mesh, setting, stages, held, store, Pipeline(plan, mesh, stages))


def _share_table(stages: list[Stage]) -> None:
    """A tied embedding whose two ends stand on one rank is one parameter."""
    first = next((stage for stage in stages if stage.has_embedding), None)
    last = next((stage for stage in stages if stage.has_head), None)
    if first is not None and last is not None and first is not last and last.embedding is not None:
        last.embedding = first.embedding


def _splits_table(plan: Plan, stages: dict[int, Stage]) -> bool:
    """Whether this rank holds one end of a tied embedding and another rank the other."""
    embedding = any(stage.has_embedding for stage in stages.values())
    head = any(stage.has_head for stage in stages.values())
    return plan.model.tie_word_embeddings and embedding != head
