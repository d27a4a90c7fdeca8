"""Small models whose whole steps are timed, and the constants that follow: what launching adds to ops, and
what a step takes beside all of them.

Steps of a few layers more or less differ by whole blocks: what a block takes beyond its ops, over the ops
that it launches, is the host's cost of one. What a step of one layer takes beyond that is the step's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meshwright.deployment import deployment_from
from meshwright.efficiency_table import EfficiencyTable
from meshwright.files import decode
from meshwright.ir.program import lower
from meshwright.model import Model
from meshwright.plan import Plan, resolve, split_layers
from meshwright.planner.estimate import Measured, compose, measure
from meshwright.planner.prices import Conditions, prices
from meshwright.planner.times import MICRO_BATCH_PHASES
from meshwright.scale_down import scaled_down
from meshwright.workload import Precision

Kind = Literal["dense", "experts"]
FEW, MORE = 1, 4
"""Layers of the smaller and the larger model."""

_DEFAULT: dict[str, Any] = {
    "name": "reference",
    "cluster": {"local": 1},
    "model": {
        "num_hidden_layers": 1,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "vocab_size": 256,
    },
    "workload": {"global_batch_size": 2, "sequence_length": 256, "precision": "fp32", "optimizer": "adamw"},
    "layout": {"tp": 1, "pp": 1, "dp": 1, "ep": 1},
    "policy": {"engine": "native", "micro_batch_size": 2, "zero_stage": 1},
}


@dataclass(frozen=True)
class Reference:
    """A plan of one rank with blocks of one kind."""

    kind: Kind
    layers: int
    plan: Plan


def references(plan: Plan | None, precision: Precision) -> list[Reference]:
    """Dense blocks and blocks with experts, few and more of each, in the sizes of a plan scaled down."""
    small = _default(precision) if plan is None else scaled_down(plan, 1, precision=precision).plan
    kinds: tuple[Kind, ...] = ("dense", "experts")
    return [Reference(kind, count, _of(small, kind, count)) for kind in kinds for count in (FEW, MORE)]


def _default(precision: Precision) -> Plan:
    plan = resolve(deployment_from(_DEFAULT, Path()))
    return plan.model_copy(update={"workload": plan.workload.model_copy(update={"precision": precision})})


def _of(small: Plan, kind: Kind, layers: int) -> Plan:
    """The small plan with one micro-batch and blocks of one kind."""
    workload = small.workload.model_copy(
        update={
            "global_batch_size": small.policy.micro_batch_size,
            "sequence_length": small.workload.max_sequence_length,
            "routing": "balanced",
        }
    )
    policy = {
        "layers_per_stage": split_layers(layers, 1),
        "schedule": "1F1B",
        "recompute": "none",
        "zero_stage": 1,
    }
    return small.model_copy(
        update={
            "name": f"reference-{kind}-{layers}",
            "model": _model(small.model, kind, layers),
            "workload": workload,
            "policy": small.policy.model_copy(update=policy),
        }
    )


def _model(model: Model, kind: Kind, layers: int) -> Model:
    """The model with so many layers, with or without experts in all of them."""
    width = model.intermediate_size or model.moe_intermediate_size or 4 * model.hidden_size
    fields = model.model_dump() | {
        "num_hidden_layers": layers,
        "sliding_window_layers": (),
        "mlp_only_layers": (),
        "decoder_sparse_step": 1,
        "first_k_dense_replace": layers if kind == "dense" else 0,
        "intermediate_size": width,
    }
    if not model.is_moe:
        fields |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": width}
    return decode(Model, fields, "model")


@dataclass(frozen=True)
class Constants:
    """Seconds of the host for one op of a block of each kind, and of a step beside all that is counted."""

    host_s: Mapping[Kind, float]
    step_s: float


def constants_from(
    asked: Sequence[Reference], seconds: Sequence[float], table: EfficiencyTable, is_serial: bool
) -> Constants:
    """The constants that steps of these seconds lead to. `table` holds the ops, and no constants yet.

    host = (T_more − T_few − the same predicted) / launches of the blocks that they differ by, not below 0;
    where a GPU runs beside its host, a step of small ops is all launching: (T_more − T_few) / launches.
    step = mean over the kinds of T_few − predicted − host·launches, not below 0.
    """
    took = {(one.kind, one.layers): s for one, s in zip(asked, seconds, strict=True)}
    priced = {(one.kind, one.layers): _predicted(one.plan, table) for one in asked}
    host: dict[Kind, float] = {}
    left = []
    kinds: tuple[Kind, ...] = ("dense", "experts")
    for kind in kinds:
        few, more = priced[kind, FEW], priced[kind, MORE]
        between = took[kind, MORE] - took[kind, FEW]
        explained = more[0] - few[0] if is_serial else 0.0
        host[kind] = max((between - explained) / (more[1] - few[1]), 0.0)
        left.append(took[kind, FEW] - few[0] - host[kind] * few[1] * is_serial)
    return Constants(host, max(sum(left) / len(left), 0.0))


def _predicted(plan: Plan, table: EfficiencyTable) -> tuple[float, float]:
    """Seconds of a step by the ops of the table alone, and the ops that it launches."""
    cluster = plan.cluster.model_copy(update={"calibration": table})
    measured_plan = plan.model_copy(update={"cluster": cluster})
    priced = prices(cluster, plan.workload.precision, plan.policy.engine)
    found = measure(measured_plan, priced, Conditions())
    return compose(found, priced).total_s, _launches(found)


def _launches(found: Measured) -> float:
    counts = found.counts.sum(axis=0)
    return float(
        sum(
            count * (kernels[phase]["launches"] + kernels[phase]["launches_experts"])
            for count, kernels in zip(counts, found.kinds, strict=True)
            for phase in MICRO_BATCH_PHASES
        )
    )


def programs_of(asked: Sequence[Reference]) -> list[Any]:
    """The references lowered: their ops are measured with the others."""
    return [lower(one.plan) for one in asked]
