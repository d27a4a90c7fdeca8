"""Attention as nodes: multi-head, grouped-query and multi-head latent, with context parallelism."""

from __future__ import annotations

from meshwright.ir.dense import Shape, enter, gathered_input, leave, matmul, norm_op
from meshwright.ir.graph import Collective, CollectiveKind, Dim, Node, Op, OpKind, Saved
from meshwright.model import Model

GATHER = CollectiveKind.ALL_GATHER
SCATTER = CollectiveKind.REDUCE_SCATTER


def plain_attention(model: Model, name: str, shape: Shape) -> list[Node]:
    """Multi-head or grouped-query attention: q, k, v column-parallel, o row-parallel."""
    hidden = Dim("hidden", model.hidden_size)
    tokens, unit = shape.gathered, shape.element_bytes
    norm, layer = f"{name}_norm", name.rsplit(".", 1)[0]
    nodes: list[Node] = [norm_op(model, norm, f"{layer}.in", shape), *enter(name, hidden, shape)]
    source = gathered_input(norm, hidden, shape)
    for letter, heads in (("q", model.num_attention_heads), ("k", model.kv_heads), ("v", model.kv_heads)):
        width = Dim(f"{letter}_width", heads * model.qk_head_dim, ("tp",), heads)
        nodes.append(
            matmul(f"{name}.{letter}", tokens, width, hidden, source, unit, bias=model.attention_bias)
        )
        if letter in "qk" and model.qk_norm != "none":
            raw = Saved(f"{name}.{letter}", (tokens, width), unit)
            nodes.append(
                Op(
                    f"{name}.{letter}_norm",
                    OpKind.NORM,
                    (tokens, width),
                    (f"{name}.{letter}_norm.weight",),
                    saves=(raw,),
                    bytes_per_element=unit,
                    recompute="norm",
                )
            )
    nodes += _core(model, name, model.kv_heads, shape)
    return [*nodes, *_output(model, name, shape)]


