"""Keys of a Hugging Face `config.json` that several model families share, read as fields of Model.

Each function reads one concern of a family (its attention, its experts, its router, its windows) from the
config's keys. A default that families do not share is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from meshwright.errors import InputError, shown
from meshwright.model import MAX_LAYERS
from meshwright.units import parse_count, parse_count_or_zero

Fields = dict[str, Any]

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def needed(c: Fields, key: str) -> Any:
    """A key without a default."""
    if key not in c:
        raise InputError(f"model.{key}", "missing", "the key is needed")
    return c[key]


def only(c: Fields, key: str, *allowed: object) -> None:
    """Refuse a key whose value asks for what Model does not describe; the first allowed is the default."""
    value = c.get(key, allowed[0])
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise InputError(f"model.{key}", value, "no such architecture is described", allowed)


def flag(c: Fields, key: str, default: bool) -> bool:
    """A key that is true or false."""
    value = c.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"model.{key}", value, "true or false", ["true", "false"])
    return value


def every_family(c: Fields) -> Fields:
    """Sizes, embedding, norm, positions and activation."""
    act = c.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise InputError("model.hidden_act", act, "no such activation is described", list(_ACTIVATIONS))
    rope = c.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
    return {
        **{key: needed(c, key) for key in sizes},
        **{
            key: c[key]
            for key in ("max_position_embeddings", "tie_word_embeddings", "rms_norm_eps")
            if key in c
        },
        **{key: c[key] for key in ("rope_theta", "partial_rotary_factor") if key in c},
        **{key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope},
        "hidden_act": _ACTIVATIONS[act],
    }


def heads(c: Fields, kv_heads: int | None, bias: object = False, output_bias: object = False) -> Fields:
    """Grouped-query attention; `kv_heads` is the family's default, None meaning as many as query heads."""
    return {
        "num_key_value_heads": c.get("num_key_value_heads", kv_heads),
        "head_dim": c.get("head_dim"),
        "attention_bias": bias,
        "attention_output_bias": output_bias,
    }


def biased_heads(c: Fields, kv_heads: int | None, default: bool = False) -> Fields:
    """`heads` whose four projections all have a bias or none, as `attention_bias` says."""
    bias = c.get("attention_bias", default)
    return heads(c, kv_heads, bias, bias)


def experts(c: Fields, count: str, width: str = "moe_intermediate_size", may_be_none: bool = False) -> Fields:
    """Routed experts; the family's own key counts them, and the other two spellings are taken as well."""
    given = [key for key in EXPERT_COUNTS if key in c] or [count]
    num_experts = needed(c, given[0])
    for key in given[1:]:
        if c[key] != num_experts:
            raise InputError(
                f"model.{key}",
                c[key],
                f"{given[0]} is {shown(num_experts)}; give one of the two",
                [num_experts],
            )
    (parse_count_or_zero if may_be_none else parse_count)(num_experts, f"model.{given[0]}")
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": needed(c, "num_experts_per_tok"),
        "moe_intermediate_size": needed(c, width),
    }


def balanced_router(c: Fields, normalize: object, coefficient: float = 0.001) -> Fields:
    """A softmax router. Its loss looks at the whole batch. The coefficient is the config's own; transformers
    applies it to a sum that counts each of a token's k choices, over all layers at once: for a loss of its
    size multiply by k and divide by the number of expert layers."""
    loss = {"aux_loss": c.get("router_aux_loss_coef", coefficient), "aux_loss_scope": "batch"}
    return {"type": "softmax", "normalize": normalize, **loss}


def windows(c: Fields, default: int | None, slides: Callable[[int], bool]) -> Fields:
    """Which layers attend within `sliding_window`: `layer_types` says, or else the family's own rule."""
    window, kinds = c.get("sliding_window", default), c.get("layer_types")
    if window is None:
        return {}
    layers = parse_count(needed(c, "num_hidden_layers"), "model.num_hidden_layers")
    if layers > MAX_LAYERS:
        raise InputError("model.num_hidden_layers", layers, f"at most {MAX_LAYERS:,}", [MAX_LAYERS])
    if kinds is not None:
        if not isinstance(kinds, list | tuple) or len(kinds) != layers:
            raise InputError("model.layer_types", kinds, f"a list of num_hidden_layers = {layers} names")
        for kind in kinds:
            if kind not in _LAYER_TYPES:
                raise InputError("model.layer_types", kind, "no such attention is described", _LAYER_TYPES)
    named = [
        layer for layer in range(layers) if (kinds[layer] == _LAYER_TYPES[1] if kinds else slides(layer))
    ]
    if not named:
        return {}
    return {"sliding_window": window, "sliding_window_layers": () if len(named) == layers else named}


