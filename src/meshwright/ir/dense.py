"""Ops that every block is built from: norms, matmuls, the feed-forward network, and the way into and out
of a tensor-parallel region."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.engines import Engine
from meshwright.ir.elementwise import is_one
from meshwright.ir.graph import Collective, CollectiveKind, Dim, Node, Op, OpKind, Saved
from meshwright.model import Model
from meshwright.policy import Dispatcher

GATHER = CollectiveKind.ALL_GATHER
SCATTER = CollectiveKind.REDUCE_SCATTER
REDUCE = CollectiveKind.ALL_REDUCE


@dataclass(frozen=True, slots=True)
class Shape:
    """What a block is built for: one micro-batch on one data-parallel rank, and the engine that runs it.

    `micro_batch_size` sequences of `sequence_length` tokens each; `element_bytes` per activation element, and
    `input_bytes` per element of what a matmul of a layer keeps of its input, where that is different.
    Where one block stands for many layouts, `micro_batch_size` may be an array, and `tp` an array of degrees
    above 1; `ep` decides which nodes there are, so it is a number.
    """

    micro_batch_size: int
    sequence_length: int
    element_bytes: int
    engine: Engine
    sequence_parallel: bool
    dispatcher: Dispatcher
    ep: int = 1
    tp: int = 1
    input_bytes: int | None = None

    @property
    def kept_input_bytes(self) -> int:
        """Bytes per element of what a matmul keeps of its input: one where the engine keeps it quantized."""
        return self.element_bytes if self.input_bytes is None else self.input_bytes

    @property
    def gathers_sequence(self) -> bool:
        """Whether a tensor-parallel region takes its input from several ranks' shares of the tokens."""
        return self.sequence_parallel and not is_one(self.tp)

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch before any division."""
        return self.micro_batch_size * self.sequence_length

    @property
    def gathered(self) -> Dim:
        """Tokens where each rank of tp sees all of them."""
        return Dim("tokens", self.tokens, ("cp",))

    @property
    def scattered(self) -> Dim:
        """Tokens where sequence parallelism divides them over tp."""
        return Dim("tokens", self.tokens, ("cp", "sp"))


def mlp(model: Model, name: str, width: int, shape: Shape, source: str, shared: bool = False) -> list[Node]:
    """A dense feed-forward network: gate and up column-parallel, down row-parallel."""
    hidden, inner = Dim("hidden", model.hidden_size), Dim("ffn", width, ("tp",))
    tokens, unit = shape.gathered, shape.element_bytes
    nodes: list[Node] = [*enter(name, hidden, shape)]
    normed = gathered_input(source, hidden, shape)
    bias = model.mlp_bias and not shared
    for letter in ("gate", "up") if model.gated else ("up",):
        nodes.append(matmul(f"{name}.{letter}", tokens, inner, hidden, normed, unit, bias))
    nodes.append(activation(model, name, tokens, inner, shape))
    product = Saved(f"{name}.product", (tokens, inner), shape.kept_input_bytes, for_weight=True)
    nodes.append(matmul(f"{name}.down", tokens, hidden, inner, product, unit, bias))
    return [*nodes, leave(name, hidden, shape)]


def norm_op(model: Model, name: str, source: str, shape: Shape) -> Op:
    """A norm over the hidden dim, on this rank's share of the tokens."""
    hidden = Dim("hidden", model.hidden_size)
    stream = Saved(source, (shape.scattered, hidden), shape.element_bytes)
    statistics = Saved(f"{name}.statistics", (shape.scattered,), 4 if model.norm == "rmsnorm" else 8)
    weights = (f"{name}.weight",) if model.norm == "rmsnorm" else (f"{name}.weight", f"{name}.bias")
    return Op(
        name,
        OpKind.NORM,
        (shape.scattered, hidden),
        weights,
        makes=name,
        saves=(stream,),
        internal=(statistics,),
        bytes_per_element=shape.element_bytes,
        recompute="norm",
    )


