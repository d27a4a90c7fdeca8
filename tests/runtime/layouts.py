"""The layouts on which training is held against one process, and the models that they train.

Tests and `tools/parity.py` read the same list.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

from meshwright.deployment import deployment_from
from meshwright.errors import InputError
from meshwright.plan import Plan, resolve
from meshwright.policy import CHUNKED_SCHEDULES, SCHEDULES
from meshwright.verify import require_valid

BATCH, LENGTH, STEPS, VOCABULARY = 8, 32, 8, 257

_SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

MODELS: dict[str, dict[str, Any]] = {
    "gated": {
        **_SIZES,
        **_EXPERTS,
        "qk_norm": "head",
        "first_k_dense_replace": 1,
        "intermediate_size": 48,
        "n_shared_experts": 1,
    },
    "plain": {
        **_SIZES,
        **_EXPERTS,
        "gated": False,
        "expert_bias": True,
        "norm": "layernorm",
        "position": "learned",
        "max_position_embeddings": LENGTH,
        "attention_output_bias": True,
        "router": {"bias": True, "normalize": False},
    },
    "tied": {
        **_SIZES,
        **_EXPERTS,
        "qk_norm": "full",
        "tie_word_embeddings": True,
        "n_shared_experts": 1,
        "attention_bias": True,
    },
    "balanced": {
        **_SIZES,
        **_EXPERTS,
        "expert_bias": True,
        "router": {"aux_loss": 0.5, "z_loss": 0.05},
    },
    "sigmoid": {
        **_SIZES,
        **_EXPERTS,
        "decoder_sparse_step": 2,
        "intermediate_size": 48,
        "n_shared_experts": 1,
        "shared_expert_gate": True,
        "router": {
            "type": "sigmoid",
            "correction_bias": True,
            "scaling_factor": 2.5,
            "num_groups": 4,
            "num_limited_groups": 2,
            "aux_loss": 0.1,
        },
    },
    "uneven": {**_SIZES, **_EXPERTS, "router": {"bias": True}},
    "dense": {
        **_SIZES,
        "intermediate_size": 48,
        "mlp_bias": True,
        "attention_sinks": True,
        "sliding_window": 8,
        "sliding_window_layers": [1, 3],
    },
}
CLIPS = {
    "gated": 0.5,
    "plain": 0.0,
    "tied": 0.5,
    "balanced": 0.5,
    "sigmoid": 0.0,
    "uneven": 1.0,
    "dense": 0.5,
}
"""Where the gradient is cut; 0 cuts nothing."""
SEEDS: dict[str, int] = {}
"""Seeds of first weights and of the batches' order, 0 where none is given: such that no decision of the
router stands nearer to a tie than rounding reaches (see `test_no_decision_is_near_a_tie`)."""
RATES = {"sgd": 0.1, "adamw": 3e-4}


@dataclass(frozen=True)
class Case:
    """A model under a layout and a policy; degrees that are not named are 1."""

    model: str
    layout: dict[str, int]
    policy: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    vocabulary: int = VOCABULARY

    def __str__(self) -> str:
        degrees = "-".join(f"{axis}{degree}" for axis, degree in self.layout.items())
        choices = (_word(key, value) for key, value in self.policy.items())
        precision = () if self.precision == "fp32" else (self.precision,)
        return "-".join((self.model, degrees, *choices, *precision))

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def world(self) -> int:
        """Ranks."""
        return prod(self.layout.get(axis, 1) for axis in ("tp", "dp", "pp"))

    @cached_property
    def features(self) -> frozenset[str]:
        """What of parallelism it has, by the names of `FEATURES`."""
        plan = self.plan("sgd")
        axes = {axis.upper() for axis in ("tp", "pp", "ep", "etp") if plan.layout.size(axis) > 1}
        if plan.layout.tp > 1 and plan.policy.sequence_parallel:
            axes.add("SP")
        if plan.policy.zero_stage and (plan.layout.dp > 1 or plan.layout.edp > 1):
            axes.add(f"ZeRO {plan.policy.zero_stage}")
        return frozenset(axes)

    def plan(self, optimizer: str, **training: Any) -> Plan:
        """The case as a plan that holds every rule."""
        return _plan(self, optimizer, self.layout, self.policy, training)

    def alone(self, optimizer: str, **training: Any) -> Plan:
        """The same model and workload on one process."""
        return _plan(self, optimizer, {}, {"micro_batch_size": 2, "zero_stage": 0}, training)


FEATURES = ("TP", "SP", "PP", "EP", "ETP", "ZeRO 1", "ZeRO 2", "ZeRO 3")


def pairs() -> Iterator[frozenset[str]]:
    """Every two features that a layout can have together: it has one stage of ZeRO."""
    for one, other in combinations(FEATURES, 2):
        if not (one.startswith("ZeRO") and other.startswith("ZeRO")):
            yield frozenset((one, other))


def _word(key: str, value: Any) -> str:
    match key:
        case "zero_stage":
            return f"z{value}"
        case "sequence_parallel":
            return "sp" if value else "nosp"
        case "micro_batch_size":
            return f"mb{value}"
    return str(value)


def _plan(
    case: Case, optimizer: str, layout: dict[str, int], policy: dict[str, Any], training: dict[str, Any]
) -> Plan:
    degrees = {"tp": 1, "pp": 1, "dp": 1, **layout}
    document = {
        "cluster": {"local": degrees["tp"] * degrees["pp"] * degrees["dp"]},
        "model": {**MODELS[case.model], "vocab_size": case.vocabulary},
        "workload": {
            "global_batch_size": BATCH,
            "sequence_length": LENGTH,
            "precision": case.precision,
            "optimizer": optimizer,
        },
        "layout": degrees,
        "policy": {"engine": "native", **policy},
        "training": {
            "learning_rate": RATES[optimizer],
            "gradient_clip": CLIPS[case.model],
            "seed": SEEDS.get(case.model, 0),
            "data": "clauses.txt",
            **training,
        },
    }
    plan = resolve(deployment_from(document, Path()))
    require_valid(plan)
    return plan


def _case(model: str, degrees: str, *words: str) -> Case:
    """`_case("gated", "tp2 dp2 ep4", "z1", "mb2", "full")`."""
    layout = {}
    for degree in degrees.split():
        axis = degree.rstrip("0123456789")
        layout[axis] = int(degree.removeprefix(axis))
    policy: dict[str, Any] = {"zero_stage": 1}
    precision = "fp32"
    for word in words:
        if word[0] == "z":
            policy["zero_stage"] = int(word[1:])
        elif word.startswith("mb"):
            policy["micro_batch_size"] = int(word[2:])
        elif word == "nosp":
            policy["sequence_parallel"] = False
        elif word in SCHEDULES:
            policy["schedule"] = word
        elif word in ("selective", "full"):
            policy["recompute"] = word
        elif word == "allgather":
            policy["dispatcher"] = word
        else:
            precision = word
    return Case(model, layout, policy, precision)


GIVEN = (
    # data, experts and ZeRO
    _case("gated", "dp2", "z0", "mb2"),
    _case("gated", "dp2 ep2", "z1", "mb2"),
    _case("gated", "dp4 ep2", "z2", "mb2"),
    _case("gated", "dp4 ep2", "z3", "mb2"),
    _case("plain", "dp4 ep2 etp2", "z1", "mb2"),
    _case("plain", "dp2 ep2", "z2", "mb2", "allgather"),
    _case("sigmoid", "dp4 ep4", "z2", "mb2"),
    _case("balanced", "dp4 ep2", "z1", "mb2"),
    _case("uneven", "dp4 ep4", "z3", "mb2", "allgather"),
    # hybrid sharding: ZeRO within runs of neighbouring ranks
    _case("gated", "dp4 ep2 dp_replicas2", "z1", "mb2"),
    _case("plain", "dp4 dp_replicas2", "z3", "mb2"),
    _case("tied", "pp2 dp4 ep2 dp_replicas2", "z3", "1F1B"),
    # tensor and sequence parallelism
    _case("gated", "tp2", "z0", "mb4"),
    _case("gated", "tp2 dp2 ep4", "z1", "mb4"),
    _case("plain", "tp2 dp2 ep2 etp2", "z2", "mb4"),
    _case("plain", "tp2 dp4 ep2 etp2", "z3", "mb2"),
    _case("tied", "tp4 ep2 etp2", "z0", "mb8"),
    _case("balanced", "tp2 dp2 ep4", "z2", "mb4", "allgather"),
    _case("sigmoid", "tp2 dp2 ep2", "z3", "mb4"),
    _case("uneven", "tp2 dp2 ep2 etp2", "z1", "mb4"),
    _case("dense", "tp2 dp2", "z1", "mb4", "nosp"),
    _case("dense", "tp4", "z0", "mb8", "nosp"),
    _case("dense", "tp2 dp2", "z3", "mb4", "nosp"),
    # pipelines
    _case("gated", "pp2", "z0", "mb2", "GPipe"),
    _case("tied", "pp2 dp2 ep2", "z1", "1F1B"),
    _case("tied", "pp2 dp2 ep2", "z3", "mb2", "1F1B"),
    _case("plain", "pp2 dp4 ep2 etp2 vpp2", "z3", "Interleaved1F1B"),
    _case("gated", "pp2 dp2 ep2 vpp2", "z2", "Interleaved1F1B"),
    _case("sigmoid", "pp2 dp2 ep2 vpp2", "z1", "InterleavedZeroBubble"),
    _case("tied", "pp2 dp2 ep2 vpp2", "z2", "ZBVZeroBubble"),
    _case("uneven", "pp2 dp2 ep2 vpp2", "z1", "DualPipeV"),
    _case("balanced", "pp2 dp2 ep2 vpp2", "z1", "mb2", "ZBVZeroBubble", "full"),
    _case("gated", "pp4 dp2 ep2", "z1", "1F1B", "selective"),
    # all of it
    _case("dense", "tp2 pp2 dp2", "z1", "mb2", "1F1B", "nosp"),
    _case("gated", "tp2 pp2 dp2 ep2", "z3", "mb2", "1F1B"),
    _case("balanced", "tp2 pp2 ep2 vpp2", "z1", "mb2", "DualPipeV", "selective"),
    _case("plain", "tp2 pp2 dp2 ep2 etp2 vpp2", "z2", "mb2", "InterleavedZeroBubble", "full"),
    _case("gated", "tp2 pp2 dp4 ep4 etp2", "z2", "1F1B", "allgather"),
)
"""Layouts that were chosen: every pair of features, schedule, dispatcher and kind of model."""

HALF = (
    _case("gated", "dp4 ep2", "z2", "mb2", "bf16"),
    _case("gated", "tp2 dp2 ep2", "z3", "mb4", "bf16"),
    _case("gated", "dp4 ep2", "z3", "mb2", "fp16"),
    _case("gated", "tp2 dp2 ep2 etp2", "z1", "mb4", "fp16", "allgather"),
    _case("gated", "pp2 dp2 ep2 vpp2", "z1", "ZBVZeroBubble", "fp16", "full"),
)
"""Layouts in half precision. Experts are chosen by a token's place in its document there: scores that are
rounded to 8 bits are often as good as tied."""


def drawn(count: int, seed: int = 0) -> tuple[Case, ...]:
    """Layouts drawn at random from all that the rules allow, of up to 8 ranks."""
    chance = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        case = _drawn(chance)
        try:
            case.plan("sgd")
        except InputError:
            continue
        if case.world > 1:
            cases.append(case)
    return tuple(cases)


def _drawn(chance: random.Random) -> Case:
    layout = {axis: chance.choice((1, 2, 2)) for axis in ("tp", "pp", "dp")}
    layout |= {"ep": chance.choice((1, 2, 4)), "etp": chance.choice((1, 2))}
    schedule = chance.choice(SCHEDULES)
    layout["vpp"] = 2 if layout["pp"] > 1 and schedule in CHUNKED_SCHEDULES else 1
    policy = {
        "zero_stage": chance.choice((0, 1, 2, 3)),
        "dispatcher": chance.choice(("alltoall", "allgather")),
        "recompute": chance.choice(("none", "selective", "full")),
        "sequence_parallel": layout["tp"] > 1,
        "micro_batch_size": 2,
    }
    if layout["pp"] > 1:
        policy["schedule"] = schedule
    degrees = {axis: degree for axis, degree in layout.items() if degree > 1}
    return Case(chance.choice([name for name in MODELS if name != "dense"]), degrees, policy)


DRAWN = drawn(4)
CASES = (*GIVEN, *DRAWN)

ERRORS = ("loss", "balance", "norm", "gradient", "weight")
"""What is compared, by the names of `parity_runs.Errors`."""
_ROUNDINGS = 144
"""One after another: 4 layers, 12 in the forward of each, twice as many in its backward."""


def limits(case: Case, optimizer: str) -> dict[str, float]:
    """Largest relative errors that are rounding.

    FP32: 1e-6 for scalars, 1e-5 for tensors. AdamW divides each element by its own size, so that elements
    near rounding move by whole steps: 5e-5 for its weights.

    Half precision, u its unit roundoff (2⁻⁸ for bf16, 2⁻¹¹ for fp16), against one process in the same
    precision. Two runs that round n times one after another, each by u at random, are √(2n)·u apart: 17 u
    for gradients. Errors of tokens are independent, and cancel in the loss, a mean over 256 of them of about
    5.5: √(2n/3)·u/√256/5.5 = 0.11 u. A norm feels only the part of an error along the gradient: 2 u leave
    room for a tenth of it. SGD moves weights by less than 1/17 of their norm in 8 steps: u. AdamW: 4 u.
    """
    if case.precision == "fp32":
        tensors = {"gradient": 1e-5, "weight": 1e-5 if optimizer == "sgd" else 5e-5}
        return {"loss": 1e-6, "balance": 1e-6, "norm": 1e-6, **tensors}
    u = 2.0**-8 if case.precision == "bf16" else 2.0**-11
    loss = (2 * _ROUNDINGS / 3) ** 0.5 * u / 16 / 5.5
    weight = u if optimizer == "sgd" else 4 * u
    return {
        "loss": loss,
        "balance": loss,
        "norm": 2 * u,
        "gradient": (2 * _ROUNDINGS) ** 0.5 * u,
        "weight": weight,
    }