def window_if_used(c: Fields, slides: Callable[[int], bool]) -> Fields:
    """`windows` of the families that have a switch for it, and a width even where it is off."""
    return windows(c, 4096, slides) if flag(c, "use_sliding_window", False) else {}


def max_window_layers(c: Fields) -> int:
    """The layer from which, or before which, a family's windows stand."""
    return parse_count_or_zero(c.get("max_window_layers", 28), "model.max_window_layers")


def sparse_layers(c: Fields) -> Fields:
    """Qwen's choice of layers with experts. A number past the last layer names none, as it does there."""
    layers, named = c.get("num_hidden_layers"), c.get("mlp_only_layers")
    if isinstance(named, list | tuple) and isinstance(layers, int):
        named = [layer for layer in named if not isinstance(layer, int) or layer < layers]
    return {
        "decoder_sparse_step": c.get("decoder_sparse_step", 1),
        "mlp_only_layers": () if named is None else named,
        "intermediate_size": c.get("intermediate_size"),
    }


def latent_attention(c: Fields) -> Fields:
    """DeepSeek-V2 §2.1 (arXiv:2405.04434): every query head has a key and a value head of its own."""
    num_heads, kv_heads = c.get("num_attention_heads"), c.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != num_heads:
        rule = "latent attention has a key-value head for each query head"
        raise InputError("model.num_key_value_heads", kv_heads, rule, [num_heads])
    if c.get("kv_lora_rank", 512) is None:
        raise InputError("model.kv_lora_rank", None, "latent attention needs it", [512])
    bias = c.get("attention_bias", False)
    return {
        "q_lora_rank": c.get("q_lora_rank", 1536),
        "kv_lora_rank": c.get("kv_lora_rank", 512),
        "qk_nope_head_dim": c.get("qk_nope_head_dim", 128),
        "qk_rope_head_dim": c.get("qk_rope_head_dim", 64),
        "v_head_dim": c.get("v_head_dim", 128),
        "attention_bias": bias,
        "attention_output_bias": bias,
    }


def shared_and_first_dense(c: Fields, shared: int, first: int) -> Fields:
    """Experts that every token passes through, and the dense layers before the first with experts."""
    given = c.get("n_shared_experts", shared)
    return {
        "n_shared_experts": 0 if given is None else given,
        "first_k_dense_replace": c.get("first_k_dense_replace", first),
        "intermediate_size": c.get("intermediate_size"),
    }


def expert_groups(c: Fields, groups: int, kept: int) -> Fields:
    """Groups of experts, of which a token keeps some; null is one group, and null kept is all of them."""
    given, given_kept = c.get("n_group", groups), c.get("topk_group", kept)
    num_groups = 1 if given is None else given
    return {"num_groups": num_groups, "num_limited_groups": num_groups if given_kept is None else given_kept}


def corrected_router(c: Fields, scaling: float, groups: int, kept: int) -> Fields:
    """DeepSeek-V3's (arXiv:2412.19437 §2.1.2): sigmoid scores, balanced by a correction of the choice."""
    only(c, "scoring_func", "sigmoid")
    only(c, "topk_method", "noaux_tc")
    return {
        "type": "sigmoid",
        "normalize": c.get("norm_topk_prob", True),
        "correction_bias": True,
        "scaling_factor": c.get("routed_scaling_factor", scaling),
        **expert_groups(c, groups, kept),
    }


def deepseek_loss(c: Fields) -> Fields:
    """DeepSeek's own keys, over which transformers reads; without them there is no such loss."""
    scope = "sequence" if flag(c, "seq_aux", True) else "batch"
    return {"aux_loss": c.get("aux_loss_alpha", 0.0), "aux_loss_scope": scope}
