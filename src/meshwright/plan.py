"""A plan: a deployment with every field resolved, and a digest of what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshwright.cluster import Cluster
from meshwright.deployment import Deployment, PlacementT, Training, read_placement
from meshwright.engines import engine_named
from meshwright.errors import InputError
from meshwright.files import Noun, decode, read_yaml, to_yaml, write_text
from meshwright.layout import Layout, LayoutRequest, nearest_divisors
from meshwright.model import Model
from meshwright.policy import CHUNKED_SCHEDULES, EngineName, Policy, ScheduleName
from meshwright.units import Count, Number
from meshwright.workload import Workload


class Predictions(Noun):
    """What is expected of a plan, beside what it says: seconds, bytes and shares as plain numbers."""

    step_time_s: Number
    step_time_low_s: Number
    step_time_high_s: Number
    tokens_per_s_per_gpu: Number
    sequences_per_s: Number
    mfu: Number
    bubble_fraction: Number
    exposed_comm_s: Number
    peak_memory_bytes: Count


class Plan(Noun):
    """Everything that a run needs. `defaults` names each field that the deployment left open, with the value
    taken and why; `predictions` is what was expected of the plan when it was made."""

    name: str
    cluster: Cluster
    model: Model
    workload: Workload
    layout: Layout
    policy: Policy
    training: Training | None = None
    defaults: dict[str, str] = {}
    predictions: Predictions | None = None

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over everything that changes what runs."""
        beside: dict[str, Any] = {
            "defaults": True,
            "name": True,
            "predictions": True,
            "cluster": {"calibration"},
        }
        document = self.model_dump(mode="json", exclude=beside)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def sequences_per_replica(self) -> int:
        """Sequences that one data-parallel rank works through per step."""
        return self.workload.global_batch_size // self.layout.dp

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step on each data-parallel rank."""
        return self.sequences_per_replica // self.policy.micro_batch_size

    def document(self) -> dict[str, Any]:
        """The plan as the mapping that its file holds."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return {"digest": self.digest, **fields}


def routed_evenly(plan: Plan) -> Plan:
    """The plan with tokens spread evenly over experts, whatever its workload says of them."""
    if plan.workload.routing == "balanced":
        return plan
    workload = plan.workload.model_copy(update={"routing": "balanced"})
    return plan.model_copy(update={"workload": workload})


def resolve(deployment: Deployment) -> Plan:
    """Fill what a deployment leaves open with the stated defaults, without searching.

    Raises InputError where the given parts cannot stand together.
    """
    cluster, defaults = deployment.cluster.resolve()
    layout, layout_defaults = resolve_layout(deployment.layout, cluster, deployment.policy.schedule)
    policy, policy_defaults = resolve_policy(deployment, layout)
    return Plan(
        name=deployment.name,
        cluster=cluster,
        model=deployment.model,
        workload=deployment.workload,
        layout=layout,
        policy=policy,
        training=deployment.training,
        defaults={**defaults, **layout_defaults, **policy_defaults},
    )


def resolve_layout(
    request: LayoutRequest,
    cluster: Cluster,
    schedule: ScheduleName | None = None,
) -> tuple[Layout, dict[str, str]]:
    """All degrees for a cluster: dp fills the world, etp is 1 with experts divided, else tp."""
    used: dict[str, str] = {}
    degrees = {name: value for name, value in request.model_dump().items() if value is not None}
    for axis in ("tp", "cp", "pp", "ep"):
        if axis not in degrees:
            degrees[axis] = 1
            used[f"layout.{axis}"] = "1: not divided"
    if "vpp" not in degrees:
        degrees["vpp"] = 2 if schedule in CHUNKED_SCHEDULES else 1
        why = (
            f"two chunks per rank under {schedule}" if schedule in CHUNKED_SCHEDULES else "one chunk per rank"
        )
        used["layout.vpp"] = f"{degrees['vpp']}: {why}"
    if "etp" not in degrees:
        degrees["etp"] = degrees["tp"] if degrees["ep"] == 1 else 1
        why = "equal to tp" if degrees["ep"] == 1 else "experts are divided by ep, not cut"
        used["layout.etp"] = f"{degrees['etp']}: {why}"
    inner = degrees["tp"] * degrees["cp"] * degrees["pp"]
    world = cluster.num_gpus
    if "dp" not in degrees:
        if world % inner:
            raise InputError(
                "layout",
                f"tp·cp·pp = {inner}",
                f"must divide the {world} GPUs of the cluster",
                nearest_divisors(world, inner),
            )
        degrees["dp"] = world // inner
        used["layout.dp"] = f"{degrees['dp']}: {world} GPUs / (tp·cp·pp = {inner})"
    if inner * degrees["dp"] != world:
        fits = [f"dp: {world // inner}"] if world % inner == 0 else []
        rule = f"tp·cp·dp·pp = {inner * degrees['dp']} must equal the {world} GPUs of the cluster"
        raise InputError("layout.dp", degrees["dp"], rule, fits)
    return decode(Layout, degrees, "layout"), used


