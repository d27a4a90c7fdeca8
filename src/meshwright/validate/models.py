"""The model of a row, from the dimensions that it states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files as package_files
from typing import Any

from meshwright.families import catalogue_models, model_named
from meshwright.files import parse_yaml
from meshwright.model import Model
from meshwright.validate.refusal import RefusedError, words_of
from meshwright.validate.rows import Row

LATENT_DEFAULTS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
"""Head widths that every published latent-attention model shares (DeepSeek-V2, V3, Kimi K2, Moonlight)."""
VOCABULARY = 128_256
"""Taken where a row states no vocabulary and no catalogue model fills it."""

_UNSUPPORTED = {
    r"mamba|ssm|\bhybrid\b": "architecture: state-space layers beside attention",
    r"sparse|compressed|\bdsa\b|dsv4|\bnsa\b": "architecture: sparse or compressed attention",
    r"delta|linear": "architecture: linear attention",
    r"latentmoe": "architecture: experts in a latent space",
}
_FILLED_BY_NAME = (
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "q_lora_rank",
    "attention_bias",
    "attention_output_bias",
    "attention_sinks",
    "qk_norm",
    "expert_bias",
    "shared_expert_gate",
    "norm",
    "norm_eps",
    "position",
    "tie_word_embeddings",
    "hidden_act",
)


def model_of(row: Row, assumed: dict[str, str]) -> Model:
    """The model that a row describes; what it leaves open is filled and written into `assumed`.

    Raises RefusedError for an architecture that the graph does not describe, or one that is not stated.
    """
    row = _named(row, assumed)
    _require_described(row)
    twin = _catalogue_twin(row)
    fields: dict[str, Any] = {
        "name": row.model,
        "num_hidden_layers": row.num_layers,
        "hidden_size": row.hidden_size,
        "num_attention_heads": row.num_heads,
        "num_key_value_heads": row.num_kv_heads or row.num_heads,
        "vocab_size": _vocabulary(row, twin, assumed),
        "gated": True if row.gated is None else row.gated,
        "intermediate_size": row.feed_forward_size,
    }
    fields |= _attention(row, twin, assumed)
    fields |= _style(row)
    fields |= _experts(row, twin, assumed)
    if twin is not None:
        given = {name: getattr(twin, name) for name in _FILLED_BY_NAME}
        fields = {**{k: v for k, v in given.items() if v is not None}, **fields}
        assumed["model"] = f"what the row leaves open is that of {twin.name}"
    try:
        return Model(**{name: value for name, value in fields.items() if value is not None})
    except ValueError as error:
        raise RefusedError("architecture: dimensions that do not agree", words_of(error)) from None


@cache
def named_models() -> Mapping[str, Mapping[str, Any]]:
    """Row fields of models that tables name without dimensions, with a `source`."""
    text = package_files("meshwright").joinpath("catalog/named_models.yaml").read_text("utf-8")
    return parse_yaml(text, "named_models.yaml")


def _named(row: Row, assumed: dict[str, str]) -> Row:
    """A row without any dimension takes those of the model that it names."""
    if row.num_layers or row.hidden_size or row.num_heads or row.num_experts:
        return row
    for name, fields in named_models().items():
        if _squeezed(name) == _squeezed(row.model):
            assumed["model"] = f"no dimensions stated: {fields['source']}"
            return replace(row, **{key: value for key, value in fields.items() if key != "source"})
    return row


def _require_described(row: Row) -> None:
    text = f"{row.attention} {row.model}".lower()
    for pattern, reason in _UNSUPPORTED.items():
        if re.search(pattern, text):
            raise RefusedError(reason, f"{row.model}: {row.attention}")
    if re.search(r"\bvlm\b|vision|multimodal", row.notes.lower()):
        raise RefusedError("architecture: images beside text", row.model)
    missing = [
        name
        for name, value in (
            ("layers", row.num_layers),
            ("hidden", row.hidden_size),
            ("heads", row.num_heads),
        )
        if not value
    ]
    if not row.feed_forward_size and not row.expert_feed_forward_size:
        missing.append("ffn")
    if missing:
        raise RefusedError("architecture: dimensions not stated", f"{row.model} lacks {', '.join(missing)}")


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", re.sub(r"\(.*?\)", "", name.lower()))


def _catalogue_twin(row: Row) -> Model | None:
    """The catalogue's model of the same name and width, whatever number of layers the row runs."""
    wanted = _squeezed(row.model)
    for name in catalogue_models():
        if _squeezed(name) == wanted:
            twin = model_named(name)
            same = twin.hidden_size == row.hidden_size and twin.num_experts == (row.num_experts or 0)
            return twin if same else None
    return None


