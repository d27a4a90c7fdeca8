"""The vocabulary of the graph: dims, ops, what they save, and collectives on named axes.

An op describes the whole model; each of its dims says which mesh axes divide it. `Dim.local` gives what
one rank computes. Backward is derived from an op's kind and split into input gradient and weight gradient,
so that zero-bubble schedules need nothing extra.

Sizes, FLOPs and bytes on one rank are elementwise: a degree or a dim's size may be a whole number, or a NumPy
array of them that stands for many layouts at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Literal

from meshwright.ir.sharding import local_dim

Degrees = Mapping[str, int]
"""Ranks along tp, cp, ep, etp; `sp` is tp under sequence parallelism and 1 otherwise."""

RecomputeClass = Literal["norm", "activation", "attention"]


class OpKind(StrEnum):
    """Kinds of op; `Op.dims` holds, in order, the dims that each names."""

    MATMUL = "matmul"  # m, n, k
    GROUPED_MATMUL = "grouped_matmul"  # groups, m over all groups, n, k
    ATTENTION = "attention"  # batch, heads, query_tokens, key_tokens, qk_dim, v_dim
    NORM = "norm"  # tokens, width
    ELEMENTWISE = "elementwise"  # tokens, width
    EMBEDDING = "embedding"  # tokens, width
    ROUTE = "route"  # tokens, experts
    PERMUTE = "permute"  # tokens, width
    LOSS = "loss"  # tokens, vocabulary


class CollectiveKind(StrEnum):
    """Kinds of communication. `bytes` of each is the largest buffer that one rank holds for it: the output
    of an all-gather, the input of a reduce-scatter, the buffer of an all-reduce or broadcast, the send
    buffer of an all-to-all or of a send."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    SEND_RECV = "send_recv"


@dataclass(frozen=True, slots=True)
class Dim:
    """One dim of an op: its whole size, the axes that divide it, and those that multiply it by gathering.

    `blocks` counts indivisible pieces, as in `Param.blocks`.
    """

    name: str
    size: int
    axes: tuple[str, ...] = ()
    blocks: int | None = None
    times: tuple[str, ...] = ()

    def local(self, degrees: Degrees) -> int:
        """Size on one rank."""
        width = local_dim(self.size, prod(degrees[axis] for axis in self.axes), self.blocks)
        return width * prod(degrees[axis] for axis in self.times)


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor kept from forward to backward. Two ops that save one tensor name keep it once.

    `for_weight` says that the weight gradient needs it, so that a schedule which defers weight gradients
    holds it longer.
    """

    tensor: str
    dims: tuple[Dim, ...]
    bytes_per_element: int
    for_weight: bool = False

    def local_bytes(self, degrees: Degrees) -> int:
        """Bytes on one rank."""
        return prod(dim.local(degrees) for dim in self.dims) * self.bytes_per_element


@dataclass(frozen=True, slots=True)
class Op:
    """One computation of the forward pass.

    `saves` are inputs that backward needs, `internal` what the op itself makes and keeps, `makes` the name
    of its result where a later op saves it. `traffic` counts, for kinds that memory bandwidth bounds, how
    many tensors of the op's shape forward and backward read or write. `recompute` names the class under
    which selective recompute repeats the op instead of keeping what it makes.
    """

    name: str
    kind: OpKind
    dims: tuple[Dim, ...]
    params: tuple[str, ...] = ()
    makes: str | None = None
    saves: tuple[Saved, ...] = ()
    internal: tuple[Saved, ...] = ()
    bytes_per_element: int = 2
    traffic: tuple[float, float] = (2.0, 3.0)
    recompute: RecomputeClass | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Collective:
    """One communication: what forward does and what backward does, on one axis."""

    name: str
    axis: str
    forward: CollectiveKind | None
    backward: CollectiveKind | None
    dims: tuple[Dim, ...]
    bytes_per_element: int
    weight_gradient: CollectiveKind | None = None

    def local_bytes(self, degrees: Degrees) -> int:
        """Payload in bytes on one rank, as CollectiveKind defines it."""
        return prod(dim.local(degrees) for dim in self.dims) * self.bytes_per_element


Node = Op | Collective


@dataclass(frozen=True, slots=True)
class Block:
    """A run of nodes that is repeated or placed as one: `embedding`, a layer, or `head`."""

    name: str
    nodes: tuple[Node, ...]

    @property
    def ops(self) -> tuple[Op, ...]:
        """The computations, in order."""
        return tuple(node for node in self.nodes if isinstance(node, Op))

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The communications, in order."""
        return tuple(node for node in self.nodes if isinstance(node, Collective))