def resolve_policy(deployment: Deployment, layout: Layout) -> tuple[Policy, dict[str, str]]:
    """All choices of an engine for a layout."""
    request = deployment.policy
    used: dict[str, str] = {}
    chosen: dict[str, Any] = {k: v for k, v in request.model_dump().items() if v is not None}

    def default(name: str, value: object, why: str) -> None:
        if name not in chosen:
            chosen[name] = value
            shown = str(value).lower() if isinstance(value, bool) else value
            used[f"policy.{name}"] = f"{shown}: {why}"

    default("engine", *default_engine(deployment, layout))
    default("micro_batch_size", 1, "one sequence at a time")
    default("schedule", "Interleaved1F1B" if layout.vpp > 1 else "1F1B", "the usual order for this vpp")
    zero_stages = engine_named(chosen["engine"]).zero_stages
    least = 1 if 1 in zero_stages else zero_stages[0]
    default("zero_stage", least, "the least that divides optimizer states over data-parallel ranks")
    default("sequence_parallel", layout.tp > 1, "with tensor parallelism" if layout.tp > 1 else "tp is 1")
    default("recompute", "none", "keep all activations")
    default("dispatcher", "alltoall", "tokens travel to their experts")
    default("expert_overlap", False, "no overlap of expert communication")
    if "settings" not in chosen:
        used["policy.settings"] = "the engine's usual"
    if "layers_per_stage" not in chosen:
        stages = split_layers(deployment.model.num_hidden_layers, layout.num_stages)
        chosen["layers_per_stage"] = stages
        text = f"{stages[0]} each" if len(set(stages)) == 1 else "-".join(map(str, stages))
        used["policy.layers_per_stage"] = (
            f"{text}: as even as {deployment.model.num_hidden_layers} layers allow"
        )
    return decode(Policy, chosen, "policy"), used


def default_engine(deployment: Deployment, layout: Layout) -> tuple[EngineName, str]:
    """meshwright's own runtime where it runs the model, else the first engine that does."""
    wanted = deployment.policy.schedule
    candidates: tuple[EngineName, ...] = ("native", "megatron", "torchtitan")
    for name in candidates:
        engine = engine_named(name)
        runs = (
            layout.cp <= engine.max_cp
            and (engine.latent_attention or not deployment.model.is_mla)
            and deployment.workload.precision in engine.precisions
            and (wanted is None or wanted in engine.schedules)
        )
        if runs:
            return name, OWN_ENGINE if name == "native" else "the native engine does not run this"
    return "native", OWN_ENGINE


OWN_ENGINE = "meshwright's own runtime"


def split_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as possible; the shorter stages stand at the ends of the pipeline, last
    first, because the head and the embedding add work there."""
    if num_stages > num_layers:
        rule = f"pp·vpp stages need a layer each, and the model has {num_layers}"
        raise InputError("layout.pp", num_stages, rule, nearest_divisors(num_layers, num_stages))
    base, extra = divmod(num_layers, num_stages)
    ends = [i // 2 if i % 2 else num_stages - 1 - i // 2 for i in range(num_stages)]
    short = set(ends[: num_stages - extra]) if extra else set()
    return tuple(base if extra == 0 or stage in short else base + 1 for stage in range(num_stages))


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan's file, whole or not at all."""
    write_text(path, to_yaml(plan.document()))


def read_plan(path: str | Path) -> Plan:
    """Read a plan's file. Raises InputError when its digest is not that of its content."""
    document = read_yaml(path)
    stated = document.pop("digest", None)
    plan = decode(Plan, document)
    if stated != plan.digest:
        raise InputError(
            "digest", stated, "the file was changed after it was planned; plan it again", [plan.digest]
        )
    return plan


def open_placement(path: str | Path, noun: type[PlacementT], overrides: Sequence[str] = ()) -> PlacementT:
    """What stands in a deployment's file, or in a plan's, which must be as it was planned; overrides come
    after. Raises InputError with the key's path.
    """
    if "digest" in read_yaml(path):
        read_plan(path)
    return read_placement(path, noun, overrides)
