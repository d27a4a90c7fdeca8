"""Every parameter of a model: name, shape, and how each of its dims is divided over the mesh.

This is the one declaration of parameter sharding. The memory model, the checkpoint and the runtime's
placements read it; nothing restates it. Names are those of the runtime's modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from meshwright.model import Model

Part = Literal["embedding", "attention", "norms", "dense_mlp", "router", "experts", "shared_experts", "head"]
PARTS: tuple[Part, ...] = (
    "embedding",
    "attention",
    "norms",
    "dense_mlp",
    "router",
    "experts",
    "shared_experts",
    "head",
)
ShardAxis = Literal["tp", "ep", "etp"]


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of the whole model.

    `shard` names, per dim, the mesh axis that divides it (None: not divided). `blocks` is the number of
    indivisible pieces along a divided dim, such as key-value heads: more ranks than blocks replicate them.
    `partial_over_tp` marks gradients that sequence parallelism leaves as partial sums over tp, because each
    rank of tp saw only its share of the tokens; with `shared_by_heads` they are so without it too, because
    each rank of tp holds only its share of the heads.
    """

    name: str
    part: Part
    shape: tuple[int, ...]
    shard: tuple[ShardAxis | None, ...]
    blocks: int | None = None
    partial_over_tp: bool = False
    shared_by_heads: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether the expert view (etp, ep, edp) of the ranks holds it, rather than the dense one."""
        return self.part == "experts"


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of a model: all, those that one token passes through, and by part."""

    total: int
    active: int
    by_part: dict[str, int]


def parameters(model: Model) -> Iterator[Param]:
    """Every parameter, in the order of the forward pass."""
    yield from embedding_parameters(model)
    for layer in range(model.num_hidden_layers):
        yield from layer_parameters(model, layer)
    yield from head_parameters(model)


def layer_parameters(model: Model, layer: int) -> Iterator[Param]:
    """Parameters of one transformer layer."""
    prefix = f"layers.{layer}"
    yield from _norm(model, f"{prefix}.attention_norm", model.hidden_size)
    if model.is_mla:
        yield from _latent_attention(model, f"{prefix}.attention")
    else:
        yield from _attention(model, f"{prefix}.attention")
    yield from _norm(model, f"{prefix}.mlp_norm", model.hidden_size)
    if model.is_moe_layer(layer):
        yield from _moe(model, f"{prefix}.moe")
    else:
        width = model.intermediate_size or 0
        yield from _mlp(model, f"{prefix}.mlp", "dense_mlp", width, bias=model.mlp_bias)


def embedding_parameters(model: Model) -> Iterator[Param]:
    """Token embedding, and learned positions where the model has them."""
    yield Param("embedding.weight", "embedding", (model.vocab_size, model.hidden_size), ("tp", None))
    if model.position == "learned":
        shape = (model.max_position_embeddings or 0, model.hidden_size)
        yield Param("positions.weight", "embedding", shape, (None, None), partial_over_tp=True)


def head_parameters(model: Model) -> Iterator[Param]:
    """Final norm, and the output projection unless it is the embedding."""
    yield from _norm(model, "norm", model.hidden_size)
    if not model.tie_word_embeddings:
        yield Param("head.weight", "head", (model.vocab_size, model.hidden_size), ("tp", None))


def block_parameters(model: Model, block: str) -> list[Param]:
    """Parameters that a block reads, by its name: a layer's, the embedding's, the head's. A tied table is
    read by both ends."""
    if block.startswith("layers."):
        return list(layer_parameters(model, int(block.split(".")[1])))
    if block == "embedding":
        return list(embedding_parameters(model))
    tied = list(embedding_parameters(model))[:1] if model.tie_word_embeddings else []
    return [*head_parameters(model), *tied]


def count_parameters(model: Model) -> ParameterCounts:
    """Total, active and per-part parameters.

    active = total − routed experts that a token does not choose: (1 − k/E) of all routed experts.
    """
    by_part: dict[str, int] = dict.fromkeys(PARTS, 0)
    for param in (*embedding_parameters(model), *head_parameters(model)):
        by_part[param.part] += param.numel
    moe_layers = [layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer)]
    dense_layers = [layer for layer in range(model.num_hidden_layers) if not model.is_moe_layer(layer)]
    for layers in (moe_layers, dense_layers):
        for param in layer_parameters(model, layers[0]) if layers else ():
            by_part[param.part] += param.numel * len(layers)
    total = sum(by_part.values())
    idle = 0
    if by_part["experts"]:
        idle = by_part["experts"] // model.num_experts * (model.num_experts - model.num_experts_per_tok)
    return ParameterCounts(total, total - idle, by_part)


def _norm(model: Model, name: str, width: int) -> Iterator[Param]:
    yield Param(f"{name}.weight", "norms", (width,), (None,), partial_over_tp=True)
    if model.norm == "layernorm":
        yield Param(f"{name}.bias", "norms", (width,), (None,), partial_over_tp=True)


