"""The expert layer as nodes: router, shared experts, dispatch, routed experts, combine."""

from __future__ import annotations

from dataclasses import replace
from math import comb

from meshwright.ir.dense import Shape, activation, matmul, mlp, norm_op
from meshwright.ir.elementwise import rounded_up
from meshwright.ir.graph import Collective, CollectiveKind, Dim, Node, Op, OpKind, Saved
from meshwright.model import Model

GATHER = CollectiveKind.ALL_GATHER
SCATTER = CollectiveKind.REDUCE_SCATTER
REDUCE = CollectiveKind.ALL_REDUCE
EXCHANGE = CollectiveKind.ALL_TO_ALL


def moe(model: Model, name: str, shape: Shape) -> list[Node]:
    """Norm, router, shared experts, dispatch, routed experts, combine."""
    layer = name.rsplit(".", 1)[0]
    hidden, experts = Dim("hidden", model.hidden_size), Dim("experts", model.num_experts)
    tokens, unit, norm = shape.scattered, shape.element_bytes, f"{layer}.mlp_norm"
    normed = Saved(norm, (tokens, hidden), unit, for_weight=True)
    nodes: list[Node] = [
        norm_op(model, norm, f"{layer}.middle", shape),
        matmul(f"{name}.router", tokens, experts, hidden, normed, unit, model.router.bias),
        _route(model, name, experts, shape),
    ]
    if model.router.aux_loss:
        by_sequence = model.router.aux_loss_scope == "sequence" and model.router.type != "gshard_top2"
        sums = (Dim("sequences", 2 * shape.micro_batch_size if by_sequence else 2), experts)
        axes = ("tp", "cp") if shape.sequence_parallel else ("cp",)
        nodes += [Collective(f"{name}.balance_{axis}", axis, REDUCE, None, sums, 4) for axis in axes]
    if model.shared_width:
        nodes += mlp(model, f"{name}.shared", model.shared_width, shape, source=norm, shared=True)
    if model.shared_width and model.shared_expert_gate:
        nodes.append(matmul(f"{name}.shared_gate", tokens, Dim("one", 1), hidden, normed, unit))
        nodes.append(_scale_shared(name, hidden, shape))
    nodes += [*_dispatch(model, name, shape), *_experts(model, name, shape), *_combine(model, name, shape)]
    if model.shared_width:
        add = Op(f"{name}.add_shared", OpKind.ELEMENTWISE, (tokens, hidden), traffic=(3.0, 1.0))
        nodes.append(replace(add, bytes_per_element=unit))
    return nodes


def _route(model: Model, name: str, experts: Dim, shape: Shape) -> Op:
    """Scores, the choice of experts and their weights, in FP32; the z-loss also keeps the logits."""
    tokens, chosen = shape.scattered, Dim("top_k", model.num_experts_per_tok)
    logits = (Saved(f"{name}.router_logits", (tokens, experts), 4),) if model.router.z_loss else ()
    return Op(
        f"{name}.route",
        OpKind.ROUTE,
        (tokens, experts),
        saves=logits,
        internal=(
            Saved(f"{name}.scores", (tokens, experts), 4),
            Saved(f"{name}.choices", (tokens, chosen), 8),
            Saved(f"{name}.weights", (tokens, chosen), 4),
        ),
        bytes_per_element=4,
        traffic=(4.0, 4.0),
    )


def _scale_shared(name: str, hidden: Dim, shape: Shape) -> Op:
    """The shared experts' output times sigmoid of its gate, which keeps both (Qwen1.5-MoE)."""
    tokens, unit = shape.scattered, shape.element_bytes
    return Op(
        f"{name}.shared_scale",
        OpKind.ELEMENTWISE,
        (tokens, hidden),
        saves=(Saved(f"{name}.shared.out", (tokens, hidden), unit),),
        internal=(Saved(f"{name}.shared_gate.score", (tokens,), unit),),
        bytes_per_element=unit,
        traffic=(2.0, 3.0),
    )


