"""What scaling down has changed of a plan, in plain words: found by comparing the two field by field."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.deployment import Training
from meshwright.files import Noun
from meshwright.ir.parameters import count_parameters
from meshwright.plan import Plan
from meshwright.policy import EngineSettings
from meshwright.workload import LengthCounts, LengthRange, RoutingCounts

Reasons = dict[str, str]
"""Why a field changed, by its key, where the change is more than a smaller size."""

LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Fields of latent attention."""
_WORDS = {
    "num_hidden_layers": "layers",
    "vocab_size": "vocabulary",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key-value heads",
    "intermediate_size": "dense feed-forward width",
    "moe_intermediate_size": "expert width",
    "shared_expert_intermediate_size": "shared expert width",
    "num_experts": "experts",
    "num_experts_per_tok": "experts per token",
    "first_k_dense_replace": "leading dense layers",
    "mlp_only_layers": "layers named as dense",
    "decoder_sparse_step": "layers from one with experts to the next",
}
_UNSAID = {"model.name", *(f"model.{name}" for name in LATENT)}
"""Names, and what one line about latent attention says together."""


def changes(plan: Plan, small: Plan, num_ranks: int, reasons: Reasons) -> Iterator[str]:
    """Everything in which a small plan differs from the one it stands for, a line for each."""
    before, now = count_parameters(plan.model).total, count_parameters(small.model).total
    yield f"parameters {before:,} → {now:,}"
    ranks = small.layout.world_size
    fewer = f" (of the {num_ranks} allowed)" if ranks < num_ranks else ""
    yield f"{plan.cluster.num_gpus:,} × {plan.cluster.gpu.name} → {ranks} processes of this machine{fewer}"
    for part in ("layout", "policy", "model", "workload"):
        if part == "model" and plan.model.is_mla:
            yield "latent attention → multi-head attention (the native engine runs no latent attention)"
        yield from _differences(part, getattr(plan, part), getattr(small, part), reasons)
    if plan.training is None:
        yield f"training none stated → the defaults, {Training().steps} steps"


def _differences(key: str, before: Noun, now: Noun, reasons: Reasons) -> Iterator[str]:
    for name in type(before).model_fields:
        inner, old, new = f"{key}.{name}", getattr(before, name), getattr(now, name)
        if name == "layers_per_stage":
            old, new = _stages(old), _stages(new)
        if old == new or inner in _UNSAID:
            continue
        if name == "router":
            yield from (f"router {line}" for line in _differences(inner, old, new, reasons))
            continue
        why = f" ({reasons[inner]})" if inner in reasons else ""
        yield f"{_WORDS.get(name, name.replace('_', ' '))} {_shown(old)} → {_shown(new)}{why}"


def _stages(layers: tuple[int, ...]) -> str:
    least, most = min(layers, default=0), max(layers, default=0)
    return f"{least} each" if least == most else f"{least}–{most}"


def _shown(value: object) -> str:
    match value:
        case None | ():
            return "none"
        case bool():
            return "on" if value else "off"
        case int():
            return f"{value:,}"
        case tuple():
            return "-".join(str(item) for item in value)
        case LengthRange():
            return f"{value.min:,}–{value.max:,}"
        case LengthCounts():
            return f"{len(value.counts)} lengths up to {max(length for length, _ in value.counts):,}"
        case EngineSettings():
            return ", ".join(value.model_dump(exclude_none=True)) or "the usual"
        case RoutingCounts():
            return "counted tokens"
    return str(value)
