"""Every layout and policy that a deployment leaves open, and which of them are legal.

Legality is that of `verify`, rule by rule, on arrays. Two points that cannot differ are one candidate:

- at pp 1 there is no schedule to choose and one chunk per rank;
- at ep 1, or without experts, there is no dispatcher to choose and nothing to overlap;
- at tp 1 sequence parallelism divides nothing;
- with one replica of every parameter ZeRO divides nothing, unless masters stand in the parameters;
- interleaved 1F1B starts at two chunks per rank: with one it is 1F1B with a longer warm-up.

What the deployment fixes is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.deployment import Deployment
from meshwright.engines import Engine, engine_of
from meshwright.ir.schedule import MAX_FORWARDS
from meshwright.layout import Layout
from meshwright.model import Model
from meshwright.plan import Plan
from meshwright.policy import (
    CHUNKED_SCHEDULES,
    SPLIT_BACKWARD,
    V_SCHEDULES,
    Dispatcher,
    EngineName,
    EngineSettings,
    Policy,
    Recompute,
    ScheduleName,
    ZeroStage,
)
from meshwright.verify import divides_under_pipelines, fewest_under_1f1b, makes_replicas
from meshwright.workload import Workload

Array = Any


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A schedule over pp ranks of vpp chunks, and the layers of each stage."""

    pp: int
    vpp: int
    schedule: ScheduleName
    layers_per_stage: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a policy chooses beside schedule, micro-batch and sequence parallelism."""

    zero_stage: ZeroStage
    recompute: Recompute
    dispatcher: Dispatcher
    expert_overlap: bool


@dataclass(frozen=True, slots=True)
class Bases:
    """Layouts of one pipeline degree with micro-batch and sequence parallelism: arrays of N."""

    tp: Array
    cp: Array
    dp: Array
    pp: Array
    ep: Array
    etp: Array
    micro_batch: Array
    sequence_parallel: Array
    dp_replicas: int = 1

    def __len__(self) -> int:
        return len(self.tp)

    def where(self, chosen: Array) -> Bases:
        """Those that a mask, or a list of positions, chooses."""
        return self.with_columns({name: column[chosen] for name, column in self.columns().items()})

    def columns(self) -> dict[str, Array]:
        """The arrays by name."""
        return {f.name: getattr(self, f.name) for f in fields(Bases) if f.name != "dp_replicas"}

    def with_columns(self, columns: dict[str, Array]) -> Bases:
        """The same with other arrays."""
        return replace(self, **columns)

    def degrees(self) -> dict[str, Array]:
        """Ranks along each axis of the world, and the replicas of ZeRO's groups."""
        return {axis: getattr(self, axis) for axis in ("tp", "cp", "dp", "pp", "ep", "etp", "dp_replicas")}

    def size(self, axis: str) -> Array:
        """Ranks along an axis, as `Layout.size`."""
        match axis:
            case "dp_cp":
                return self.dp * self.cp
            case "edp":
                return self.tp * self.cp * self.dp // (self.ep * self.etp)
            case "world":
                return self.tp * self.cp * self.dp * self.pp
            case "dp_shard":
                return self.dp * self.cp // self.dp_replicas
            case "edp_shard":
                return self.size("edp") // self.dp_replicas
            case "dp_replica" | "edp_replica":
                return self.dp_replicas
            case _:
                return getattr(self, axis)


def joined(bases: Sequence[Bases]) -> Bases:
    """Those of several pipeline degrees, one after another."""
    every = [one.columns() for one in bases]
    return bases[0].with_columns({name: np.concatenate([c[name] for c in every]) for name in every[0]})


@dataclass(frozen=True, slots=True)
class Candidate:
    """One point of a space: a base of its pipeline's degree by position, and what goes with it."""

    pipeline: Pipeline
    choice: Choice
    row: int