@dataclass(frozen=True, slots=True)
class Flops:
    """Work of one op on one rank, in FLOPs with a multiply-add counted as two."""

    forward: int
    input_gradient: int
    weight_gradient: int

    @property
    def total(self) -> int:
        """Forward and backward together, without recompute."""
        return self.forward + self.input_gradient + self.weight_gradient


def attention_pairs(num_queries: int, window: int | None) -> int:
    """Query-key pairs of causal attention over one whole sequence: s(s+1)/2, fewer under a window w:
    w·s − w(w−1)/2."""
    if window is None or window >= num_queries:
        return num_queries * (num_queries + 1) // 2
    return window * num_queries - window * (window - 1) // 2


def flops(op: Op, degrees: Degrees, sizes: Sequence[int] | None = None) -> Flops:
    """FLOPs of an op on one rank.

    Matmuls: 2mnk forward, the same for each gradient. Causal attention: pairs·heads·batch·2(d_qk + d_v)
    forward; backward recomputes the scores as FlashAttention-2 does (arXiv:2307.08691 §3.1):
    2(3·d_qk + 2·d_v) per pair.
    Other kinds count 0: memory bandwidth bounds them. `sizes`: the op's dims on the rank, where known.
    """
    sizes = sizes or [dim.local(degrees) for dim in op.dims]
    match op.kind:
        case OpKind.MATMUL | OpKind.GROUPED_MATMUL:
            work = 2 * prod(sizes[-3:])
            return Flops(work, work, work)
        case OpKind.ATTENTION:
            batch, heads, _, _, qk_dim, v_dim = sizes
            pairs = batch * heads * (attention_pairs(op.dims[3].size, op.window) // degrees["cp"])
            return Flops(2 * pairs * (qk_dim + v_dim), 2 * pairs * (3 * qk_dim + 2 * v_dim), 0)
        case _:
            return Flops(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one op moves through device memory on one rank."""

    forward: int
    input_gradient: int
    weight_gradient: int


def traffic(op: Op, degrees: Degrees, sizes: Sequence[int] | None = None) -> Traffic:
    """Bytes moved through memory: each operand read once and each result written once per pass. `sizes` as
    for `flops`."""
    sizes = sizes or [dim.local(degrees) for dim in op.dims]
    unit = op.bytes_per_element
    match op.kind:
        case OpKind.MATMUL:
            m, n, k = sizes
            moved = (m * k + n * k + m * n) * unit
            return Traffic(moved, moved, moved)
        case OpKind.GROUPED_MATMUL:
            groups, m, n, k = sizes
            moved = (m * k + groups * n * k + m * n) * unit
            return Traffic(moved, moved, moved)
        case OpKind.ATTENTION:
            batch, heads, queries, keys, qk_dim, v_dim = sizes
            once = batch * heads * (queries * (qk_dim + v_dim) + keys * (qk_dim + v_dim)) * unit
            return Traffic(once, 2 * once, 0)
        case _:
            elements = prod(sizes)
            forward, backward = (round(2 * tensors) for tensors in op.traffic)  # in halves: stays whole
            return Traffic(elements * forward * unit // 2, elements * backward * unit // 2, 0)


def saved_tensors(ops: tuple[Op, ...], dropped: frozenset[str] = frozenset()) -> dict[str, Saved]:
    """The tensors that these ops keep from forward to backward, by name.

    `dropped` names recompute classes. An op of such a class keeps its inputs, and makes again in backward
    what it and later ops would have kept of its results.
    """
    remade = {op.makes for op in ops if op.recompute in dropped}
    kept: dict[str, Saved] = {}
    for op in ops:
        internal = () if op.recompute in dropped else op.internal
        for saved in (*op.saves, *internal):
            if saved.tensor in remade:
                continue
            known = kept.get(saved.tensor)
            kept[saved.tensor] = saved if known is None or not known.for_weight else known
    return kept
