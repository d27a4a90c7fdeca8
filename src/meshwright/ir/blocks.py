"""The blocks of a transformer: embedding, layer, head.

One place says which ops a layer has, which tensors they keep, and where communication stands. Collectives
are always listed; lowering drops those whose axis has one rank.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.ir.attention import latent_attention, plain_attention
from meshwright.ir.dense import Shape, enter, gathered_input, leave, mlp, norm_op, residual
from meshwright.ir.experts import moe
from meshwright.ir.graph import Block, Collective, CollectiveKind, Dim, Node, Op, OpKind, Saved
from meshwright.model import Model

REDUCE = CollectiveKind.ALL_REDUCE


def layer_block(model: Model, layer: int, shape: Shape) -> Block:
    """One transformer layer."""
    prefix = f"layers.{layer}"
    attention = latent_attention if model.is_mla else plain_attention
    nodes = [*attention(model, f"{prefix}.attention", shape)]
    nodes += [residual(model, f"{prefix}.attention", shape)]
    if model.is_moe_layer(layer):
        nodes += moe(model, f"{prefix}.moe", shape)
    else:
        nodes += [norm_op(model, f"{prefix}.mlp_norm", f"{prefix}.middle", shape)]
        nodes += mlp(model, f"{prefix}.mlp", model.intermediate_size or 0, shape, source=f"{prefix}.mlp_norm")
    nodes += [residual(model, f"{prefix}.mlp", shape)]
    return Block(prefix, tuple(nodes))


def embedding_block(model: Model, shape: Shape) -> Block:
    """Token look-up; vocabulary-parallel, so each rank of tp contributes its part of every row. Learned
    positions are added to this rank's share of the tokens."""
    hidden = Dim("hidden", model.hidden_size)
    look_up = Op(
        "embedding",
        OpKind.EMBEDDING,
        (shape.gathered, hidden),
        ("embedding.weight",),
        saves=(Saved("token_ids", (shape.gathered,), 8, for_weight=True),),
        bytes_per_element=shape.element_bytes,
        traffic=(2.0, 2.0),
    )
    nodes: list[Node] = [look_up, leave("embedding", hidden, shape)]
    if model.position == "learned":
        nodes.append(
            Op(
                "positions",
                OpKind.EMBEDDING,
                (shape.scattered, hidden),
                ("positions.weight",),
                bytes_per_element=shape.element_bytes,
                traffic=(3.0, 2.0),
            )
        )
    return Block("embedding", tuple(nodes))


def head_block(model: Model, shape: Shape) -> Block:
    """Final norm, output projection and cross entropy, all vocabulary-parallel.

    Vocabulary-parallel cross entropy needs three all-reduces of one FP32 number per token: the maximum, the
    target's logit and the sum of exponentials (Megatron-LM `tensor_parallel/cross_entropy.py`). In FP32 it
    keeps its probabilities alone: 4 bytes for each logit (arXiv:2205.05198 §4.3), not the logits beside them.
    The projection stays in the compute type where the layers' matmuls are quantized.
    """
    hidden = Dim("hidden", model.hidden_size)
    multiple = shape.engine.vocabulary_multiple.value * shape.tp
    vocabulary = Dim("vocabulary", -(-model.vocab_size // multiple) * multiple, ("tp",))
    weight = "embedding.weight" if model.tie_word_embeddings else "head.weight"
    tokens = shape.gathered
    width = shape.engine.loss.value.kept
    kept = Saved("head.probabilities" if width == 4 else "head.logits", (tokens, vocabulary), width)
    nodes: list[Node] = [
        norm_op(model, "norm", "head.in", shape),
        *enter("head", hidden, shape),
        Op(
            "head",
            OpKind.MATMUL,
            (tokens, vocabulary, hidden),
            (weight,),
            saves=(gathered_input("norm", hidden, replace(shape, input_bytes=None)),),
            bytes_per_element=shape.element_bytes,
        ),
    ]
    nodes += [
        Collective(f"loss.{what}", "tp", REDUCE, None, (tokens,), 4) for what in ("maximum", "target", "sum")
    ]
    nodes += [
        Op(
            "loss",
            OpKind.LOSS,
            (tokens, vocabulary),
            internal=(kept,),
            bytes_per_element=4,
            traffic=(3.0, 2.0),
        ),
    ]
    return Block("head", tuple(nodes))
