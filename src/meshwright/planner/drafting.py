"""From a deployment to its space: degrees that divide, pipelines, and policies that the engine runs.

Where pp divides the layers, vpp must divide the layers of a rank; where it does not, stages are uneven
anyway, and every vpp is searched. Micro-batches are the divisors of a replica's batch of up to
MICRO_BATCH_TOKENS tokens, and always one sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.deployment import Deployment
from meshwright.engines import Engine, engine_named, unknown_settings
from meshwright.errors import InputError
from meshwright.ir.schedule import require_buildable
from meshwright.layout import Layout, divisors
from meshwright.plan import default_engine, split_layers
from meshwright.planner.space import Bases, Choice, Pipeline, Space
from meshwright.policy import (
    CHUNKED_SCHEDULES,
    V_SCHEDULES,
    EngineName,
    EngineSettings,
    Recompute,
    ScheduleName,
)
from meshwright.verify import empty_ends

Array = Any
Columns = dict[str, Array]
MICRO_BATCH_TOKENS = 2**17
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


def space_of(deployment: Deployment, cluster: Cluster) -> Space:
    """The space of a deployment on a cluster; it has no bases where the engine runs none of it."""
    request = deployment.policy
    name, why = request.engine, "stated"
    if name is None:
        name, why = default_engine(deployment, Layout(cp=deployment.layout.cp or 1))
    draft = _Draft(deployment, cluster, name)
    columns = draft.layouts() if draft.engine_runs() else None
    degrees = () if columns is None else np.unique(columns["pp"]).tolist()
    bases = {pp: draft.bases(columns, pp) for pp in degrees} if columns is not None else {}
    pipelines = {pp: tuple(draft.pipelines(pp)) for pp in bases}
    kept = [pp for pp in bases if len(bases[pp]) and pipelines[pp]]
    return Space(
        deployment=deployment,
        cluster=cluster,
        engine_name=name,
        engine_why=why,
        bases={pp: bases[pp] for pp in kept},
        pipelines={pp: pipelines[pp] for pp in kept},
        choices=tuple(draft.choices()),
        plain=draft.plain(),
        refused=draft.refused,
    )


@dataclass
class _Draft:
    deployment: Deployment
    cluster: Cluster
    engine_name: EngineName
    refused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.model, self.workload = self.deployment.model, self.deployment.workload
        self.layout, self.policy = self.deployment.layout, self.deployment.policy
        self.engine: Engine = engine_named(self.engine_name)
        self.lengths = sorted({self.workload.min_sequence_length, self.workload.max_sequence_length})

    def engine_runs(self) -> bool:
        """Whether the engine and the GPU run the model and its number type at all."""
        precision = self.workload.precision
        asked = self.policy.settings or EngineSettings()
        unknown = next(iter(unknown_settings(self.engine_name, asked)), None)
        for rule, holds in (
            (f"{self.cluster.gpu.name} has no peak for {precision}", precision in self.cluster.gpu.peak),
            (f"the {self.engine_name} engine does not run {precision}", precision in self.engine.precisions),
            (
                f"the {self.engine_name} engine does not run multi-head latent attention",
                self.engine.latent_attention or not self.model.is_mla,
            ),
            (f"the {self.engine_name} engine has no policy.settings.{unknown}", unknown is None),
        ):
            if not holds:
                self.refused[rule] += 1
                return False
        return True

    def layouts(self) -> Columns:
        """Legal degrees, as columns."""
        return self._with_experts(self._dense())

    def _dense(self) -> Columns:
        """tp, cp, dp, pp that make up the world, with sequence parallelism."""
        world, given = self.cluster.num_gpus, self.layout
        options = [[fixed] if fixed else divisors(world) for fixed in (given.tp, given.cp, given.pp)]
        rows = np.array(list(product(*options)), np.int64).reshape(-1, 3)
        rows = rows[world % rows.prod(axis=1) == 0]
        columns = dict(zip(("tp", "cp", "pp"), rows.T, strict=True))
        columns["dp"] = world // rows.prod(axis=1)
        if given.dp:
            rule = f"tp·cp·dp·pp must equal the {world} GPUs with dp = {given.dp}"
            columns = self._kept(columns, rule, columns["dp"] == given.dp)
        model = self.model
        widths = {"num_attention_heads": model.num_attention_heads}
        if model.num_dense_layers and model.intermediate_size:
            widths["intermediate_size"] = model.intermediate_size
        if model.is_moe and model.shared_width:
            widths["shared expert width"] = model.shared_width
        for name, width in widths.items():
            columns = self._kept(columns, f"tp must divide {name} = {width}", width % columns["tp"] == 0)
        if not model.is_mla:
            heads, tp = model.kv_heads, columns["tp"]
            rule = f"tp must divide, or be a multiple of, num_key_value_heads = {heads}"
            columns = self._kept(columns, rule, (heads % tp == 0) | (tp % heads == 0))
        rule = f"the {self.engine_name} engine runs cp up to {self.engine.max_cp}"
        columns = self._kept(columns, rule, columns["cp"] <= self.engine.max_cp)
        rule = f"each stage needs a layer of the {model.num_hidden_layers}"
        columns = self._kept(columns, rule, columns["pp"] - self._empty <= model.num_hidden_layers)
        rule = f"dp must divide global_batch_size = {self.workload.global_batch_size}"
        columns = self._kept(columns, rule, self.workload.global_batch_size % columns["dp"] == 0)
        return self._with_sequences(columns)

    def _with_sequences(self, columns: Columns) -> Columns:
        """Sequence parallelism off and on, where they differ and divide the sequences."""
        fixed = self.policy.sequence_parallel
        if fixed is None:
            columns = _repeated(columns, "sequence_parallel", [False, True])
            differs = ~columns["sequence_parallel"] | (columns["tp"] > 1)
            columns = {name: column[differs] for name, column in columns.items()}
        else:
            columns = _repeated(columns, "sequence_parallel", [fixed])
        tp, cp, sequence = columns["tp"], columns["cp"], columns["sequence_parallel"]
        if self.model.is_moe:
            rule = "experts under tensor parallelism need sequence parallelism"
            columns = self._kept(columns, rule, (tp == 1) | sequence)
            tp, cp, sequence = columns["tp"], columns["cp"], columns["sequence_parallel"]
        cut = np.where(cp > 1, 2 * cp, 1) * np.where(sequence, tp, 1)
        divides = np.all([length % cut == 0 for length in self.lengths], axis=0)
        return self._kept(columns, "context and sequence parallelism must cut sequences evenly", divides)

    def _with_experts(self, columns: Columns) -> Columns:
        """ep and etp that fold into the ranks of a stage."""
        model, given = self.model, self.layout
        if not model.is_moe:
            columns["ep"] = np.full_like(columns["tp"], given.ep or 1)
            columns["etp"] = np.full_like(columns["tp"], given.etp) if given.etp else columns["tp"].copy()
            rule = "a dense model has no experts to divide"
            return self._folded(self._kept(columns, rule, columns["ep"] == 1))
        width = model.moe_intermediate_size or 1
        columns = _repeated(columns, "ep", [given.ep] if given.ep else divisors(model.num_experts))
        rule = f"ep must divide num_experts = {model.num_experts}"
        columns = self._kept(columns, rule, model.num_experts % columns["ep"] == 0)
        degrees = [given.etp] if given.etp else divisors(self.cluster.num_gpus)
        columns = self._folded(_repeated(columns, "etp", degrees))
        rule = f"etp must divide moe_intermediate_size = {width}"
        return self._kept(columns, rule, width % columns["etp"] == 0)

    def _folded(self, columns: Columns) -> Columns:
        stage = columns["tp"] * columns["cp"] * columns["dp"]
        folds = stage % (columns["etp"] * columns["ep"]) == 0
        columns = self._kept(columns, "etp·ep must divide tp·cp·dp: experts re-name those ranks", folds)
        replicas = self.layout.dp_replicas
        if replicas == 1:
            return columns
        dense, edp = columns["dp"] * columns["cp"], _edp(columns)
        rule = f"dp_replicas = {replicas} must divide dp·cp and edp"
        return self._kept(columns, rule, (dense % replicas == 0) & (edp % replicas == 0))

    def _kept(self, columns: Columns, rule: str, holds: Array) -> Columns:
        self.refused[rule] += int((~holds).sum())
        return {name: column[holds] for name, column in columns.items()}

    def bases(self, columns: Columns, pp: int) -> Bases:
        """Layouts of a pipeline degree with every micro-batch."""
        of_degree = {name: column[columns["pp"] == pp] for name, column in columns.items()}
        sizes = [np.zeros(0, np.int64)]
        places = [np.zeros(0, np.int64)]
        for dp in np.unique(of_degree["dp"]).tolist():
            own = np.flatnonzero(of_degree["dp"] == dp)
            options = self._micro_batches(self.workload.global_batch_size // dp)
            places.append(np.repeat(own, len(options)))
            sizes.append(np.tile(np.array(options, np.int64), len(own)))
        chosen = np.concatenate(places)
        return Bases(
            **{name: column[chosen] for name, column in of_degree.items()},
            micro_batch=np.concatenate(sizes),
            dp_replicas=self.layout.dp_replicas,
        )

    def _micro_batches(self, per_replica: int) -> list[int]:
        fixed = self.policy.micro_batch_size
        if fixed is not None:
            if per_replica % fixed:
                self.refused["micro_batch_size must divide the sequences of a replica"] += 1
                return []
            return [fixed]
        most = max(1, MICRO_BATCH_TOKENS // self.workload.max_sequence_length)
        return [size for size in divisors(per_replica) if size <= most]

    def pipelines(self, pp: int) -> Iterator[Pipeline]:
        """Schedules and chunks for a pipeline degree, with the layers of each stage."""
        for schedule in self._schedules(pp):
            for vpp in self._chunks(pp, schedule):
                stages = self._stages(pp * vpp)
                if stages is not None:
                    yield Pipeline(pp, vpp, schedule, stages)

    def _schedules(self, pp: int) -> Sequence[ScheduleName]:
        fixed = self.policy.schedule
        if fixed is None:
            return self.engine.schedules if pp > 1 else ("1F1B",)
        if pp > 1 and fixed not in self.engine.schedules:
            self.refused[f"the {self.engine_name} engine does not run {fixed}"] += 1
            return ()
        return (fixed,)

    def _chunks(self, pp: int, schedule: ScheduleName) -> Iterator[int]:
        layers, fixed = self.model.num_hidden_layers, self.layout.vpp
        if fixed is not None:
            options = [fixed]
        elif schedule in V_SCHEDULES:
            options = [2]
        elif schedule not in CHUNKED_SCHEDULES or pp == 1:
            options = [1]
        else:
            fewest = 2 if schedule == "Interleaved1F1B" else 1
            options = [
                vpp for vpp in range(fewest, layers // pp + 1) if layers % pp or layers // pp % vpp == 0
            ]
        for vpp in options:
            try:
                require_buildable(schedule, pp, 2 * pp, vpp)
            except InputError as error:
                self.refused[f"{schedule}: {error.rule}"] += 1
                continue
            if pp * vpp - self._empty <= layers:
                yield vpp
            else:
                self.refused[f"each stage needs a layer of the {layers}"] += 1

    @property
    def _empty(self) -> int:
        """Stages of fixed ones that may hold no layer and hold none, as `verify` says."""
        stages = self.policy.layers_per_stage or ()
        return empty_ends(self.engine_name, stages)

    def _stages(self, num_stages: int) -> tuple[int, ...] | None:
        fixed, layers = self.policy.layers_per_stage, self.model.num_hidden_layers
        if fixed is None:
            return split_layers(layers, num_stages)
        filled = fixed.count(0) <= self._empty or num_stages > layers
        if len(fixed) == num_stages and sum(fixed) == layers and filled:
            return fixed
        self.refused["layers_per_stage must name every stage and add up to num_hidden_layers"] += 1
        return None

    def choices(self) -> Iterator[Choice]:
        """Every combination of what the engine runs, simplest first."""
        policy, engine = self.policy, self.engine
        zero = _either(policy.zero_stage, engine.zero_stages)
        dispatchers = _either(policy.dispatcher, engine.dispatchers if self.model.is_moe else ("alltoall",))
        overlaps = _either(policy.expert_overlap, (False, True) if self.model.is_moe else (False,))
        known = [z for z in zero if z in engine.zero_stages]
        if self.model.is_moe:
            dispatchers = [d for d in dispatchers if d in engine.dispatchers]
        for values in product(known, _either(policy.recompute, RECOMPUTE), dispatchers, overlaps):
            yield Choice(*values)

    def plain(self) -> Choice:
        """What stands where choices cannot differ: the defaults of `plan.resolve_policy`."""
        policy, stages = self.policy, self.engine.zero_stages
        least = policy.zero_stage if policy.zero_stage is not None else (1 if 1 in stages else stages[0])
        overlap = bool(policy.expert_overlap)
        return Choice(least, policy.recompute or "none", policy.dispatcher or "alltoall", overlap)


def _edp(columns: Columns) -> Array:
    return columns["tp"] * columns["cp"] * columns["dp"] // (columns["etp"] * columns["ep"])


def _either(fixed: Any, options: Sequence[Any]) -> list[Any]:
    return list(options) if fixed is None else [fixed]


def _repeated(columns: Columns, name: str, values: Sequence[Any]) -> Columns:
    """Every row once for each value of a new column."""
    count = len(next(iter(columns.values())))
    repeated = {key: np.repeat(column, len(values)) for key, column in columns.items()}
    return {**repeated, name: np.tile(np.array(values), count)}
