"""The model's fields: what follows from them, what is refused, and how the refusal reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.families import read_model
from meshwright.files import decode, json_schema
from meshwright.ir.parameters import count_parameters
from meshwright.model import MAX_LAYERS, Model, Router

DENSE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "intermediate_size": 256,
}
SPARSE: dict[str, Any] = {**DENSE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = {
    **DENSE,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}


def model(fields: dict[str, Any], **changes: Any) -> Model:
    return decode(Model, {**fields, **changes}, "model")


def test_what_is_not_said_follows() -> None:
    dense = model(DENSE)
    assert dense.kv_heads == 4
    assert dense.head_dim == dense.qk_head_dim == dense.value_head_dim == 16
    assert dense.hidden_act == "silu"
    assert model(DENSE, gated=False).hidden_act == "gelu"
    assert not dense.is_moe
    assert dense.num_dense_layers == 4
    assert model(DENSE, num_key_value_heads=None).kv_heads == 4
    assert model(DENSE, head_dim=24).head_dim == 24


def test_latent_attention_has_two_head_widths() -> None:
    latent = model(LATENT)
    assert latent.is_mla
    assert (latent.qk_head_dim, latent.value_head_dim) == (12, 12)
    assert latent.head_dim is None


def test_shared_experts_are_as_wide_as_routed_ones_unless_said() -> None:
    assert model(SPARSE).shared_width == 0
    assert model(SPARSE, n_shared_experts=3).shared_width == 96
    assert model(SPARSE, n_shared_experts=3, shared_expert_intermediate_size=50).shared_width == 50


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, set()),
        ({"first_k_dense_replace": 2}, {0, 1}),
        ({"first_k_dense_replace": 9}, {0, 1, 2, 3}),
        ({"mlp_only_layers": [3, 1]}, {1, 3}),
        ({"decoder_sparse_step": 2}, {0, 2}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1], "first_k_dense_replace": 1}, {0, 1, 2}),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], dense: set[int]) -> None:
    sparse = model(SPARSE, **changes)
    assert sparse.dense_layers == dense
    assert [sparse.is_moe_layer(layer) for layer in range(4)] == [layer not in dense for layer in range(4)]
    assert sparse.num_dense_layers == len(dense)
    assert sparse.is_moe == (len(dense) < 4)


def test_windows() -> None:
    assert [model(DENSE).window_of(layer) for layer in range(4)] == [None] * 4
    assert [model(DENSE, sliding_window=9).window_of(layer) for layer in range(4)] == [9] * 4
    some = model(DENSE, sliding_window=9, sliding_window_layers=[0, 2])
    assert [some.window_of(layer) for layer in range(4)] == [9, None, 9, None]


@pytest.mark.parametrize(
    ("key", "spellings"),
    [
        ("num_experts", ("num_local_experts", "n_routed_experts")),
        ("num_experts_per_tok", ("experts_per_token", "moe_topk", "top_k")),
        ("num_hidden_layers", ("n_layer", "num_layers")),
        ("norm_eps", ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")),
    ],
)
def test_spellings_of_families_are_taken(key: str, spellings: tuple[str, ...]) -> None:
    fields = {**SPARSE, "norm_eps": 1e-3}
    for spelling in spellings:
        renamed = {spelling if name == key else name: value for name, value in fields.items()}
        assert decode(Model, renamed, "model") == decode(Model, fields, "model")


def test_a_model_reads_back_from_what_it_prints() -> None:
    router = {"type": "sigmoid", "correction_bias": True, "num_groups": 4, "num_limited_groups": 2}
    sparse = model(SPARSE, mlp_only_layers=[0], sliding_window=4, sliding_window_layers=[1], router=router)
    assert sparse.is_moe  # what was worked out from the fields stays out of what is printed
    again = decode(Model, json.loads(sparse.model_dump_json()), "model")
    assert again == sparse
    assert hash(again) == hash(sparse)


def test_schema_is_valid_and_takes_a_model() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema(Model)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({**SPARSE, "router": {"type": "sigmoid"}}, schema)


BAD: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (DENSE, {"num_attention_heads": 6}, "model.num_attention_heads", "nearest: 2, 4, 8"),
    (DENSE, {"num_key_value_heads": 3}, "model.num_key_value_heads", "nearest: 1, 2, 4"),
    (DENSE, {"num_hidden_layers": 1e9}, "model.num_hidden_layers", f"at most {MAX_LAYERS:,}"),
    (DENSE, {"num_hidden_layers": 0}, "model.num_hidden_layers", "between 1"),
    (DENSE, {"hidden_size": True}, "model.hidden_size", "whole number"),
    (DENSE, {"hidden_size": -64}, "model.hidden_size", "between 1"),
    (DENSE, {"hidden_size": 64.5}, "model.hidden_size", "nearest: 64, 65"),
    (DENSE, {"hidden_size": "64"}, "model.hidden_size", "nearest: 64"),
    (DENSE, {"hidden_size": float("nan")}, "model.hidden_size", "whole number"),
    (DENSE, {"hidden_size": float("inf")}, "model.hidden_size", "whole number"),
    (DENSE, {"vocab_size": 10**300}, "model.vocab_size", "2^53"),
    (
        DENSE,
        {"num_hidden_layers": MAX_LAYERS, "hidden_size": 2**24, "intermediate_size": 2**24},
        "model.num_hidden_layers",
        "1e+18",
    ),
    (DENSE, {"hiden_size": 64}, "model.hiden_size", "hidden_size"),
    (DENSE, {"tie_word_embeddings": "yes"}, "model.tie_word_embeddings", "boolean"),
    (DENSE, {"tie_word_embeddings": 1}, "model.tie_word_embeddings", "boolean"),
    (DENSE, {"norm": "batchnorm"}, "model.norm", "rmsnorm"),
    (DENSE, {"norm_eps": 0}, "model.norm_eps", "above 0"),
    (DENSE, {"rope_theta": -1}, "model.rope_theta", "nearest: 10000.0"),
    (DENSE, {"partial_rotary_factor": 1.5}, "model.partial_rotary_factor", "at most 1"),
    (DENSE, {"position": "learned"}, "model.max_position_embeddings", "learned"),
    (DENSE, {"sliding_window_layers": [1]}, "model.sliding_window", "need its width"),
    (DENSE, {"sliding_window": 8, "sliding_window_layers": [4]}, "model.sliding_window_layers", "0 to 3"),
    (DENSE, {"intermediate_size": None}, "model.intermediate_size", "dense model"),
    (SPARSE, {"num_experts_per_tok": 9}, "model.num_experts_per_tok", "nearest: 8"),
    (SPARSE, {"num_experts_per_tok": 0}, "model.num_experts_per_tok", "needs it"),
    (SPARSE, {"moe_intermediate_size": None}, "model.moe_intermediate_size", "needs it"),
    (SPARSE, {"num_experts": 10**6}, "model.num_experts", "65,536"),
    (SPARSE, {"mlp_only_layers": [4]}, "model.mlp_only_layers", "0 to 3"),
    (SPARSE, {"mlp_only_layers": [0], "intermediate_size": None}, "model.intermediate_size", "dense layers"),
    (SPARSE, {"mlp_only_layers": [-1]}, "model.mlp_only_layers[0]", "between 1"),
    (SPARSE, {"decoder_sparse_step": 0}, "model.decoder_sparse_step", "between 1"),
    (SPARSE, {"router": {"normalise": True}}, "model.router.normalise", "normalize"),
    (SPARSE, {"router": {"type": "hash"}}, "model.router.type", "softmax"),
    (SPARSE, {"router": {"capacity_factor": 0}}, "model.router.capacity_factor", "above 0"),
    (SPARSE, {"router": {"drop": "probs"}}, "model.router.drop", "capacity_factor"),
    (SPARSE, {"router": {"aux_loss": -0.1}}, "model.router.aux_loss", "negative"),
    (SPARSE, {"router": {"num_groups": 3}}, "model.router.num_groups", "nearest"),
    (SPARSE, {"router": {"num_groups": 2, "num_limited_groups": 3}}, "model.router.num_limited_groups", "2"),
    (SPARSE, {"router": {"num_groups": 8}}, "model.num_experts_per_tok", "nearest: 1"),
    (SPARSE, {"router": {"scaling_factor": float("nan")}}, "model.router.scaling_factor", "finite"),
    (
        SPARSE,
        {"num_experts_per_tok": 3, "router": {"type": "gshard_top2"}},
        "model.num_experts_per_tok",
        "two",
    ),
    (LATENT, {"v_head_dim": None}, "model.v_head_dim", "latent"),
]


@pytest.mark.parametrize(("fields", "changes", "key", "text"), BAD)
def test_bad_fields_are_refused_by_key(
    fields: dict[str, Any], changes: dict[str, Any], key: str, text: str
) -> None:
    with pytest.raises(InputError) as raised:
        read_model({**fields, **changes}, Path())
    assert raised.value.key == key
    assert text in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
def test_missing_fields_are_asked_for(key: str) -> None:
    with pytest.raises(InputError) as raised:
        read_model({name: value for name, value in DENSE.items() if name != key}, Path())
    assert raised.value.key == f"model.{key}"
    assert raised.value.value == "missing"


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, 1, 2, 3, 8, -1, 4096, 2**24, 2**53, "8"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "bias", "x"]), inner)
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([DENSE, SPARSE, LATENT]), st.dictionaries(st.sampled_from([*Model.model_fields]), junk)
)
def test_junk_is_refused_in_words(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    problem: InputError | None = None
    try:
        count_parameters(read_model({**fields, **changes}, Path()))
    except InputError as error:
        problem = error
    assert problem is None or problem.key.startswith("model.")


@given(
    st.integers(1, 40),
    st.integers(0, 45),
    st.integers(1, 5),
    st.frozensets(st.integers(0, 39), max_size=6),
)
def test_dense_and_expert_layers_add_up(layers: int, first: int, step: int, named: frozenset[int]) -> None:
    named = frozenset(layer for layer in named if layer < layers)
    sparse = model(
        SPARSE,
        num_hidden_layers=layers,
        first_k_dense_replace=first,
        decoder_sparse_step=step,
        mlp_only_layers=sorted(named),
    )
    experts = sum(sparse.is_moe_layer(layer) for layer in range(layers))
    assert experts + sparse.num_dense_layers == layers
    assert experts == sum(
        layer >= first and layer not in named and (layer + 1) % step == 0 for layer in range(layers)
    )


def test_router_defaults_are_a_dropless_softmax() -> None:
    router = Router()
    assert (router.type, router.normalize, router.capacity_factor, router.num_groups) == (
        "softmax",
        True,
        None,
        1,
    )
