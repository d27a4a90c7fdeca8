"""What each rank holds of a parameter: together the ranks hold everything, as often as they say."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.ir.parameters import Param, layer_parameters, parameters
from meshwright.ir.sharding import (
    copies,
    local_dim,
    local_numel,
    local_shape,
    local_slice,
    zero_degree,
)
from meshwright.layout import Layout
from meshwright.model import Model

FIELDS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "vocab_size": 131,  # a prime: its last shard is short
    "intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "expert_bias": True,
    "attention_bias": True,
    "attention_sinks": True,
    "qk_norm": "full",
}
MODEL = Model.model_validate(FIELDS)
LATENT = Model.model_validate(
    {
        **FIELDS,
        "num_key_value_heads": 8,
        "q_lora_rank": 10,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 3,
        "n_shared_experts": 1,
        "shared_expert_gate": True,
    }
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Every layout of up to 64 ranks a stage that this model's heads, experts and widths allow."""
    tp, cp, dp = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 4))
    ranks = tp * cp * dp
    etp = draw(st.sampled_from([n for n in (1, 2, 4, 8) if ranks % n == 0]))
    ep = draw(st.sampled_from([n for n in (1, 2, 4, 8) if ranks % (n * etp) == 0]))
    return Layout(tp=tp, cp=cp, dp=dp, pp=draw(st.integers(1, 2)), ep=ep, etp=etp)


def times_held(param: Param, layout: Layout, ranks: range) -> Any:
    """How many of the ranks hold each element."""
    held = np.zeros(param.shape, dtype=int)
    for rank in ranks:
        held[tuple(slice(*pair) for pair in local_slice(param, layout, rank).ranges)] += 1
    return held


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), model=st.sampled_from([MODEL, LATENT]), stage=st.integers(0, 1))
def test_a_stage_holds_each_element_as_often_as_it_says(layout: Layout, model: Model, stage: int) -> None:
    per_stage = layout.world_size // layout.pp
    first = (stage % layout.pp) * per_stage
    for param in parameters(model):
        held = times_held(param, layout, range(first, first + per_stage))
        assert (held == copies(param, layout)).all(), param.name


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), model=st.sampled_from([MODEL, LATENT]))
def test_slices_have_the_local_shape_but_for_a_padded_tail(layout: Layout, model: Model) -> None:
    for param in parameters(model):
        shape = local_shape(param, layout)
        assert local_numel(param, layout) == prod(shape)
        for rank in range(layout.world_size // layout.pp):
            cut = local_slice(param, layout, rank)
            assert cut.name == param.name
            if param.name in ("embedding.weight", "head.weight"):
                assert cut.shape[0] <= shape[0]
                assert cut.shape[1:] == shape[1:]
            else:
                assert cut.shape == shape


@settings(max_examples=60, deadline=None)
@given(layout=layouts())
def test_zero_divides_over_ranks_that_hold_the_same(layout: Layout) -> None:
    """ZeRO may divide only over replicas: dp·cp for dense parameters, edp for experts (arXiv:1910.02054 §3.1
    assumes replicas). Ranks that differ along that axis alone must hold equal slices."""
    for param in parameters(MODEL):
        view, axis = ("expert", "edp") if param.is_expert else ("dense", "dp_cp")
        groups = layout.groups(axis, view)  # type: ignore[arg-type]
        assert zero_degree(param, layout) == len(groups[0])
        assert copies(param, layout) % zero_degree(param, layout) == 0
        for group in groups:
            assert len({local_slice(param, layout, rank) for rank in group}) == 1


def test_more_ranks_than_key_value_heads_replicate_them() -> None:
    """Two heads over eight ranks of tp: ranks 0–3 hold the first whole, ranks 4–7 the second."""
    (keys,) = (p for p in layer_parameters(MODEL, 0) if p.name.endswith("attention.k.weight"))
    layout = Layout(tp=8)
    assert local_shape(keys, layout) == (3, 12)
    assert [local_slice(keys, layout, rank).ranges[0] for rank in range(8)] == [(0, 3)] * 4 + [(3, 6)] * 4
    assert copies(keys, layout) == 4


def test_queries_stand_with_the_key_value_head_that_they_use() -> None:
    """Grouped-query attention (arXiv:2305.13245 §2.2): query head i uses key-value head i // (heads / kv)."""
    params = {p.name.split(".")[-2]: p for p in layer_parameters(MODEL, 0) if p.name.endswith("weight")}
    width = FIELDS["head_dim"]
    for tp in (1, 2, 4, 8):
        for rank in range(tp):
            layout = Layout(tp=tp)
            (q_start, q_stop), _ = local_slice(params["q"], layout, rank).ranges
            (k_start, k_stop), _ = local_slice(params["k"], layout, rank).ranges
            for head in range(q_start // width, q_stop // width):
                assert k_start <= head // 4 * width < k_stop


def test_a_padded_dim_is_cut_as_torch_chunks_it() -> None:
    """DTensor's Shard follows torch.chunk: shards of ceil(n/r), the last short, perhaps some empty."""
    torch = pytest.importorskip("torch")
    for size in (10, 131):
        param = Param("table", "embedding", (size, 2), ("tp", None))
        layout = Layout(tp=8)
        mine = [local_slice(param, layout, rank).shape[0] for rank in range(8)]
        chunks = [len(part) for part in torch.arange(size).chunk(8)]
        assert mine == chunks + [0] * (8 - len(chunks))
        assert local_shape(param, layout) == (chunks[0], 2)


def test_vocabulary_ranges_are_megatrons_where_they_divide() -> None:
    utils = pytest.importorskip("megatron.core.tensor_parallel.utils")
    param = Param("table", "embedding", (1024, 2), ("tp", None))
    for rank in range(8):
        theirs = utils.VocabUtility.vocab_range_from_global_vocab_size(1024, rank, 8)
        assert local_slice(param, Layout(tp=8), rank).ranges[0] == theirs


def test_experts_lie_on_ep_and_etp_in_the_order_of_the_expert_view() -> None:
    """World 8, etp 2, ep 2, edp 2 (etp fastest): rank r holds half r % 2 of the experts r // 2 % 2."""
    (up,) = (p for p in layer_parameters(MODEL, 1) if p.name.endswith("experts.up"))
    layout = Layout(tp=2, dp=4, etp=2, ep=2)
    for rank in range(8):
        half, group = rank % 2, rank // 2 % 2
        expected = ((4 * group, 4 * group + 4), (8 * half, 8 * half + 8), (0, 12))
        assert local_slice(up, layout, rank).ranges == expected
    assert (copies(up, layout), zero_degree(up, layout)) == (2, 2)


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_local_dims_cover_the_whole_with_less_than_one_rank_of_padding(size: int, ranks: int) -> None:
    assert size <= local_dim(size, ranks) * ranks < size + ranks


@given(st.integers(1, 128), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_local_blocks_are_never_cut(width: int, blocks: int, ranks: int) -> None:
    held = local_dim(width * blocks, ranks, blocks)
    assert held % width == 0
    assert held == width * max(1, blocks // ranks)
