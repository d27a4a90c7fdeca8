"""What recompute keeps of a layer and what it runs again.

Selective recompute is named in one of three ways: by class of op (`norm`, `activation`, `attention`), by
Megatron Core's modules (transformer_config.py, `recompute_modules`), or as `per_op`: torchtitan's selective
checkpointing, which keeps attention and every second matmul of a layer and makes all else again
(distributed/activation_checkpoint.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from meshwright.ir.graph import Block, Op, OpKind, Saved, saved_tensors
from meshwright.policy import Recompute

PER_OP = "per_op"
CLASSES = frozenset(("norm", "activation", "attention"))

_OPS: Mapping[str, str] = {  # by the end of an op's name, after its layer
    "core_attn": r"attention\.core",
    "layernorm": r"(attention|mlp)_norm",
    "mla_up_proj": r"attention\.(q_b|kv_b|rope_q|rope_k)",
    "moe_act": r"moe\.experts\.activation",
    "mlp": r"mlp\.\w+",
    "moe": r"moe\.[\w.]+",
    "shared_experts": r"moe\.shared\.\w+",
}
_REMADE: Mapping[str, str] = {  # tensors that those ops make; a region's own input is no part of it
    "core_attn": r"attention\.logsumexp",
    "layernorm": r"(attention|mlp)_norm(\.gathered|\.statistics)?",
    "mla_up_proj": r"attention\.(q_rotated|k_rotated|v_heads)",
    "moe_act": r"moe\.experts\.(product|activated|unweighted)",
    "mlp": r"mlp\.(gate|up|activated|product)",
    "moe": r"moe\.(?!choices)[\w.]+(?<!index)",
    "shared_experts": r"moe\.shared\.(gate|up|activated|product)",
}
_LATENT_ONLY = "mla_up_proj"


def kept_tensors(block: Block, recompute: Recompute, selective: Iterable[str]) -> dict[str, Saved]:
    """The tensors that a block keeps from forward to backward, by name."""
    if not block.name.startswith("layers.") or recompute == "none":
        return saved_tensors(block.ops)
    if recompute == "full":
        return _kept_under_full_recompute(block)
    named = set(selective)
    if PER_OP in named:
        return _kept_per_op(block)
    kept = saved_tensors(block.ops, frozenset(named & CLASSES))
    gone = _pattern(_REMADE, _modules(block, named))
    start = len(block.name) + 1
    return {name: saved for name, saved in kept.items() if not gone(name[start:])}


def repeated_ops(block: Block, selective: Iterable[str]) -> frozenset[str]:
    """Names of the ops that selective recompute runs again in backward."""
    named = set(selective)
    if PER_OP in named:
        kept = {op.name for op in _kept_matmuls(block)}
        return frozenset(
            op.name for op in block.ops if op.name not in kept and op.kind is not OpKind.ATTENTION
        )
    again = _pattern(_OPS, _modules(block, named))
    start = len(block.name) + 1
    return frozenset(op.name for op in block.ops if op.recompute in named or again(op.name[start:]))


def _modules(block: Block, named: set[str]) -> list[str]:
    """The modules among the names that this block has."""
    latent = any(op.name.endswith(".kv_b") for op in block.ops)
    return [name for name in sorted(named & _OPS.keys()) if latent or name != _LATENT_ONLY]


def _pattern(patterns: Mapping[str, str], modules: list[str]) -> Callable[[str], bool]:
    if not modules:
        return lambda name: False
    pattern = re.compile("|".join(f"(?:{patterns[module]})" for module in modules))
    return lambda name: pattern.fullmatch(name) is not None


def _kept_under_full_recompute(block: Block) -> dict[str, Saved]:
    """The layer's input, and the routing choices: chosen again they could differ in a near tie."""
    return {
        name: Saved(name, saved.dims, saved.bytes_per_element, for_weight=True)
        for name, saved in saved_tensors(block.ops).items()
        if name == f"{block.name}.in" or name.endswith((".choices", ".index"))
    }


def _kept_per_op(block: Block) -> dict[str, Saved]:
    """The layer's input, what attention makes, and the outputs of every second matmul."""
    kept = _kept_under_full_recompute(block)
    for op in block.ops:
        if op.kind is OpKind.ATTENTION:
            kept |= {saved.tensor: saved for saved in op.internal}
    for op in _kept_matmuls(block):
        tensor = f"{op.name}.output"
        kept[tensor] = Saved(tensor, op.dims[-3:-1], op.bytes_per_element)
    return kept


def _kept_matmuls(block: Block) -> list[Op]:
    """The first, third, fifth … matmul of a layer. A router's is made again and not counted; grouped matmuls
    are not kept (pytorch/torchtitan@b5bcd76c)."""
    matmuls = [op for op in block.ops if op.kind is OpKind.MATMUL and not op.name.endswith(".router")]
    return matmuls[::2]