def _attention(model: Model, name: str) -> Iterator[Param]:
    hidden, width = model.hidden_size, model.qk_head_dim
    heads, kv_heads = model.num_attention_heads, model.kv_heads
    for letter, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        yield Param(
            f"{name}.{letter}.weight", "attention", (count * width, hidden), ("tp", None), blocks=count
        )
        if model.attention_bias:
            yield Param(f"{name}.{letter}.bias", "attention", (count * width,), ("tp",), blocks=count)
    yield Param(f"{name}.o.weight", "attention", (hidden, heads * width), (None, "tp"), blocks=heads)
    if model.attention_output_bias:
        yield Param(f"{name}.o.bias", "attention", (hidden,), (None,), partial_over_tp=True)
    for letter, count in (("q", heads), ("k", kv_heads)):
        if model.qk_norm == "head":
            norm = f"{name}.{letter}_norm.weight"
            yield Param(norm, "attention", (width,), (None,), partial_over_tp=True, shared_by_heads=True)
        elif model.qk_norm == "full":
            yield Param(f"{name}.{letter}_norm.weight", "attention", (count * width,), ("tp",), blocks=count)
    if model.attention_sinks:
        yield Param(f"{name}.sinks", "attention", (heads,), ("tp",), blocks=heads)


def _latent_attention(model: Model, name: str) -> Iterator[Param]:
    """DeepSeek-V2 §2.1 (arXiv:2405.04434): low-rank down-projections are whole on every rank of tp."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    nope, rope, value = model.qk_nope_head_dim or 0, model.qk_rope_head_dim or 0, model.value_head_dim
    kv_rank, q_rank = model.kv_lora_rank or 0, model.q_lora_rank
    q_shape = (heads * (nope + rope), q_rank or hidden)
    if q_rank is not None:
        yield Param(f"{name}.q_a.weight", "attention", (q_rank, hidden), (None, None), partial_over_tp=True)
        if model.attention_bias:
            yield Param(f"{name}.q_a.bias", "attention", (q_rank,), (None,), partial_over_tp=True)
        yield Param(f"{name}.q_a_norm.weight", "attention", (q_rank,), (None,), partial_over_tp=True)
    yield Param(
        f"{name}.{'q' if q_rank is None else 'q_b'}.weight", "attention", q_shape, ("tp", None), blocks=heads
    )
    yield Param(
        f"{name}.kv_a.weight", "attention", (kv_rank + rope, hidden), (None, None), partial_over_tp=True
    )
    if model.attention_bias:
        yield Param(f"{name}.kv_a.bias", "attention", (kv_rank + rope,), (None,), partial_over_tp=True)
    yield Param(f"{name}.kv_a_norm.weight", "attention", (kv_rank,), (None,), partial_over_tp=True)
    kv_shape = (heads * (nope + value), kv_rank)
    yield Param(f"{name}.kv_b.weight", "attention", kv_shape, ("tp", None), blocks=heads)
    yield Param(f"{name}.o.weight", "attention", (hidden, heads * value), (None, "tp"), blocks=heads)
    if model.attention_bias:
        yield Param(f"{name}.o.bias", "attention", (hidden,), (None,), partial_over_tp=True)


def _mlp(model: Model, name: str, part: Part, width: int, bias: bool) -> Iterator[Param]:
    hidden = model.hidden_size
    for letter in ("gate", "up") if model.gated else ("up",):
        yield Param(f"{name}.{letter}.weight", part, (width, hidden), ("tp", None))
        if bias:
            yield Param(f"{name}.{letter}.bias", part, (width,), ("tp",))
    yield Param(f"{name}.down.weight", part, (hidden, width), (None, "tp"))
    if bias:
        yield Param(f"{name}.down.bias", part, (hidden,), (None,), partial_over_tp=True)


def _moe(model: Model, name: str) -> Iterator[Param]:
    hidden, experts, width = model.hidden_size, model.num_experts, model.moe_intermediate_size or 0
    yield Param(f"{name}.router.weight", "router", (experts, hidden), (None, None), partial_over_tp=True)
    if model.router.bias:
        yield Param(f"{name}.router.bias", "router", (experts,), (None,), partial_over_tp=True)
    for letter in ("gate", "up") if model.gated else ("up",):
        yield Param(f"{name}.experts.{letter}", "experts", (experts, width, hidden), ("ep", "etp", None))
        if model.expert_bias:
            yield Param(f"{name}.experts.{letter}_bias", "experts", (experts, width), ("ep", "etp"))
    yield Param(f"{name}.experts.down", "experts", (experts, hidden, width), ("ep", None, "etp"))
    if model.expert_bias:
        yield Param(f"{name}.experts.down_bias", "experts", (experts, hidden), ("ep", None))
    if model.shared_width:
        yield from _mlp(model, f"{name}.shared", "shared_experts", model.shared_width, bias=False)
        if model.shared_expert_gate:
            yield Param(
                f"{name}.shared_gate.weight",
                "shared_experts",
                (1, hidden),
                (None, None),
                partial_over_tp=True,
            )
