"""A plan shrunk to what one machine trains, with every kind of parallelism that it has still in play.

The degrees become twos as far as the ranks last, the model keeps its kinds of layers and what is particular
about each, and the batch is as small as the schedule allows. Nothing is changed in silence: what differs
between the two plans is found by comparing them field by field.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Any

from meshwright.cluster import MAX_LOCAL, LocalRequest
from meshwright.deployment import Training
from meshwright.engines import engine_named
from meshwright.errors import InputError
from meshwright.files import decode
from meshwright.layout import Layout
from meshwright.model import Model
from meshwright.plan import Plan, split_layers
from meshwright.policy import CHUNKED_SCHEDULES, SPLIT_BACKWARD, V_SCHEDULES, EngineSettings, Policy
from meshwright.scale_down.changes import LATENT, Reasons, changes
from meshwright.verify import require_valid
from meshwright.workload import LengthCounts, LengthRange, Precision, RoutingCounts, Workload

NATIVE = engine_named("native")

MOST_EP, MOST_EXPERTS, MOST_GROUPS = 4, 8, 4
LAYERS_PER_STAGE = 2
SMALL_HIDDEN, LARGEST_HIDDEN = 128, 256
LEAST_HEAD_DIM = 16
WIDTH_UNIT, LARGEST_WIDTH = 16, 512
BYTE_VOCABULARY = 256
LEAST_LENGTH, LONGEST_LENGTH, LARGEST_MICRO_BATCH = 16, 256, 2


@dataclass(frozen=True, slots=True)
class ScaledDown:
    """A small plan, and in plain words everything in which it differs from the one it stands for."""

    plan: Plan
    changes: tuple[str, ...]


def scaled_down(plan: Plan, num_ranks: int = 8, *, precision: Precision | None = "fp32") -> ScaledDown:
    """A planned model and layout as small as `num_ranks` processes of this machine train.

    Axes that the plan divides stay divided as far as the ranks last, pipeline first, then tensor, then data
    parallelism; experts fold into the ranks of a stage. A plan of fewer ranks than `num_ranks` keeps fewer:
    no axis is divided that was not. `precision` is that of the small plan, fp32 because processors are fast
    in it; None keeps the plan's where the native engine runs it. Names gain `-scaled-down`.

    Raises InputError for a number of ranks that is no power of two, for a precision that the native engine
    does not run, and for a plan so broken that no small one of its kind is valid.
    """
    _require_ranks(num_ranks)
    reasons: Reasons = {}
    layout = _small_layout(plan, num_ranks, reasons)
    workload = _small_workload(plan, layout, precision, reasons)
    training = plan.training or Training()
    shrink = _Shrink(plan.model, layout, plan.workload, workload)
    model = shrink.model(byte_ids=training.tokenizer == "bytes")
    cluster, defaults = LocalRequest(local=layout.world_size).resolve()
    small = Plan(
        name=f"{plan.name}-scaled-down",
        cluster=cluster,
        model=model,
        workload=workload,
        layout=layout,
        policy=_small_policy(plan, layout, model, reasons),
        training=training,
        defaults=defaults,
    )
    require_valid(small)
    return ScaledDown(small, tuple(changes(plan, small, num_ranks, reasons)))


def _require_ranks(num_ranks: int) -> None:
    if num_ranks < 1 or num_ranks & (num_ranks - 1) or num_ranks > MAX_LOCAL:
        rule = f"a power of two up to {MAX_LOCAL:,}: each axis is divided by two"
        near = _power_of_two(min(max(num_ranks, 1), MAX_LOCAL))
        raise InputError("num_ranks", num_ranks, rule, [near])


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above a number."""
    return 1 << (number.bit_length() - 1)


# Layout, policy and workload.


