"""Plans that a row may mean: every plausible value of what it leaves open, one rule for all sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from meshwright.cluster import Cluster
from meshwright.cost.memory import memory, worst
from meshwright.engines import engine_named
from meshwright.errors import InputError
from meshwright.ir.program import lower
from meshwright.layout import Layout
from meshwright.model import Model
from meshwright.plan import Plan, split_layers
from meshwright.policy import EngineSettings, Policy, Recompute, ScheduleName
from meshwright.validate.policies import Stated
from meshwright.validate.refusal import RefusedError, words_of
from meshwright.validate.rows import Row
from meshwright.verify import verify
from meshwright.workload import Workload

MOST_CANDIDATES = 24
MICRO_BATCHES_PER_STAGE = 8
"""Micro-batches per pipeline rank where a row states no batch: enough for the pipeline to be full."""
LONGEST_MICRO_BATCH_TOKENS = 32_768
FULL_SHARE = 1.1
"""Predicted memory over the GPU's, above which a plan is taken not to have fitted: predictions of measured
memory are within a few percent."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One fully resolved plan of a row, and what was taken for what the row leaves open."""

    plan: Plan
    assumed: dict[str, str]


@dataclass(frozen=True, slots=True)
class Described:
    """The fixed parts of a row."""

    row: Row
    model: Model
    cluster: Cluster
    stated: Stated
    assumed: dict[str, str]


def candidates_of(parts: Described) -> tuple[Candidate, ...]:
    """Every plausible plan of a row, at most MOST_CANDIDATES. Raises RefusedError when none is legal.

    Where a row leaves recompute open and nothing short of full recompute fits the GPU, some layers may have
    been recomputed, or all, or activations moved to the host, which costs less: the plans with selective
    recompute stay beside those with full. All three are plausible where it says that the experts' exchange
    ran beside nothing: overlapping it forbids full recompute, and who states that it was off chose between.
    """
    reasons: list[str] = []
    apart = parts.model.is_moe and parts.stated.expert_overlap is False
    legal = list(_legal(parts, ("none", "selective", "full") if apart else ("none", "selective"), reasons))
    fitting = _fitting(legal)
    if parts.stated.recompute is None and not fitting:
        whole = list(_legal(parts, ("full",), reasons))
        lean = [candidate for candidate in legal if candidate.plan.policy.recompute == "selective"]
        half = MOST_CANDIDATES // 2
        fitting = [*lean[:half], *(_fitting(whole) or whole)[:half]]
    chosen = fitting or legal
    if not chosen:
        raise RefusedError("layout: no legal plan", reasons[0] if reasons else "")
    return tuple(chosen)


def _fitting(candidates: list[Candidate]) -> list[Candidate]:
    """Those whose memory is within the GPU's, where there is a choice.

    How experts are reached does not change memory that much: plans that differ in nothing else share a
    verdict.
    """
    if len(candidates) < 2:
        return candidates
    fits: dict[object, bool] = {}
    kept = []
    for candidate in candidates:
        plan = candidate.plan
        same = plan.policy.model_copy(update={"dispatcher": "alltoall", "expert_overlap": False})
        alike = (plan.layout, same, plan.workload.global_batch_size)
        if alike not in fits:
            needed = worst(memory(lower(plan.model_copy(update={"policy": same})))).total_bytes
            fits[alike] = needed <= FULL_SHARE * plan.cluster.gpu.memory
        if fits[alike]:
            kept.append(candidate)
    return kept


def _legal(parts: Described, levels: tuple[Recompute, ...], reasons: list[str]) -> Iterator[Candidate]:
    for values in _combinations(_unknowns(parts, levels)):
        try:
            plan = _plan(parts, values)
        except (InputError, ValueError) as error:
            reasons.append(words_of(error))
            continue
        errors = [f for f in verify(plan) if f.level == "error"]
        if errors:
            reasons.append(f"{errors[0].key} {errors[0].value}: {errors[0].rule}")
            continue
        open_ = {name: f"{value}: not stated" for name, value in values.items() if name in _open(parts)}
        yield Candidate(plan, {**parts.assumed, **open_})