@dataclass(frozen=True)
class Space:
    """What may be chosen for a deployment on a cluster.

    `choices` are all combinations, `plain` the one taken where choices cannot differ. `refused` counts, by
    rule, the combinations of degrees that are none of it.
    """

    deployment: Deployment
    cluster: Cluster
    engine_name: EngineName
    engine_why: str
    bases: dict[int, Bases]
    pipelines: dict[int, tuple[Pipeline, ...]]
    choices: tuple[Choice, ...]
    plain: Choice
    refused: Counter[str]

    @property
    def model(self) -> Model:
        """The model."""
        return self.deployment.model

    @property
    def workload(self) -> Workload:
        """The workload."""
        return self.deployment.workload

    @cached_property
    def engine(self) -> Engine:
        """Facts of the engine as the deployment sets it."""
        alone = Pipeline(1, 1, "1F1B", (self.model.num_hidden_layers,))
        return engine_of(self._policy(alone, self.plain, 1, False))

    def num_micro_batches(self, bases: Bases) -> Array:
        """Micro-batches per step on each replica."""
        return self.workload.global_batch_size // bases.dp // bases.micro_batch

    def runs(self, pipeline: Pipeline) -> Array:
        """Which bases of its degree a pipeline can run, by their number of micro-batches."""
        return ~np.any([broken for _, broken in self._broken(pipeline)], axis=0)

    def _broken(self, pipeline: Pipeline) -> Iterator[tuple[str, Array]]:
        """Rules of the number of micro-batches, with where they are broken."""
        pp, schedule = pipeline.pp, pipeline.schedule
        m = self.num_micro_batches(self.bases[pp])
        most = MAX_FORWARDS // (pp * pipeline.vpp)
        yield f"at most {MAX_FORWARDS:,} forwards over all stages and micro-batches", m > most
        few = fewest_under_1f1b(self.engine_name, pp)
        fewest = {"1F1B": few, "DualPipeV": 2 * pp}.get(schedule, 1)
        yield f"too few micro-batches for pp under {schedule}", m < fewest
        if schedule in CHUNKED_SCHEDULES - V_SCHEDULES:
            yield (
                f"micro-batches that {schedule} cannot split into equal rounds",
                m % np.maximum(1, m // pp) != 0,
            )
        if self.engine_name == "megatron" and pipeline.vpp > 1:
            yield "micro-batches that are no multiple of pp under Megatron's interleaving", m % pp != 0

    def offers(self, pipeline: Pipeline, choice: Choice) -> Array:
        """Which bases of a pipeline's degree have a choice: legal, and not the same as another."""
        bases, plain = self.bases[pipeline.pp], self.plain
        runs = runs_zero(self.engine_name, pipeline, choice.zero_stage)
        runs &= bases.dp_replicas == 1 or makes_replicas(self.engine_name, choice.zero_stage)
        offered = np.full(len(bases), runs)
        if choice.zero_stage != plain.zero_stage and not self.engine.master_in_parameter.value:
            offered &= self._replicated[pipeline.pp]
        if (choice.dispatcher, choice.expert_overlap) != (plain.dispatcher, plain.expert_overlap):
            offered &= bases.ep > 1
        if choice.expert_overlap and not runs_overlap(self.engine, self.workload, pipeline, choice):
            offered &= bases.ep == 1
        return offered

    def plan_of(self, candidate: Candidate) -> Plan:
        """The plan of a candidate; what the deployment left open is named as searched."""
        pipeline, choice = candidate.pipeline, candidate.choice
        base = self.bases[pipeline.pp].where(candidate.row)
        degrees = {axis: int(degree) for axis, degree in base.degrees().items()}
        layout = Layout(**degrees, vpp=pipeline.vpp)
        policy = self._policy(pipeline, choice, int(base.micro_batch), bool(base.sequence_parallel))
        _, defaults = self.deployment.cluster.resolve()
        for part, chosen, given in (
            ("layout", layout, self.deployment.layout),
            ("policy", policy, self.deployment.policy),
        ):
            for key in type(chosen).model_fields:
                if key != "settings" and getattr(given, key) is None:
                    defaults[f"{part}.{key}"] = f"{_text(getattr(chosen, key))}: {self._why(key)}"
        return Plan(
            name=self.deployment.name,
            cluster=self.cluster,
            model=self.model,
            workload=self.workload,
            layout=layout,
            policy=policy,
            training=self.deployment.training,
            defaults=defaults,
        )

    def _why(self, key: str) -> str:
        if key == "engine":
            return self.engine_why
        return "as even as the layers allow" if key == "layers_per_stage" else "searched"

    def _policy(
        self, pipeline: Pipeline, choice: Choice, micro_batch: int, sequence_parallel: bool
    ) -> Policy:
        return Policy(
            engine=self.engine_name,
            micro_batch_size=micro_batch,
            schedule=pipeline.schedule,
            zero_stage=choice.zero_stage,
            sequence_parallel=sequence_parallel,
            recompute=choice.recompute,
            dispatcher=choice.dispatcher,
            expert_overlap=choice.expert_overlap,
            layers_per_stage=pipeline.layers_per_stage,
            settings=self.deployment.policy.settings or EngineSettings(),
        )

    @cached_property
    def _replicated(self) -> dict[int, Array]:
        """Which bases have more than one replica of some parameter."""
        return {pp: (b.size("dp_cp") > 1) | (b.size("edp") > 1) for pp, b in self.bases.items()}

    @cached_property
    def legal(self) -> int:
        """How many candidates there are."""
        return self._census[0]

    @cached_property
    def rejected(self) -> Counter[str]:
        """What was left out, by rule: combinations of degrees, then whole candidates."""
        return self.refused + self._census[1]

    @cached_property
    def _census(self) -> tuple[int, Counter[str]]:
        """The number of candidates, and of those that their pipeline cannot run, by rule."""
        total, refused = 0, Counter[str]()
        for pp, pipelines in self.pipelines.items():
            for pipeline in pipelines:
                left = np.zeros(len(self.bases[pp]), np.int64)
                for choice in self.choices:
                    left += self.offers(pipeline, choice)
                for rule, broken in self._broken(pipeline):
                    refused[rule] += int(left[broken].sum())
                    left[broken] = 0
                total += int(left.sum())
        return total, refused


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return str(value[0]) + " each" if len(set(value)) == 1 else "-".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def runs_zero(engine: EngineName, pipeline: Pipeline, zero_stage: ZeroStage) -> bool:
    """Whether a ZeRO stage runs under a pipeline, as `verify` says."""
    if pipeline.pp == 1:
        return True
    splits = zero_stage == 3 and pipeline.schedule in SPLIT_BACKWARD
    return not splits and (zero_stage < 2 or divides_under_pipelines(engine))


def runs_overlap(engine: Engine, workload: Workload, pipeline: Pipeline, choice: Choice) -> bool:
    """Whether an engine overlaps expert communication so, as `verify` says."""
    match engine.expert_overlap.value:
        case "none":
            return False
        case "dual_pipe":
            return pipeline.schedule == "DualPipeV" and pipeline.pp > 1
        case _:
            return (
                (pipeline.pp == 1 or pipeline.vpp > 1)
                and choice.recompute != "full"
                and choice.dispatcher != "allgather"
                and workload.precision != "fp32"
            )