def latent_attention(model: Model, name: str, shape: Shape) -> list[Node]:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 §2.1).

    The low-rank down-projections are whole on each rank of tp and, under sequence parallelism, run on its
    share of the tokens; the compressed results are what is gathered (Megatron-LM
    `transformer/multi_latent_attention.py`).
    """
    hidden, heads = Dim("hidden", model.hidden_size), model.num_attention_heads
    tokens, unit = shape.gathered, shape.element_bytes
    norm, layer = f"{name}_norm", name.rsplit(".", 1)[0]
    normed = Saved(norm, (shape.scattered, hidden), unit, for_weight=True)
    nodes: list[Node] = [norm_op(model, norm, f"{layer}.in", shape)]
    q_width = Dim("q_width", heads * model.qk_head_dim, ("tp",), heads)
    if model.q_lora_rank is None:
        nodes += enter(f"{name}.q", hidden, shape)
        source = gathered_input(norm, hidden, shape)
        nodes.append(matmul(f"{name}.q", tokens, q_width, hidden, source, unit))
    else:
        rank = Dim("q_rank", model.q_lora_rank)
        nodes.append(matmul(f"{name}.q_a", shape.scattered, rank, hidden, normed, unit, model.attention_bias))
        nodes.append(_low_rank_norm(f"{name}.q_a", rank, shape))
        nodes += enter(f"{name}.q_b", rank, shape)
        source = gathered_input(f"{name}.q_a_norm", rank, shape)
        nodes.append(matmul(f"{name}.q_b", tokens, q_width, rank, source, unit))
    kv_rank = Dim("kv_rank", model.kv_lora_rank or 0)
    wide = Dim("kv_rank_and_rope", kv_rank.size + (model.qk_rope_head_dim or 0))
    kv_width = Dim("kv_width", heads * ((model.qk_nope_head_dim or 0) + model.value_head_dim), ("tp",), heads)
    nodes.append(matmul(f"{name}.kv_a", shape.scattered, wide, hidden, normed, unit, model.attention_bias))
    nodes.append(_low_rank_norm(f"{name}.kv_a", kv_rank, shape))
    nodes += enter(f"{name}.kv_b", wide, shape)
    source = gathered_input(f"{name}.kv_a_norm", kv_rank, shape)
    nodes.append(matmul(f"{name}.kv_b", tokens, kv_width, kv_rank, source, unit))
    nodes += _core(model, name, heads, shape)
    return [*nodes, *_output(model, name, shape)]


def _core(model: Model, name: str, kv_heads: int, shape: Shape) -> list[Node]:
    """Rotary positions, the exchange of keys and values along cp, and flash attention."""
    unit, heads = shape.element_bytes, model.num_attention_heads
    batch = Dim("batch", shape.micro_batch_size)
    local = Dim("query_tokens", shape.sequence_length, ("cp",))
    whole = Dim("key_tokens", shape.sequence_length)
    q_heads, kv = Dim("heads", heads, ("tp",), heads), Dim("kv_heads", kv_heads, ("tp",), kv_heads)
    qk, value = Dim("qk_dim", model.qk_head_dim), Dim("v_dim", model.value_head_dim)
    q_tensor = Saved(f"{name}.q_rotated", (batch, local, q_heads, qk), unit)
    k_tensor = Saved(f"{name}.k_rotated", (batch, local, kv, qk), unit)
    v_tensor = Saved(f"{name}.v_heads", (batch, local, kv, value), unit)
    out = Saved(f"{name}.core", (batch, local, q_heads, value), unit, for_weight=True)
    statistics = Saved(f"{name}.logsumexp", (batch, local, q_heads), 4)
    nodes: list[Node] = []
    if model.position == "rope":
        both = Dim("qk_width", (heads + kv_heads) * model.qk_head_dim, ("tp",), kv_heads)
        nodes.append(Op(f"{name}.rope", OpKind.ELEMENTWISE, (shape.gathered, both), bytes_per_element=unit))
    nodes += [
        Collective(f"{name}.exchange_{letter}", "cp", GATHER, SCATTER, (batch, whole, kv, width), unit)
        for letter, width in (("k", qk), ("v", value))
    ]
    layer = name.split(".")[1]
    window = model.sliding_window if int(layer) in model.sliding_window_layers else None
    nodes.append(
        Op(
            f"{name}.core",
            OpKind.ATTENTION,
            (batch, q_heads, local, whole, qk, value),
            makes=f"{name}.core",
            saves=(q_tensor, k_tensor, v_tensor),
            internal=(out, statistics),
            bytes_per_element=unit,
            recompute="attention",
            window=window,
        )
    )
    return nodes


def _output(model: Model, name: str, shape: Shape) -> list[Node]:
    heads, hidden = model.num_attention_heads, Dim("hidden", model.hidden_size)
    width = Dim("v_width", heads * model.value_head_dim, ("tp",), heads)
    batch = Dim("batch", shape.micro_batch_size)
    local = Dim("query_tokens", shape.sequence_length, ("cp",))
    source = Saved(
        f"{name}.core",
        (batch, local, Dim("heads", heads, ("tp",), heads), Dim("v_dim", model.value_head_dim)),
        shape.element_bytes,
        for_weight=True,
    )
    bias = model.attention_bias if model.is_mla else model.attention_output_bias
    return [
        matmul(f"{name}.o", shape.gathered, hidden, width, source, shape.element_bytes, bias),
        leave(name, hidden, shape),
    ]


def _low_rank_norm(name: str, rank: Dim, shape: Shape) -> Op:
    raw = Saved(name, (shape.scattered, rank), shape.element_bytes)
    return Op(
        f"{name}_norm",
        OpKind.NORM,
        (shape.scattered, rank),
        (f"{name}_norm.weight",),
        makes=f"{name}_norm",
        saves=(raw,),
        bytes_per_element=shape.element_bytes,
        recompute="norm",
    )