def _combinations(unknowns: dict[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The product of all values; the longest list loses its last value until it is bounded."""
    lists = {name: list(values) for name, values in unknowns.items()}
    while _size(lists) > MOST_CANDIDATES:
        longest = max(reversed(list(lists)), key=lambda name: len(lists[name]))
        lists[longest].pop()
    for values in product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def _size(lists: dict[str, list[Any]]) -> int:
    size = 1
    for values in lists.values():
        size *= len(values)
    return size


def _open(parts: Described) -> frozenset[str]:
    """What the row leaves open."""
    row = parts.row
    stated = {
        "ep": row.ep,
        "etp": row.etp if parts.model.is_moe else 1,
        "vpp": row.vpp if (row.pp or 1) > 1 else 1,
        "micro_batch_size": row.micro_batch_size,
        "recompute": parts.stated.recompute,
        "dispatcher": parts.stated.dispatchers[0] if len(parts.stated.dispatchers) == 1 else None,
        "expert_overlap": parts.stated.expert_overlap if parts.model.is_moe else False,
        "global_batch_size": row.global_batch_size,
        "cp": row.cp,
    }
    return frozenset(name for name, value in stated.items() if value is None)


def _unknowns(parts: Described, levels: tuple[Recompute, ...]) -> dict[str, Sequence[Any]]:
    """Plausible values of everything that a row may leave open; one value where it states it.

    The first value is the engine's usual one; the lists stand in the order of what moves a step's time
    most, and are cut from the end.
    """
    row, stated = parts.row, parts.stated
    tp, pp, cp = row.tp, row.pp, row.cp or 1
    if not tp or not pp:
        raise RefusedError("layout: tensor or pipeline degree not stated", row.id)
    assert row.num_gpus is not None
    if row.num_gpus % (tp * pp * cp):
        raise RefusedError("layout: degrees that do not divide the GPUs", f"{tp}·{pp}·{cp} of {row.num_gpus}")
    dp = row.num_gpus // (tp * pp * cp)
    return {
        "micro_batch_size": _micro_batches(row, dp, cp),
        "recompute": [stated.recompute] if stated.recompute else list(levels),
        "vpp": _chunks(parts, pp),
        "dispatcher": stated.dispatchers,
        "ep": _expert_degrees(parts, tp * cp * dp),
        "etp": _expert_tensor_degrees(parts, tp),
        "expert_overlap": [bool(stated.expert_overlap)],
        "cp": [cp],
        "dp": [dp],
    }


def _micro_batches(row: Row, dp: int, cp: int) -> list[int]:
    if row.micro_batch_size:
        return [row.micro_batch_size]
    per_replica = (row.global_batch_size or 0) // dp
    length = (row.sequence_length or 1) // cp
    sizes = [1, 2, 4, 8]
    return [
        n for n in sizes if (n == 1 or n * length <= LONGEST_MICRO_BATCH_TOKENS) and per_replica % n == 0
    ] or [1]


def _chunks(parts: Described, pp: int) -> list[int]:
    """Chunks per pipeline rank: as stated, else 1, 2, 4 as far as layers divide."""
    row, layers = parts.row, parts.model.num_hidden_layers
    if row.vpp and row.vpp * pp <= layers + _own_stages(parts):
        return [row.vpp]
    if row.vpp:
        fewer = max(layers // pp, 1)
        parts.assumed["vpp"] = f"{fewer}: {row.vpp} chunks leave stages without a layer"
        return [fewer]
    if pp == 1 or "Interleaved1F1B" not in engine_named(parts.stated.engine).schedules:
        return [1]
    even = layers % pp == 0
    return [n for n in (1, 2, 4) if n * pp <= layers and (layers % (n * pp) == 0 or not even)] or [1]


def _own_stages(parts: Described) -> int:
    """Stages that the embedding and the head may have to themselves (Megatron Core's
    account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split)."""
    return 2 if parts.stated.engine == "megatron" else 0


def _stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage; more stages than layers leave the last and then the first one empty."""
    empty = num_stages - num_layers
    if empty <= 0:
        return split_layers(num_layers, num_stages)
    ends = ((), (0,)) if empty == 1 else ((0,), (0,))
    return (*ends[0], *split_layers(num_layers, num_layers), *ends[1])


def _expert_degrees(parts: Described, ranks: int) -> list[int]:
    """Experts over a node, over more, over all ranks; whole on each rank only where no exchange is named."""
    if parts.row.ep:
        return [parts.row.ep]
    if not parts.model.is_moe:
        return [1]
    node, exchanges = parts.cluster.gpus_per_node, bool(parts.row.dispatcher_overlap)
    sizes = dict.fromkeys((node, 4 * node, ranks, *(() if exchanges else (1,))))
    return [n for n in sizes if ranks % n == 0 and parts.model.num_experts % n == 0] or [1]


def _expert_tensor_degrees(parts: Described, tp: int) -> list[int]:
    """Experts cut by tp or not: without parallel folding Megatron cuts them as it cuts attention."""
    row, name = parts.row, parts.row.framework.lower()
    if row.etp:
        return [row.etp]
    if not parts.model.is_moe or "no folding" in name or "tp+ep" in name:
        return [tp]
    return list(dict.fromkeys((1, tp)))


def _plan(parts: Described, values: dict[str, Any]) -> Plan:
    row, stated = parts.row, parts.stated
    assert row.tp is not None
    assert row.pp is not None
    layout = Layout(
        tp=row.tp,
        cp=values["cp"],
        dp=values["dp"],
        pp=row.pp,
        vpp=values["vpp"],
        ep=values["ep"] if parts.model.is_moe else 1,
        etp=values["etp"] if parts.model.is_moe else row.tp,
    )
    size: int = values["micro_batch_size"]
    batch = row.global_batch_size or layout.dp * size * row.pp * MICRO_BATCHES_PER_STAGE
    policy = Policy(
        engine=stated.engine,
        micro_batch_size=size,
        schedule=_schedule(stated, layout),
        zero_stage=stated.zero_stage,
        sequence_parallel=layout.tp > 1 if stated.sequence_parallel is None else stated.sequence_parallel,
        recompute=values["recompute"],
        dispatcher=values["dispatcher"],
        expert_overlap=values["expert_overlap"] and layout.ep > 1,
        layers_per_stage=_stages(parts.model.num_hidden_layers, layout.num_stages),
        settings=_settings(parts, values["recompute"]),
    )
    workload = Workload(
        global_batch_size=batch,
        sequence_length=row.sequence_length or 0,
        precision=stated.precision,
    )
    return Plan(
        name=row.id,
        cluster=parts.cluster,
        model=parts.model,
        workload=workload,
        layout=layout,
        policy=policy,
    )


def _settings(parts: Described, level: Recompute) -> EngineSettings:
    """The engine's settings; where a row leaves recompute open, the narrow parts that a mixture of experts
    starts with (NVIDIA-NeMo/Megatron-Bridge@067f987d, skills/nemo-mbridge-perf-activation-recompute)."""
    stated, model = parts.stated, parts.model
    if level != "selective" or stated.recompute is not None:
        return stated.settings
    if stated.engine != "megatron" or not model.is_moe or (parts.row.year or 2025) < 2025:
        return stated.settings
    modules = ("layernorm", "moe_act", "mla_up_proj") if model.is_mla else ("layernorm", "moe_act")
    return stated.settings.model_copy(update={"recompute_modules": modules})


def _schedule(stated: Stated, layout: Layout) -> ScheduleName:
    if stated.schedule is not None:
        return stated.schedule
    return "Interleaved1F1B" if layout.vpp > 1 else "1F1B"
