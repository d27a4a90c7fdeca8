"""Hugging Face `config.json` read as a Model: one function per family, and the catalogue of known models.

What a family's modules fix (which projections have a bias, which layers have experts, what the router does)
is what the model classes of transformers 5.23 build and compute. A key that a config leaves out has the
default of the family's configuration class there, except the sizes that make the model what it is
(layers, widths, heads, vocabulary, experts): those must be given.

`num_nextn_predict_layers` is read over: the model classes build no multi-token-prediction layer, so none is
counted. Keys that speak of dropout, initial values, caching, quantised storage or stretched positions are
read over too; keys that begin with `_` are notes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from meshwright.config_keys import (
    EXPERT_COUNTS,
    Fields,
    balanced_router,
    biased_heads,
    corrected_router,
    deepseek_loss,
    every_family,
    expert_groups,
    experts,
    flag,
    heads,
    latent_attention,
    max_window_layers,
    needed,
    only,
    shared_and_first_dense,
    sparse_layers,
    window_if_used,
    windows,
)
from meshwright.errors import InputError, shown
from meshwright.files import decode, parse_yaml, read_yaml
from meshwright.model import Model

_SPELLINGS = {  # our field: the keys of a config that it comes from, for messages that name what was written
    "num_experts": EXPERT_COUNTS,
    "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "attention_bias": ("attention_bias", "qkv_bias"),
    "attention_output_bias": ("attention_bias",),
    "norm_eps": ("rms_norm_eps",),
    "router.normalize": ("norm_topk_prob",),
    "router.scaling_factor": ("routed_scaling_factor",),
    "router.num_groups": ("n_group",),
    "router.num_limited_groups": ("topk_group",),
    "router.aux_loss": ("router_aux_loss_coef", "aux_loss_alpha"),
}


def model_from_config(config: Mapping[str, Any], name: str = "inline") -> Model:
    """The Model that a Hugging Face `config.json` describes.

    Raises InputError for a family that is not read, for a value of a wrong type or out of bounds, and for a
    key whose value asks for an architecture that Model does not describe.
    """
    keys = {key: value for key, value in config.items() if not key.startswith("_")}
    model_type = _model_type(keys)
    known = _DEFAULTS.get(model_type, {}) | keys
    fields = {"name": name, **every_family(known), **_FAMILIES[model_type](known)}
    try:
        return decode(Model, fields, "model")
    except InputError as error:
        inner = error.key.removeprefix("model.")
        spellings = _SPELLINGS.get(inner, (inner,))
        spelled = next((key for key in spellings if key in keys), spellings[0])
        raise InputError(f"model.{spelled}", error.value, error.rule, error.nearest) from None


def _model_type(c: Fields) -> str:
    model_type, architectures = c.get("model_type"), c.get("architectures")
    if model_type is None and architectures is not None:
        first = (
            architectures[0] if isinstance(architectures, list | tuple) and architectures else architectures
        )
        if not isinstance(first, str) or first not in _ARCHITECTURES:
            raise InputError(
                "model.architectures", first, "no family of this name is read", list(_ARCHITECTURES)
            )
        return _ARCHITECTURES[first]
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        close = get_close_matches(model_type[:64], _FAMILIES, n=3) if isinstance(model_type, str) else []
        rule = "no family of this name is read; give the fields of the model instead"
        raise InputError("model.model_type", model_type, rule, list(dict.fromkeys([*close, *_FAMILIES])))
    return model_type


# The families.


def _llama(c: Fields) -> Fields:
    width = needed(c, "intermediate_size")
    return {**biased_heads(c, None), "intermediate_size": width, "mlp_bias": c.get("mlp_bias", False)}


def _mistral(c: Fields) -> Fields:
    window = windows(c, 4096, lambda layer: True)
    return {**heads(c, 8), "intermediate_size": needed(c, "intermediate_size"), **window}


def _qwen2(c: Fields) -> Fields:
    """Query, key and value have a bias whatever the config says; deep layers may have a window."""
    window = window_if_used(c, lambda layer: layer >= max_window_layers(c))
    return {**heads(c, 32, bias=True), "intermediate_size": needed(c, "intermediate_size"), **window}


def _qwen3(c: Fields) -> Fields:
    window = window_if_used(c, lambda layer: layer >= max_window_layers(c))
    heads = biased_heads({"head_dim": 128} | c, 32)
    return {**heads, "intermediate_size": needed(c, "intermediate_size"), **window, "qk_norm": "head"}


def _mixtral(c: Fields) -> Fields:
    """Mixtral of experts (arXiv:2401.04088 §2.1): weights of the chosen two add up to one."""
    return {
        **heads(c, 8),
        **experts(c, "num_local_experts", "intermediate_size"),
        **windows(c, None, lambda layer: True),
        "router": balanced_router(c, True),
    }


def _qwen2_moe(c: Fields) -> Fields:
    """A shared expert behind a gate of its own; every other layer below `max_window_layers` may slide."""
    return {
        **heads(c, 16, bias=c.get("qkv_bias", True)),
        **experts(c, "num_experts", may_be_none=True),
        **sparse_layers(c),
        **window_if_used(c, lambda layer: layer % 2 == 0 and layer < max_window_layers(c)),
        "shared_expert_intermediate_size": needed(c, "shared_expert_intermediate_size"),
        "shared_expert_gate": True,
        "router": balanced_router(c, c.get("norm_topk_prob", False)),
    }


def _qwen3_moe(c: Fields) -> Fields:
    return {
        **biased_heads(c, 4),
        **experts(c, "num_experts", may_be_none=True),
        **sparse_layers(c),
        **window_if_used(c, lambda layer: True),
        "qk_norm": "head",
        "router": balanced_router(c, c.get("norm_topk_prob", False)),
    }


def _olmoe(c: Fields) -> Fields:
    """OLMoE (arXiv:2409.02060): queries and keys are normalised over all heads together."""
    only(c, "clip_qkv", None)
    head_dim, num_heads, hidden = c.get("head_dim"), c.get("num_attention_heads"), c.get("hidden_size")
    whole = isinstance(head_dim, int) and isinstance(num_heads, int) and head_dim * num_heads == hidden
    if head_dim is not None and not whole:
        raise InputError("model.head_dim", head_dim, "the heads of this family make up hidden_size", ["null"])
    return {
        **biased_heads(c, None),
        **experts(c, "num_experts", "intermediate_size"),
        "qk_norm": "full",
        "router": balanced_router(c, c.get("norm_topk_prob", False), 0.01),
    }


def _gpt_oss(c: Fields) -> Fields:
    """gpt-oss (arXiv:2508.10925 §2): biases everywhere, a learned sink per head, every other layer slides.

    A softmax over the chosen logits equals a softmax over all whose chosen weights are then normalised.
    The experts' clamped SwiGLU has the shapes and costs of a plain one and is described as such.
    """
    return {
        **biased_heads({"head_dim": 64} | c, 8, default=True),
        **experts(c, "num_local_experts", "intermediate_size"),
        **windows(c, 128, lambda layer: layer % 2 == 0),
        "attention_sinks": True,
        "expert_bias": True,
        "router": balanced_router(c, True) | {"bias": True},
    }


def _deepseek_v2(c: Fields) -> Fields:
    """DeepSeek-V2 (arXiv:2405.04434). Its own code either normalises or scales the weights, and
    transformers always scales them: a config that asks to normalise has no one meaning."""
    for key, *allowed in (("moe_layer_freq", 1), ("scoring_func", "softmax"), ("norm_topk_prob", False)):
        only(c, key, *allowed)
    only(c, "topk_method", "greedy", "group_limited_greedy")
    only(c, "mlp_bias", False)
    grouped = c.get("topk_method") == "group_limited_greedy"
    router = {"type": "softmax", "normalize": False, "scaling_factor": c.get("routed_scaling_factor", 1.0)}
    return {
        **latent_attention(c),
        **experts(c, "n_routed_experts"),
        **shared_and_first_dense(c, shared=2, first=0),
        "router": router | deepseek_loss(c) | (expert_groups(c, 1, 1) if grouped else {}),
    }


def _deepseek_v3(c: Fields) -> Fields:
    only(c, "moe_layer_freq", 1)
    return {
        **latent_attention(c),
        **experts(c, "n_routed_experts"),
        **shared_and_first_dense(c, shared=1, first=3),
        "router": corrected_router(c, scaling=2.5, groups=8, kept=4) | deepseek_loss(c),
    }


def _glm4_moe(c: Fields) -> Fields:
    """GLM-4.5 (arXiv:2508.06471 §2.1): the router of DeepSeek-V3 over grouped-query attention."""
    return {
        **heads(c, 8, bias=c.get("attention_bias", False)),
        **experts(c, "n_routed_experts"),
        **shared_and_first_dense(c, shared=1, first=1),
        "qk_norm": "head" if flag(c, "use_qk_norm", False) else "none",
        "router": corrected_router(c, scaling=1.0, groups=1, kept=1),
    }


_FAMILIES: dict[str, Callable[[Fields], Fields]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
_ARCHITECTURES = {
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "GptOssForCausalLM": "gpt_oss",
    "Glm4MoeForCausalLM": "glm4_moe",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_DEFAULTS: dict[str, Fields] = {  # of keys that every family reads, where they are not Model's own
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    "olmoe": {"rms_norm_eps": 1e-5},
    "gpt_oss": {"rms_norm_eps": 1e-5, "rope_theta": 150_000.0},
    "glm4_moe": {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
}


# The catalogue, and the `model` of a deployment file.

_REPOSITORIES = {  # names of repositories on huggingface.co, where they are not the catalogue's
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
    "mixtral-8x22b-v0.1": "mixtral-8x22b",
    "olmoe-1b-7b-0924": "olmoe-1b-7b",
    "kimi-k2-base": "kimi-k2",
    "kimi-k2-instruct": "kimi-k2",
    "llama-2-7b-hf": "llama-2-7b",
    "llama-2-13b-hf": "llama-2-13b",
    "llama-2-70b-hf": "llama-2-70b",
    "meta-llama-3-8b": "llama-3-8b",
    "meta-llama-3-70b": "llama-3-70b",
    "meta-llama-3.1-8b": "llama-3.1-8b",
    "meta-llama-3.1-70b": "llama-3.1-70b",
    "meta-llama-3.1-405b": "llama-3.1-405b",
    "mistral-7b-v0.1": "mistral-7b",
}


@cache
def catalogue_models() -> tuple[str, ...]:
    """Names of the catalogue's models, sorted."""
    names = (entry.name for entry in package_files("meshwright").joinpath("catalog/models").iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def model_named(name: str) -> Model:
    """A model of the catalogue by name, or by its repository on huggingface.co with or without the owner.

    Upper and lower case are the same. Raises InputError with the nearest names.
    """
    wanted = name.strip().lower().rpartition("/")[2]
    wanted = _REPOSITORIES.get(wanted, wanted)
    if wanted not in catalogue_models():
        near = get_close_matches(wanted[:64], catalogue_models(), n=3, cutoff=0.4) or list(catalogue_models())
        rule = "no model of the catalogue has this name; a file is given as {config: path/to/config.json}"
        raise InputError("model", name, rule, near)
    return _catalogue_model(wanted)


@cache
def _catalogue_model(name: str) -> Model:
    text = package_files("meshwright").joinpath(f"catalog/models/{name}.json").read_text("utf-8")
    return model_from_config(parse_yaml(text, f"{name}.json"), name)


def read_model(value: object, folder: Path) -> Model:
    """The `model` of a deployment file that lies in `folder`.

    A text is a name of the catalogue; `{config: path}` is a `config.json`, or the directory that has one,
    from `folder` on; a mapping with `model_type` or `architectures` is such a file's content; any other
    mapping holds the fields of Model. Raises InputError with the path of what is wrong.
    """
    match value:
        case Model():
            return value
        case str():
            return model_named(value)
        case Mapping() if "config" in value:
            return _model_from_file(value, folder)
        case Mapping() if "model_type" in value or "architectures" in value:
            return model_from_config(value)
        case Mapping():
            return decode(Model, value, "model")
    forms = ["qwen3-30b-a3b", "{config: path/to/config.json}", "{num_hidden_layers: …}"]
    raise InputError("model", value, "a name of the catalogue or a mapping", forms)


def _model_from_file(value: Mapping[str, Any], folder: Path) -> Model:
    for key in value:
        if key != "config":
            raise InputError(f"model.{key}", value[key], "nothing stands beside config", ["config"])
    given = value["config"]
    if not isinstance(given, str) or not given.strip():
        raise InputError("model.config", given, "the path of a config.json", ["path/to/config.json"])
    path = folder / given
    if "\0" not in given and path.is_dir():
        path = path / "config.json"
    stem = path.stem
    try:
        content = read_yaml(path)
    except InputError as error:
        near = [os.path.relpath(str(name), folder) for name in error.nearest]
        rule = f"{error.rule} ({error.key}: {shown(error.value)})"
        raise InputError("model.config", given, rule, near) from None
    return model_from_config(content, path.absolute().parent.name if stem == "config" else stem)
