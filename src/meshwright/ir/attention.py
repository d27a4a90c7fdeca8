"""Attention as nodes: multi-head, grouped-query and multi-head latent, with context parallelism."""

from __future__ import annotations

from meshwright.ir.dense import Shape, enter, gathered_input, leave, matmul, norm_op
from meshwright.ir.graph import Collective, CollectiveKind, Dim, Node, Op, OpKind, Saved
from meshwright.model import Model

GATHER = CollectiveKind.ALL_GATHER
SCATTER = CollectiveKind.REDUCE_SCATTER
REDUCE = CollectiveKind.ALL_REDUCE


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
            nodes += _qk_norm(model, f"{name}.{letter}", width, heads, shape)
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
    normed = Saved(norm, (shape.scattered, hidden), shape.kept_input_bytes, for_weight=True)
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
    kv_rank, rope = Dim("kv_rank", model.kv_lora_rank or 0), Dim("rope", model.qk_rope_head_dim or 0)
    wide = Dim("kv_rank_and_rope", kv_rank.size + rope.size)
    kv_width = Dim("kv_width", heads * ((model.qk_nope_head_dim or 0) + model.value_head_dim), ("tp",), heads)
    nodes.append(matmul(f"{name}.kv_a", shape.scattered, wide, hidden, normed, unit, model.attention_bias))
    nodes.append(_low_rank_norm(f"{name}.kv_a", kv_rank, shape))
    nodes += [*enter(f"{name}.kv_b", kv_rank, shape), _rope_key(name, rope, shape)]
    source = gathered_input(f"{name}.kv_a_norm", kv_rank, shape)
    nodes.append(matmul(f"{name}.kv_b", tokens, kv_width, kv_rank, source, unit))
    nodes += _core(model, name, heads, shape)
    return [*nodes, *_output(model, name, shape)]


def _qk_norm(model: Model, name: str, width: Dim, heads: int, shape: Shape) -> list[Node]:
    """A norm of queries or keys: one per head, or over all heads, whose sums then add up over tp."""
    tokens, whole = shape.gathered, model.qk_norm == "full"
    counted = (tokens,) if whole else (tokens, Dim("heads", heads, ("tp",), heads))
    norm = Op(
        f"{name}_norm",
        OpKind.NORM,
        (tokens, width),
        (f"{name}_norm.weight",),
        saves=(Saved(name, (tokens, width), shape.element_bytes),),
        internal=(Saved(f"{name}_norm.statistics", counted, 4),),
        bytes_per_element=shape.element_bytes,
        recompute="norm",
    )
    return [Collective(f"{name}_norm.squares", "tp", REDUCE, REDUCE, (tokens,), 4), norm] if whole else [norm]


def _rope_key(name: str, rope: Dim, shape: Shape) -> Collective:
    """The rotated part of the latent keys, which all heads share: gathered like the compressed keys and
    values, but no matmul keeps it (Megatron-LM `transformer/multi_latent_attention.py`, k_pos_emb)."""
    forward, backward = (GATHER, SCATTER) if shape.sequence_parallel else (None, REDUCE)
    dims = (shape.gathered, rope)
    return Collective(f"{name}.rope_key.enter", "tp", forward, backward, dims, shape.element_bytes)


def _exchange(name: str, keys: tuple[Dim, ...], values: tuple[Dim, ...], unit: int) -> list[Node]:
    """Keys and values of the whole sequence along cp. Each rank keeps its own share alone, so that backward
    gathers them again beside scattering their gradients (Ring Attention, arXiv:2310.01889)."""
    nodes: list[Node] = []
    for letter, dims in (("k", keys), ("v", values)):
        nodes.append(Collective(f"{name}.exchange_{letter}", "cp", GATHER, SCATTER, dims, unit))
        nodes.append(Collective(f"{name}.exchange_{letter}_again", "cp", None, GATHER, dims, unit))
    return nodes


def _core(model: Model, name: str, kv_heads: int, shape: Shape) -> list[Node]:
    """Rotary positions, the exchange of keys and values along cp, and flash attention.

    Its output is an input of the output projection, which keeps it even where attention is recomputed.
    """
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
        for letter, count in (("q", heads), ("k", kv_heads)):
            dims = (shape.gathered, Dim(f"{letter}_width", count * model.qk_head_dim, ("tp",), count))
            nodes.append(Op(f"{name}.rope_{letter}", OpKind.ELEMENTWISE, dims, bytes_per_element=unit))
    nodes += _exchange(name, (batch, whole, kv, qk), (batch, whole, kv, value), unit)
    nodes.append(
        Op(
            f"{name}.core",
            OpKind.ATTENTION,
            (batch, q_heads, local, whole, qk, value),
            (f"{name}.sinks",) if model.attention_sinks and not model.is_mla else (),
            saves=(q_tensor, k_tensor, v_tensor),
            internal=(out, statistics),
            bytes_per_element=unit,
            recompute="attention",
            window=model.window_of(int(name.split(".")[1])),
        )
    )
    return nodes


def _output(model: Model, name: str, shape: Shape) -> list[Node]:
    heads, hidden = model.num_attention_heads, Dim("hidden", model.hidden_size)
    width = Dim("v_width", heads * model.value_head_dim, ("tp",), heads)
    batch = Dim("batch", shape.micro_batch_size)
    local = Dim("query_tokens", shape.sequence_length, ("cp",))
    quantized = shape.kept_input_bytes != shape.element_bytes  # beside the one that attention keeps
    source = Saved(
        f"{name}.core_quantized" if quantized else f"{name}.core",
        (batch, local, Dim("heads", heads, ("tp",), heads), Dim("v_dim", model.value_head_dim)),
        shape.kept_input_bytes,
        for_weight=True,
    )
    bias = model.attention_bias if model.is_mla else model.attention_output_bias
    return [
        matmul(f"{name}.o", shape.gathered, hidden, width, source, shape.element_bytes, bias),
        leave(name, hidden, shape),
    ]


def _low_rank_norm(name: str, rank: Dim, shape: Shape) -> Op:
    raw = Saved(name, (shape.scattered, rank), shape.element_bytes)
    statistics = Saved(f"{name}_norm.statistics", (shape.scattered,), 4)
    return Op(
        f"{name}_norm",
        OpKind.NORM,
        (shape.scattered, rank),
        (f"{name}_norm.weight",),
        makes=f"{name}_norm",
        saves=(raw,),
        internal=(statistics,),
        bytes_per_element=shape.element_bytes,
        recompute="norm",
    )
