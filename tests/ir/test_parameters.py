"""The parameters of a model: published formulas, and the parts that add up to the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.engines import engine_named
from meshwright.families import read_model
from meshwright.ir.blocks import embedding_block, head_block, layer_block
from meshwright.ir.dense import Shape
from meshwright.ir.parameters import (
    PARTS,
    count_parameters,
    embedding_parameters,
    head_parameters,
    layer_parameters,
    parameters,
)
from meshwright.model import Model

CATALOGUE = sorted(
    path.stem for path in (Path(__file__).parents[2] / "src/meshwright/catalog/models").glob("*.json")
)
GPT = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "intermediate_size": 1024,
    "gated": False,
    "norm": "layernorm",
    "position": "learned",
    "max_position_embeddings": 128,
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}


def catalogued(name: str) -> Model:
    read = read_model(name, Path())
    return read if isinstance(read, Model) else Model.model_validate(read)


# --- formulas from papers ---


@pytest.mark.parametrize("sizes", [(3, 256, 1000, 128), (96, 12288, 51200, 2048)])
def test_a_gpt_has_the_parameters_of_sc21_equation_2(sizes: tuple[int, int, int, int]) -> None:
    """Narayanan et al., SC21, arXiv:2104.04473 §5.1: P = 12lh²(1 + 13/(12h) + (V + s)/(12lh)); it leaves out
    the final norm, 2h. Its GPT-3 of 96 layers has 175 B."""
    layers, hidden, vocabulary, positions = sizes
    changes = {"num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocabulary}
    changes |= {"intermediate_size": 4 * hidden, "max_position_embeddings": positions}
    model = Model.model_validate({**GPT, **changes})
    formula = 12 * layers * hidden**2 + 13 * layers * hidden + (vocabulary + positions) * hidden
    assert count_parameters(model).total == formula + 2 * hidden
    if layers == 96:
        assert round(formula / 1e9) == 175


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46.7, 12.9),  # arXiv:2401.04088 §1: 47 B, 13 B
        ("deepseek-v3", 671.0, 37.5),  # arXiv:2412.19437 abstract: 671 B and 37 B, without its MTP module
        ("deepseek-v2", 235.7, 21.4),  # arXiv:2405.04434 abstract: 236 B, 21 B
        ("qwen3-235b-a22b", 235.1, 22.2),  # arXiv:2505.09388 Table 2: 235 B, 22 B
        ("gpt-oss-20b", 20.9, 4.2),  # arXiv:2508.10925 Table 1: 20.9 B, 3.6 B without the embedding
        ("llama-3.1-405b", 405.9, 405.9),  # arXiv:2407.21783 Table 3
    ],
)
def test_published_totals(name: str, total: float, active: float) -> None:
    counts = count_parameters(catalogued(name))
    assert counts.total / 1e9 == pytest.approx(total, rel=2e-3)
    assert counts.active / 1e9 == pytest.approx(active, rel=1e-2)


def test_latent_attention_by_hand() -> None:
    """DeepSeek-V2, arXiv:2405.04434 §2.1: W^DQ, W^UQ and W^QR, W^DKV and W^KR, W^UK and W^UV, W^O."""
    heads, hidden, q_rank, kv_rank, nope, rope, value = 128, 7168, 1536, 512, 128, 64, 128
    by_hand = hidden * q_rank + q_rank * heads * (nope + rope)
    by_hand += hidden * (kv_rank + rope) + kv_rank * heads * (nope + value) + heads * value * hidden
    attention = [p for p in layer_parameters(catalogued("deepseek-v3"), 0) if p.part == "attention"]
    assert sum(p.numel for p in attention) == by_hand + q_rank + kv_rank  # and the two low-rank norms


def test_a_gated_expert_has_three_matrices_and_an_ungated_one_two() -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    for gated, matrices in ((True, 3), (False, 2)):
        model = Model.model_validate({**GPT, **experts, "gated": gated})
        assert count_parameters(model).by_part["experts"] == 3 * 4 * matrices * 256 * 96


# --- the parts and the whole ---


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_counts_are_the_sum_over_the_parameters(name: str) -> None:
    model = catalogued(name)
    found = list(parameters(model))
    counts = count_parameters(model)
    assert len({p.name for p in found}) == len(found)
    assert counts.total == sum(p.numel for p in found) == sum(counts.by_part.values())
    assert list(counts.by_part) == list(PARTS)
    routed = sum(p.numel for p in found if p.is_expert)
    unchosen = routed * (model.num_experts - model.num_experts_per_tok) // max(1, model.num_experts)
    assert counts.active == counts.total - unchosen


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_parameter_belongs_to_an_op_and_every_op_names_real_ones(name: str) -> None:
    """ZeRO-3 gathers what the ops of a block name: one left out would never be gathered."""
    model = catalogued(name)
    shape = Shape(1, 4096, 2, engine_named("megatron"), True, "alltoall", ep=2, tp=2)
    ends = [
        (embedding_block(model, shape), embedding_parameters(model)),
        (head_block(model, shape), head_parameters(model)),
    ]
    layers = [
        (layer_block(model, n, shape), layer_parameters(model, n)) for n in range(model.num_hidden_layers)
    ]
    for block, held in [*ends, *layers]:
        named = {param for op in block.ops for param in op.params}
        extra = {"embedding.weight"} if block.name == "head" and model.tie_word_embeddings else set()
        assert named == {p.name for p in held} | extra


def test_learned_positions_sinks_and_shared_gates_are_in_the_graph() -> None:
    shape = Shape(1, 64, 2, engine_named("native"), False, "alltoall")
    model = Model.model_validate({**GPT, "attention_sinks": True})
    assert "positions.weight" in embedding_block(model, shape).ops[-1].params
    assert any("layers.0.attention.sinks" in op.params for op in layer_block(model, 0, shape).ops)


# --- what sequence parallelism leaves partial ---


def partial_names(model: Model, layer: int = 0) -> set[str]:
    prefix = f"layers.{layer}."
    return {p.name.removeprefix(prefix) for p in layer_parameters(model, layer) if p.partial_over_tp}


def test_norms_router_and_output_biases_are_partial_sums_over_tp() -> None:
    """Megatron-LM marks these `sequence_parallel`: norms, the router, row-parallel biases, the gate of the
    shared experts, latent down-projections (and torchtitan#2387 is the bug of forgetting the router)."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_shared_experts": 1}
    biased = {"shared_expert_gate": True, "router": {"bias": True}, "norm": "rmsnorm", "qk_norm": "head"}
    assert partial_names(Model.model_validate({**GPT, **moe, **biased})) == {
        "attention_norm.weight",
        "attention.o.bias",
        "attention.q_norm.weight",
        "attention.k_norm.weight",
        "mlp_norm.weight",
        "moe.router.weight",
        "moe.router.bias",
        "moe.shared_gate.weight",
    }
    assert partial_names(catalogued("deepseek-v3"), 3) == {
        "attention_norm.weight",
        "attention.q_a.weight",
        "attention.q_a_norm.weight",
        "attention.kv_a.weight",
        "attention.kv_a_norm.weight",
        "mlp_norm.weight",
        "moe.router.weight",
    }


@pytest.mark.parametrize("name", CATALOGUE)
def test_no_gradient_is_both_divided_and_partial_over_tp(name: str) -> None:
    for param in parameters(catalogued(name)):
        assert len(param.shape) == len(param.shard)
        assert not (param.partial_over_tp and "tp" in param.shard)
        assert param.partial_over_tp or not param.shared_by_heads
        assert set(param.shard) <= ({"ep", "etp", None} if param.is_expert else {"tp", None})
        if not param.is_expert and "tp" not in param.shard and param.part != "embedding":
            assert param.partial_over_tp, f"{param.name}: whole on each rank of tp, so its gradient is not"


# --- any model ---


@st.composite
def models(draw: st.DrawFn) -> Model:
    heads = draw(st.sampled_from([2, 4, 8]))
    fields: dict[str, Any] = {
        "num_hidden_layers": draw(st.integers(1, 5)),
        "hidden_size": heads * draw(st.sampled_from([4, 8])),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2])),
        "vocab_size": draw(st.integers(3, 300)),
        "intermediate_size": draw(st.integers(1, 64)),
        "gated": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "qk_norm": draw(st.sampled_from(["none", "head", "full"])),
        "attention_bias": draw(st.booleans()),
        "attention_sinks": draw(st.booleans()),
    }
    if draw(st.booleans()):
        fields |= {
            "num_experts": draw(st.sampled_from([2, 4, 8])),
            "num_experts_per_tok": draw(st.integers(1, 2)),
            "moe_intermediate_size": draw(st.integers(1, 64)),
            "first_k_dense_replace": draw(st.integers(0, fields["num_hidden_layers"])),
            "expert_bias": draw(st.booleans()),
            "n_shared_experts": draw(st.integers(0, 2)),
        }
    if draw(st.booleans()):
        latent = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
        fields |= {**latent, "q_lora_rank": draw(st.sampled_from([None, 10])), "num_key_value_heads": heads}
    return Model.model_validate(fields)


@settings(max_examples=80, deadline=None)
@given(models())
def test_counts_hold_for_any_model(model: Model) -> None:
    found = list(parameters(model))
    counts = count_parameters(model)
    assert counts.total == sum(p.numel for p in found)
    assert counts.active <= counts.total
    assert len({p.name for p in found}) == len(found)
    for layer in range(model.num_hidden_layers):
        shape = Shape(2, 64, 2, engine_named("native"), False, "alltoall")
        named = {name for op in layer_block(model, layer, shape).ops for name in op.params}
        assert named == {p.name for p in layer_parameters(model, layer)}