def routed_tokens(model: Model, shape: Shape) -> int:
    """Token copies that the experts of a whole stage process for one micro-batch under balanced routing.

    Dropless: tokens·k. Capacity: each expert takes min(1, factor) of its even share. GShard top-2 pads
    every expert to its capacity, 2·ceil(S/E) slots (fairseq branch `moe`, top2gate.py).
    """
    even = shape.tokens * model.num_experts_per_tok
    if model.router.type == "gshard_top2":
        return 2 * -(-shape.tokens // model.num_experts) * model.num_experts
    factor = model.router.capacity_factor
    return even if factor is None else rounded_up(even * min(1.0, factor))


def distinct_ranks(num_experts: int, top_k: int, ep: int) -> float:
    """Mean number of ranks that hold at least one of k experts drawn without repetition from E over ep
    ranks: ep·(1 − C(E − E/ep, k)/C(E, k))."""
    elsewhere = comb(num_experts - num_experts // ep, top_k) / comb(num_experts, top_k)
    return ep * (1 - elsewhere)


def _sends_by_rank(shape: Shape) -> bool:
    """Whether the dispatcher sends a token once to each rank: DeepEP and HybridEP. Their kernels read tokens
    where they stand and add up what comes back, so that the source neither permutes nor combines
    (deepseek-ai/DeepEP, README: `dispatch` takes x as it is, `combine` reduces)."""
    return shape.dispatcher in ("deepep", "hybridep")


def _sent(model: Model, shape: Shape) -> Dim:
    """Token copies that leave a stage's ranks: one per chosen expert, or one per distinct rank with the
    dispatchers that send a token once to each rank (DeepEP, HybridEP)."""
    copies = routed_tokens(model, shape)
    if _sends_by_rank(shape):
        share = (
            distinct_ranks(model.num_experts, model.num_experts_per_tok, shape.ep) / model.num_experts_per_tok
        )
        copies = rounded_up(copies * min(1.0, share))
    return Dim("sent", copies, ("cp", "sp"))


def _dispatch(model: Model, name: str, shape: Shape) -> list[Node]:
    hidden, unit = Dim("hidden", model.hidden_size), shape.element_bytes
    chosen = Dim("top_k", model.num_experts_per_tok)
    routed = Dim("routed", routed_tokens(model, shape), ("cp", "sp"))
    if shape.dispatcher == "allgather":
        everyone = Dim("tokens", shape.tokens, ("cp", "sp"), times=("ep",))
        return [
            Collective(f"{name}.gather_choices", "ep", GATHER, None, (everyone, chosen), 8),
            Collective(f"{name}.gather_weights", "ep", GATHER, SCATTER, (everyone, chosen), 4),
            Collective(f"{name}.dispatch", "ep", GATHER, SCATTER, (everyone, hidden), unit),
            *_tensor_gather(name, hidden, unit, routed, Dim("experts", model.num_experts, ("ep",))),
            _permute(f"{name}.permute", replace(routed, times=("etp",)), hidden, unit),
        ]
    nodes: list[Node] = [
        Collective(f"{name}.counts", "ep", EXCHANGE, None, (Dim("experts", model.num_experts),), 8),
        *([] if _sends_by_rank(shape) else [_permute(f"{name}.permute", routed, hidden, unit)]),
        Collective(f"{name}.dispatch", "ep", EXCHANGE, EXCHANGE, (_sent(model, shape), hidden), unit),
    ]
    if shape.engine.probs_before_down.value:
        nodes.append(
            Collective(f"{name}.dispatch_weights", "ep", EXCHANGE, EXCHANGE, (_sent(model, shape),), 4)
        )
    nodes += _tensor_gather(name, hidden, unit, routed, Dim("experts", model.num_experts))
    return [*nodes, *_by_local_expert(model, f"{name}.sort", hidden, shape)]


def _by_local_expert(model: Model, name: str, hidden: Dim, shape: Shape) -> list[Node]:
    """Between the order in which ranks send tokens and the order of a rank's experts, if it has several."""
    if model.num_experts == shape.ep:
        return []
    tokens = Dim("routed", routed_tokens(model, shape), ("cp", "sp"), times=("etp",))
    return [_permute(name, tokens, hidden, shape.element_bytes)]


def _tensor_gather(name: str, hidden: Dim, unit: int, routed: Dim, counted: Dim) -> list[Node]:
    """Expert tensor parallelism: its ranks gather one another's tokens, and scatter the partial sums back.
    How many there are for each expert goes first (Megatron-LM `transformer/moe/token_dispatcher.py`)."""
    gathered = replace(routed, times=("etp",))
    return [
        Collective(f"{name}.gather_counts", "etp", GATHER, None, (replace(counted, times=("etp",)),), 8),
        Collective(f"{name}.gather_tokens", "etp", GATHER, SCATTER, (gathered, hidden), unit),
    ]


def _experts(model: Model, name: str, shape: Shape) -> list[Node]:
    hidden, unit = Dim("hidden", model.hidden_size), shape.element_bytes
    groups = Dim("experts", model.num_experts, ("ep",))
    tokens = Dim("routed", routed_tokens(model, shape), ("cp", "sp"), times=("etp",))
    inner = Dim("ffn", model.moe_intermediate_size or 0, ("etp",))
    kept = shape.kept_input_bytes
    dispatched = Saved(f"{name}.dispatched", (tokens, hidden), kept, for_weight=True)
    nodes: list[Node] = []
    for letter in ("gate", "up") if model.gated else ("up",):
        nodes.append(
            _grouped(model, f"{name}.experts", letter, (groups, tokens, inner, hidden), dispatched, unit)
        )
    weighted = shape.engine.probs_before_down.value
    nodes.append(activation(model, f"{name}.experts", tokens, inner, shape, weighted))
    product = Saved(f"{name}.experts.product", (tokens, inner), kept, for_weight=True)
    nodes.append(_grouped(model, f"{name}.experts", "down", (groups, tokens, hidden, inner), product, unit))
    return nodes


def _grouped(model: Model, name: str, letter: str, dims: tuple[Dim, ...], saved: Saved, unit: int) -> Op:
    params = (f"{name}.{letter}", f"{name}.{letter}_bias") if model.expert_bias else (f"{name}.{letter}",)
    return Op(f"{name}.{letter}", OpKind.GROUPED_MATMUL, dims, params, saves=(saved,), bytes_per_element=unit)


def _combine(model: Model, name: str, shape: Shape) -> list[Node]:
    hidden, unit = Dim("hidden", model.hidden_size), shape.element_bytes
    routed = Dim("routed", routed_tokens(model, shape), ("cp", "sp"))
    gathered = replace(routed, times=("etp",))
    weigh_saves: tuple[Saved, ...] = ()
    if not shape.engine.probs_before_down.value:
        weigh_saves = (Saved(f"{name}.expert_outputs", (routed, hidden), unit),)
    weigh = Op(
        f"{name}.combine_tokens",
        OpKind.PERMUTE,
        (routed, hidden),
        saves=weigh_saves,
        bytes_per_element=unit,
        traffic=(1.5, 2.5),
    )
    scatter = Collective(f"{name}.scatter_tokens", "etp", SCATTER, GATHER, (gathered, hidden), unit)
    if shape.dispatcher == "allgather":
        everyone = Dim("tokens", shape.tokens, ("cp", "sp"), times=("ep",))
        return [
            scatter,
            weigh,
            Collective(f"{name}.combine", "ep", SCATTER, GATHER, (everyone, hidden), unit),
        ]
    return [
        *_by_local_expert(model, f"{name}.unsort", hidden, shape),
        scatter,
        Collective(f"{name}.combine", "ep", EXCHANGE, EXCHANGE, (_sent(model, shape), hidden), unit),
        *([] if _sends_by_rank(shape) and shape.engine.probs_before_down.value else [weigh]),
    ]


def _permute(name: str, tokens: Dim, hidden: Dim, unit: int) -> Op:
    index = Saved(f"{name}.index", (tokens,), 8)
    return Op(
        name, OpKind.PERMUTE, (tokens, hidden), internal=(index,), bytes_per_element=unit, traffic=(2.0, 2.0)
    )