def _vocabulary(row: Row, twin: Model | None, assumed: dict[str, str]) -> int:
    if row.vocab_size:
        return row.vocab_size
    if twin is not None:
        return twin.vocab_size
    assumed["vocab_size"] = f"{VOCABULARY}: not stated"
    return VOCABULARY


def _attention(row: Row, twin: Model | None, assumed: dict[str, str]) -> dict[str, Any]:
    text = row.attention.lower()
    if "mla" in text:
        return _latent_attention(text, twin, assumed)
    found: dict[str, Any] = {"head_dim": row.head_dim}
    window = re.search(r"swa\D{0,3}(\d+)", text)
    if window:
        found["sliding_window"] = int(window[1])
        if "alternat" in text:
            found["sliding_window_layers"] = tuple(range(0, row.num_layers or 0, 2))
    return found


def _latent_attention(text: str, twin: Model | None, assumed: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"head_dim": None, "num_key_value_heads": None}
    latent = re.search(r"kv_lora\D{0,3}(\d+)", text)
    found["kv_lora_rank"] = int(latent[1]) if latent else (twin.kv_lora_rank if twin else 512)
    query = re.search(r"(?<!no )q_lora\D{0,3}(\d+)", text)
    if query:
        found["q_lora_rank"] = int(query[1])
    elif "no q_lora" in text or twin is None:
        found["q_lora_rank"] = None
    else:
        found["q_lora_rank"] = twin.q_lora_rank
    widths = re.search(r"qk\s*(\d+)\s*\+\s*(\d+)\s*v\s*(\d+)", text)
    if widths:
        found |= dict(zip(LATENT_DEFAULTS, map(int, widths.groups()), strict=True))
    elif twin is None:
        found |= LATENT_DEFAULTS
        assumed["head widths"] = "128 + 64 for queries and keys, 128 for values: those of DeepSeek-V3"
    return found


def _style(row: Row) -> dict[str, Any]:
    """Norm, positions and tied embeddings: GPT-3's for plain multi-head attention without a gate or rotary
    positions, else Llama's."""
    grouped = (row.num_kv_heads or row.num_heads) != row.num_heads
    rotary = "rope" in row.attention.lower()
    if row.gated is False and not grouped and not row.num_experts and not rotary:
        return {
            "norm": "layernorm",
            "position": "learned",
            "max_position_embeddings": row.sequence_length or 2048,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
        }
    return {"hidden_act": "relu"} if row.gated is False else {}


def _experts(row: Row, twin: Model | None, assumed: dict[str, str]) -> dict[str, Any]:
    if not row.num_experts:
        return {}
    if not row.expert_feed_forward_size:
        raise RefusedError("architecture: dimensions not stated", f"{row.model} lacks moe_ffn")
    chosen = row.experts_per_token
    if chosen is None:
        chosen = min(2 if row.num_experts <= 16 else 8, row.num_experts)
        assumed["num_experts_per_tok"] = f"{chosen}: not stated"
    found: dict[str, Any] = {
        "num_experts": row.num_experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": row.expert_feed_forward_size,
        "first_k_dense_replace": _first_dense(row, twin),
        "n_shared_experts": row.num_shared_experts or 0,
    }
    if row.shared_feed_forward_size:
        found["shared_expert_intermediate_size"] = row.shared_feed_forward_size
    if twin is not None:
        found["router"] = twin.router
    return found


def _first_dense(row: Row, twin: Model | None) -> int:
    if row.num_first_dense_layers is not None:
        return row.num_first_dense_layers
    return twin.first_k_dense_replace if twin is not None else 0