def matmul(name: str, m: Dim, n: Dim, k: Dim, saved: Saved, unit: int, bias: bool = False) -> Op:
    """An m×k by k×n matmul that keeps its input for the weight gradient."""
    params = (f"{name}.weight", f"{name}.bias") if bias else (f"{name}.weight",)
    return Op(name, OpKind.MATMUL, (m, n, k), params, saves=(saved,), bytes_per_element=unit)


def activation(model: Model, name: str, tokens: Dim, inner: Dim, shape: Shape, weighted: bool = False) -> Op:
    """silu(gate)·up, or one activation; unfused it also keeps the activated gate.

    `weighted` multiplies in the router's weights, which are then kept, and so is what they multiply unless
    the engine fuses the gated activation with them (Megatron-LM `transformer/moe/experts.py`, TEGroupedMLP).
    """
    unit, letters = shape.element_bytes, ("gate", "up") if model.gated else ("up",)
    inputs = tuple(Saved(f"{name}.{letter}", (tokens, inner), unit) for letter in letters)
    fused = model.gated and shape.engine.fused_activation.value
    internal: tuple[Saved, ...] = ()
    if model.gated and not fused:
        internal += (Saved(f"{name}.activated", (tokens, inner), unit),)
    if weighted:
        inputs += (Saved(f"{name}.weights", (tokens,), 4),)
        internal += () if fused else (Saved(f"{name}.unweighted", (tokens, inner), unit),)
    moved = (3.0, 5.0) if model.gated else (2.0, 3.0)
    if model.gated and not fused:  # silu and the product apart: 2 + 3 forward, 3 + 6 backward
        moved = (5.0, 9.0)
    return Op(
        f"{name}.activation",
        OpKind.ELEMENTWISE,
        (tokens, inner),
        makes=f"{name}.product",
        saves=inputs,
        internal=internal,
        bytes_per_element=unit,
        traffic=moved,
        recompute="activation",
    )


def residual(model: Model, name: str, shape: Shape) -> Op:
    """The addition onto the residual stream."""
    dims = (shape.scattered, Dim("hidden", model.hidden_size))
    return Op(
        f"{name}_residual",
        OpKind.ELEMENTWISE,
        dims,
        bytes_per_element=shape.element_bytes,
        traffic=(3.0, 1.0),
    )


def gathered_input(source: str, width: Dim, shape: Shape) -> Saved:
    """What a column-parallel matmul keeps of its input: the gathered tokens, or only this rank's share
    where the engine gathers them again for the weight gradient."""
    whole = shape.engine.saves_gathered_input.value
    tokens = shape.gathered if whole else shape.scattered
    name = f"{source}.gathered" if whole and shape.gathers_sequence else source
    return Saved(name, (tokens, width), shape.kept_input_bytes, for_weight=True)


def enter(name: str, width: Dim, shape: Shape) -> list[Node]:
    """Into a tensor-parallel region: gather the sequence, or (without sequence parallelism) nothing forward
    and an all-reduce of the input gradient (Korthikanti et al., arXiv:2205.05198 §4.2.2)."""
    dims = (shape.gathered, width)
    if not shape.sequence_parallel:
        return [Collective(f"{name}.enter", "tp", None, REDUCE, dims, shape.element_bytes)]
    again = None if shape.engine.saves_gathered_input.value else GATHER
    return [
        Collective(f"{name}.enter", "tp", GATHER, SCATTER, dims, shape.element_bytes, weight_gradient=again)
    ]


def leave(name: str, width: Dim, shape: Shape) -> Collective:
    """Out of a tensor-parallel region: scatter the partial sums over the sequence, or all-reduce them."""
    dims = (shape.gathered, width)
    if shape.sequence_parallel:
        return Collective(f"{name}.leave", "tp", SCATTER, GATHER, dims, shape.element_bytes)
    return Collective(f"{name}.leave", "tp", REDUCE, None, dims, shape.element_bytes)
