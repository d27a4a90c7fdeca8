"""The model of a row: from its dimensions, from the catalogue where it leaves some open, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from tests.validate.run_rows import EXPERTS, carried, row_of

from meshwright.families import model_named
from meshwright.ir.parameters import count_parameters
from meshwright.model import Model
from meshwright.validate.models import model_of, named_models
from meshwright.validate.refusal import RefusedError


def model(**given: Any) -> Model:
    return model_of(row_of(**given), {})


def test_dimensions_are_the_row_s() -> None:
    made = model()
    assert (made.num_hidden_layers, made.hidden_size, made.kv_heads, made.head_dim) == (8, 1024, 4, 64)
    assert (made.norm, made.position, made.tie_word_embeddings, made.gated) == (
        "rmsnorm",
        "rope",
        False,
        True,
    )


def test_blank_key_value_heads_are_the_heads() -> None:
    assert model(num_kv_heads=None).kv_heads == 16


def test_plain_attention_without_a_gate_is_gpt() -> None:
    """MPT-7B by its published parameter count, which includes the learned positions of 2,048 tokens."""
    row = carried()["LF-011"]
    made = model_of(row, {})
    assert (made.norm, made.position, made.tie_word_embeddings) == ("layernorm", "learned", True)
    stated = int(row.notes.split("N=")[1])
    assert count_parameters(made).total == pytest.approx(stated, rel=1e-3)


def test_grouped_attention_without_a_gate_is_not_gpt() -> None:
    made = model(gated=False)
    assert (made.norm, made.position, made.hidden_act) == ("rmsnorm", "rope", "relu")


@pytest.mark.parametrize(
    ("text", "rank", "query", "widths"),
    [
        ("MLA q_lora1536 kv_lora512", 512, 1536, (128, 64, 128)),
        ("MLA (no q_lora) kv_lora512", 512, None, (128, 64, 128)),
        ("MLA q_lora768 kv_lora256 qk64+32 v96", 256, 768, (64, 32, 96)),
        ("MLA", 512, None, (128, 64, 128)),
    ],
)
def test_latent_attention_is_read(text: str, rank: int, query: int | None, widths: tuple[int, ...]) -> None:
    assumed: dict[str, str] = {}
    made = model_of(row_of(attention=text, num_kv_heads=None, head_dim=None), assumed)
    assert (made.kv_lora_rank, made.q_lora_rank) == (rank, query)
    assert (made.qk_nope_head_dim, made.qk_rope_head_dim, made.v_head_dim) == widths
    assert ("head widths" in assumed) == ("qk" not in text)


def test_the_catalogue_fills_what_a_row_leaves_open() -> None:
    assumed: dict[str, str] = {}
    made, twin = model_of(carried()["MB-001"], assumed), model_named("deepseek-v3")
    assert (made.qk_nope_head_dim, made.v_head_dim, made.router) == (128, 128, twin.router)
    assert "deepseek-v3" in assumed["model"]
    assert count_parameters(made).total == count_parameters(twin).total


def test_a_cut_model_keeps_its_layers_and_its_twin_s_style() -> None:
    row = row_of(
        model="DeepSeek-V3 (4 layers)",
        num_layers=4,
        hidden_size=7168,
        feed_forward_size=18432,
        num_heads=128,
        num_kv_heads=None,
        head_dim=None,
        attention="MLA q_lora1536 kv_lora512",
        num_experts=256,
        experts_per_token=8,
        expert_feed_forward_size=2048,
        num_shared_experts=1,
        num_first_dense_layers=1,
    )
    made = model_of(row, {})
    assert (made.num_hidden_layers, made.num_dense_layers, made.router.type) == (4, 1, "sigmoid")


def test_a_name_with_other_dimensions_is_another_model() -> None:
    assumed: dict[str, str] = {}
    model_of(row_of(model="Llama-3-8B"), assumed)
    assert "model" not in assumed


def test_experts_a_shared_one_and_the_first_dense_layers() -> None:
    made = model(**EXPERTS, num_shared_experts=2, shared_feed_forward_size=1024)
    assert (made.num_experts, made.num_experts_per_tok, made.shared_width) == (16, 2, 1024)
    assert made.num_dense_layers == 0
    dense_first = {**EXPERTS, "feed_forward_size": 4096, "num_first_dense_layers": 1}
    assert model(**dense_first).num_dense_layers == 1


def test_experts_per_token_left_open_are_assumed() -> None:
    for experts, chosen in ((8, 2), (64, 8)):
        assumed: dict[str, str] = {}
        given = {**EXPERTS, "num_experts": experts, "experts_per_token": None}
        assert model_of(row_of(**given), assumed).num_experts_per_tok == chosen
        assert "num_experts_per_tok" in assumed


def test_a_window_in_every_second_layer() -> None:
    made = model(attention="GQA alternating SWA128")
    assert made.sliding_window == 128
    assert made.sliding_window_layers == (0, 2, 4, 6)
    assert model(attention="GQA SWA 4096").sliding_window_layers == ()


def test_a_vocabulary_left_open_is_assumed() -> None:
    assumed: dict[str, str] = {}
    assert model_of(row_of(vocab_size=None), assumed).vocab_size == 128256
    assert "not stated" in assumed["vocab_size"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"attention": "hybrid Mamba2/attn/MoE"}, "state-space"),
        ({"attention": "hybrid Mamba2/attn/LatentMoE(1024)"}, "state-space"),
        ({"attention": "hybrid"}, "state-space"),
        ({"attention": "DSv4 sparse/compressed"}, "sparse"),
        ({"attention": "3:1 gated DeltaNet : gated attn"}, "linear attention"),
        ({"attention": "GQA LatentMoE(512)"}, "latent space"),
        ({"notes": "VLM workload: not a plain LLM"}, "images"),
        ({"num_layers": None}, "not stated"),
        ({"feed_forward_size": None}, "not stated"),
        ({"num_experts": 8, "experts_per_token": 2}, "not stated"),
        ({"num_heads": 15}, "do not agree"),
        ({"num_layers": 10**9}, "do not agree"),
    ],
)
def test_what_the_graph_does_not_describe_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedError, match=f"architecture: .*{reason}"):
        model(**given)


def test_an_image_in_the_notes_is_no_image_model() -> None:
    assert model(notes="MBS and VPP not stated in image").num_hidden_layers == 8


def test_models_that_tables_name_without_dimensions() -> None:
    blank = dict.fromkeys(
        ("num_layers", "hidden_size", "feed_forward_size", "num_heads", "num_kv_heads", "head_dim"), None
    )
    assumed: dict[str, str] = {}
    made = model_of(row_of(**blank, model="Nemotron-340B", gated=None, attention=""), assumed)
    assert count_parameters(made).total == pytest.approx(340e9, rel=0.03)
    assert "nemotron.py" in assumed["model"]
    five = model_of(carried()["NEMO-019"], {})
    assert count_parameters(five).total == pytest.approx(5e9, rel=0.06)
    assert all(fields["source"] for fields in named_models().values())


def test_a_row_that_states_one_dimension_is_not_filled_by_name() -> None:
    with pytest.raises(RefusedError, match="not stated"):
        model(model="Nemotron-340B", num_heads=None, hidden_size=None)