def _small_layout(plan: Plan, num_ranks: int, reasons: Reasons) -> Layout:
    """Degrees of two in the order pp, tp, dp; ranks left over divide further what was divided as far."""
    old = plan.layout
    room = {"pp": _power_of_two(old.pp), "tp": _power_of_two(old.tp), "dp": _power_of_two(old.dp * old.cp)}
    degrees, left = dict.fromkeys(room, 1), num_ranks
    for axis in room:
        if room[axis] > 1 and left > 1:
            degrees[axis], left = 2, left // 2
    for axis in ("dp", "tp", "pp"):
        while left > 1 and degrees[axis] < room[axis]:
            degrees[axis], left = degrees[axis] * 2, left // 2
    for axis, degree in degrees.items():
        if degree == 1 < room[axis]:
            reasons[f"layout.{axis}"] = f"{num_ranks} ranks do not reach for it"
    if old.cp > 1:
        reasons["layout.cp"] = "the native engine runs none; its ranks count as dp"
    degrees |= _expert_degrees(plan, degrees["tp"], degrees["dp"], reasons)
    degrees["dp_replicas"] = _replicas(old, degrees, reasons)
    return Layout(**degrees, vpp=_chunks(plan, degrees["pp"], reasons))


def _expert_degrees(plan: Plan, tp: int, dp: int, reasons: Reasons) -> dict[str, int]:
    old, stage_ranks = plan.layout, tp * dp
    wanted = min(_power_of_two(old.ep), MOST_EP) if plan.model.is_moe else 1
    etp = 1
    if old.etp > 1 and old.ep == 1 and old.etp == old.tp:
        etp = tp
    elif old.etp > 1:
        etp = 2 if stage_ranks >= 2 * min(wanted, 2) else 1
    ep = min(wanted, stage_ranks // etp)
    for axis, before, now in (("ep", old.ep, ep), ("etp", old.etp, etp)):
        if now == 1 < before:
            reasons[f"layout.{axis}"] = "a stage has too few ranks"
    return {"ep": ep, "etp": etp}


def _replicas(old: Layout, degrees: dict[str, int], reasons: Reasons) -> int:
    """Two replicas of ZeRO's groups where the plan has several and the data axes still divide."""
    if old.dp_replicas == 1:
        return 1
    edp = degrees["tp"] * degrees["dp"] // (degrees["ep"] * degrees["etp"])
    if degrees["dp"] % 2 == 0 and edp % 2 == 0:
        return 2
    reasons["layout.dp_replicas"] = "the data axes have too few ranks"
    return 1


def _chunks(plan: Plan, pp: int, reasons: Reasons) -> int:
    schedule, vpp = plan.policy.schedule, plan.layout.vpp
    if pp == 1 < plan.layout.pp:
        reasons["layout.vpp"] = "one rank has no pipeline"
        return 1
    if schedule in V_SCHEDULES:
        return 2
    return min(vpp, 2) if schedule in CHUNKED_SCHEDULES else 1


def _small_policy(plan: Plan, layout: Layout, model: Model, reasons: Reasons) -> Policy:
    old = plan.policy
    update: dict[str, Any] = {
        "engine": "native",
        "micro_batch_size": min(old.micro_batch_size, LARGEST_MICRO_BATCH),
        "expert_overlap": False,
        "sequence_parallel": layout.tp > 1 and (old.sequence_parallel or model.is_moe),
        "layers_per_stage": split_layers(model.num_hidden_layers, layout.num_stages),
    }
    reasons["policy.expert_overlap"] = "the native engine does not run it"
    reasons["policy.sequence_parallel"] = "tp is 1" if layout.tp == 1 else "experts under tp need it"
    if old.engine != "native":
        update["settings"], reasons["policy.settings"] = EngineSettings(), f"those of {old.engine}"
    if old.dispatcher not in NATIVE.dispatchers:
        update["dispatcher"] = "alltoall"
        reasons["policy.dispatcher"] = "the native engine does not run it"
    if layout.pp == 1 < plan.layout.pp:
        update["schedule"] = "1F1B"
        reasons["policy.schedule"] = "one rank has no pipeline"
    elif old.zero_stage == 3 and old.schedule in SPLIT_BACKWARD and layout.pp > 1:
        update["zero_stage"] = 2
        reasons["policy.zero_stage"] = f"PyTorch gives wrong gradients with {old.schedule}"
    return old.model_copy(update=update)


def _small_workload(plan: Plan, layout: Layout, precision: Precision | None, reasons: Reasons) -> Workload:
    old, unit = plan.workload, layout.tp
    wanted = precision or old.precision
    if wanted not in NATIVE.precisions:
        if precision is not None:
            raise InputError("precision", precision, "the native engine does not run it", NATIVE.precisions)
        wanted = "fp32"
        reasons["workload.precision"] = "the native engine does not run it"
    # Two for each rank of the pipeline are enough for every schedule, and what DualPipeV needs.
    micro_batches = 2 * layout.pp if layout.pp > 1 else min(max(plan.num_micro_batches, 1), 2)
    per_replica = micro_batches * min(plan.policy.micro_batch_size, LARGEST_MICRO_BATCH)
    update: dict[str, Any] = {
        "global_batch_size": per_replica * layout.dp,
        "sequence_length": _small_lengths(old, unit),
        "precision": wanted,
    }
    if isinstance(old.routing, RoutingCounts):
        update["routing"] = "balanced"
        reasons["workload.routing"] = "the counts are of layers and experts that are gone"
    return old.model_copy(update=update)


def _small_lengths(old: Workload, unit: int) -> int | LengthRange | LengthCounts:
    """Lengths of the same form, at most LONGEST_LENGTH, each a multiple of `unit`."""

    def small(length: int) -> int:
        scaled = round(length * min(1.0, LONGEST_LENGTH / old.max_sequence_length))
        least = min(length, LEAST_LENGTH)  # what is shorter already stays
        return -(-max(scaled, least) // unit) * unit

    match old.sequence_length:
        case LengthRange() as lengths:
            low, high = small(lengths.min), small(lengths.max)
            mean = None if lengths.mean is None else min(max(small(lengths.mean), low), high)
            return LengthRange(min=low, max=high, mean=mean)
        case LengthCounts() as histogram:
            merged: dict[int, int] = {}
            for length, count in histogram.counts:
                merged[small(length)] = merged.get(small(length), 0) + count
            return LengthCounts(counts=tuple(sorted(merged.items())))
    return small(old.max_sequence_length)


# The model.


class _Shrink:
    """The sizes of a smaller model, each from the model, the small layout and the small workload."""

    def __init__(self, old: Model, layout: Layout, before: Workload, now: Workload) -> None:
        self.old = old
        self.layout = layout
        self.hidden = old.hidden_size if old.hidden_size <= LARGEST_HIDDEN else SMALL_HIDDEN
        self.longest = now.max_sequence_length
        self.length_fraction = self.longest / before.max_sequence_length
        stages = layout.num_stages
        self.num_layers = max(stages, min(old.num_hidden_layers, LAYERS_PER_STAGE * stages))

    def model(self, byte_ids: bool) -> Model:
        """The small model."""
        old = self.old
        fields = old.model_dump() | {
            "name": f"{old.name}-scaled-down",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden,
            "vocab_size": BYTE_VOCABULARY if byte_ids else old.vocab_size,
            "intermediate_size": None if old.intermediate_size is None else self.width(old.intermediate_size),
            **self.attention(),
            **(self.experts() if old.is_moe else self.no_experts()),
        }
        if old.position == "learned":
            fields["max_position_embeddings"] = self.longest
        return decode(Model, fields, "model")

    def attention(self) -> dict[str, Any]:
        """Heads that tp divides, in the old ratio of query heads to key-value heads; latent attention becomes
        multi-head attention."""
        old, tp = self.old, self.layout.tp
        if old.is_mla or old.kv_heads == old.num_attention_heads:
            heads = kv_heads = -(-min(old.num_attention_heads, max(4, tp)) // tp) * tp
        else:
            kv_heads = min(_power_of_two(old.kv_heads), max(2, tp))
            unit = max(kv_heads, tp)  # both are powers of two
            heads = -(-kv_heads * (old.num_attention_heads // old.kv_heads) // unit) * unit
        same = heads == old.num_attention_heads and self.hidden == old.hidden_size
        least = old.qk_head_dim if same else max(LEAST_HEAD_DIM, self.hidden // heads)
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": min(old.qk_head_dim, least),
            **(dict.fromkeys(LATENT) if old.is_mla else {}),
            **self.windows(),
        }

    def windows(self) -> dict[str, Any]:
        """A window as long against the sequences as before, in layers of both kinds where both were there."""
        old, count = self.old, self.num_layers
        if old.sliding_window is None:
            return {}
        window = max(1, round(old.sliding_window * self.length_fraction))
        named = set(old.sliding_window_layers)
        if len(named) in (0, old.num_hidden_layers):  # every layer
            return {"sliding_window": window, "sliding_window_layers": ()}
        first = tuple(layer for layer in range(count) if layer in named)
        spread = tuple(layer for layer in range(count) if layer * old.num_hidden_layers // count in named)
        mixed = (layers for layers in (first, spread) if 0 < len(layers) < count)
        return {"sliding_window": window, "sliding_window_layers": next(mixed, (count - 1,))}

    def experts(self) -> dict[str, Any]:
        """Few experts, of which a token chooses at most half where it did; the kinds of dense layers."""
        old, router = self.old, self.old.router
        groups = min(_power_of_two(router.num_groups), MOST_GROUPS)
        unit = lcm(groups, self.layout.ep)
        count = max(min(old.num_experts, MOST_EXPERTS) // unit, 1) * unit
        limited = max(1, round(router.num_limited_groups * groups / router.num_groups))
        reachable = count // groups * limited if groups > 1 else count
        half = 2 * old.num_experts_per_tok <= old.num_experts
        chosen = min(old.num_experts_per_tok, max(count // 2, 1) if half else count, reachable)
        width = self.width(old.moe_intermediate_size or 1)
        return {
            "num_experts": count,
            "num_experts_per_tok": chosen,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": self.shared_width(width),
            "router": router.model_dump() | {"num_groups": groups, "num_limited_groups": limited},
            "first_k_dense_replace": min(old.first_k_dense_replace, 1),
            "decoder_sparse_step": min(old.decoder_sparse_step, LAYERS_PER_STAGE),
            "mlp_only_layers": old.mlp_only_layers and (0,),  # one stands for all, before others with experts
        }

    def no_experts(self) -> dict[str, Any]:
        """All layers stay dense, whatever else the model says of experts."""
        return {
            "mlp_only_layers": (),
            "first_k_dense_replace": self.num_layers if self.old.num_experts else 0,
        }

    def shared_width(self, width: int) -> int | None:
        """Width of the shared experts: as many times that of a routed one as before, where it was that."""
        old = self.old
        if old.n_shared_experts * (old.moe_intermediate_size or 0) == old.shared_width != 0:
            return old.n_shared_experts * width
        return self.width(old.shared_width) if old.shared_width else old.shared_expert_intermediate_size

    def width(self, old: int) -> int:
        """A feed-forward width in the old proportion to the hidden size, which tp and etp divide."""
        degrees = lcm(self.layout.tp, self.layout.etp)
        if self.hidden == self.old.hidden_size and old <= LARGEST_WIDTH and old % degrees == 0:
            return old
        unit = lcm(WIDTH_UNIT, degrees)
        most = max(LARGEST_WIDTH // unit, 1)
        return min(max(round(old * self.hidden / self.old.hidden_size / unit), 1), most) * unit
