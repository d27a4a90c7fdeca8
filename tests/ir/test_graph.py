"""The graph of a block: FLOPs, what plain PyTorch keeps for backward, and where communication stands.

Tensors carry their dims: B batch, S sequence, T = B·S tokens, H hidden, N heads, D head width, 1 for one.
"""

# ruff: noqa: N803

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.engines import engine_named
from meshwright.families import read_model
from meshwright.ir.blocks import embedding_block, head_block, layer_block
from meshwright.ir.dense import Shape
from meshwright.ir.experts import distinct_ranks, routed_tokens
from meshwright.ir.graph import (
    Block,
    CollectiveKind,
    Op,
    OpKind,
    attention_pairs,
    flops,
    saved_tensors,
    traffic,
)
from meshwright.model import Model
from meshwright.policy import EngineName

ALONE = {"tp": 1, "cp": 1, "ep": 1, "etp": 1, "sp": 1}
GATHER, SCATTER = CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER
REDUCE, EXCHANGE = CollectiveKind.ALL_REDUCE, CollectiveKind.ALL_TO_ALL
ATTENTION = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
DENSE = {**ATTENTION, "num_hidden_layers": 2, "hidden_size": 128, "vocab_size": 512, "intermediate_size": 320}
MOE = {**DENSE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
GPT = {**DENSE, "num_key_value_heads": 6, "gated": False, "norm": "layernorm"}
CATALOGUE = ("qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "mistral-7b")


def catalogued(name: str) -> Model:
    read = read_model(name, Path())
    return read if isinstance(read, Model) else Model.model_validate(read)


def shape_of(engine: EngineName = "native", **changes: Any) -> Shape:
    return replace(Shape(2, 128, 4, engine_named(engine), False, "alltoall"), **changes)


def kept(block: Block, dropped: frozenset[str] = frozenset()) -> dict[str, int]:
    """Bytes of each tensor that a block keeps on one rank that does everything."""
    sizes = saved_tensors(block.ops, dropped).items()
    return {name.removeprefix(f"{block.name}."): saved.local_bytes(ALONE) for name, saved in sizes}


def op(block: Block, name: str) -> Op:
    (found,) = (node for node in block.ops if node.name == f"{block.name}.{name}")
    return found


# --- what plain PyTorch keeps ---

torch = pytest.importorskip("torch")
F = torch.nn.functional


class FusedRmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """What the fused CUDA kernel keeps: its input and one number per row. (On a CPU, F.rms_norm is
    made of smaller ops and keeps the normalised input too: see below.)"""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        normed, inner = x * scale, grad * weight
        dx = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(x.dtype)


def rotated(x_BSND: Any, cos_S1D: Any, sin_S1D: Any) -> Any:
    first, second = x_BSND.chunk(2, -1)
    return x_BSND * cos_S1D + torch.cat((-second, first), -1) * sin_S1D


class PlainLayer:
    """A transformer layer as plain PyTorch runs it, on one process."""

    def __init__(self, model: Model, dtype: Any, norm: Any) -> None:
        self.model, self.norm, self.dtype = model, norm, dtype
        heads, keys, width = model.num_attention_heads, model.kv_heads, model.qk_head_dim
        hidden, self.weights = model.hidden_size, {}
        shapes: dict[str, tuple[int, ...]] = {"q": (heads * width, hidden), "o": (hidden, heads * width)}
        shapes |= {"k": (keys * width, hidden), "v": (keys * width, hidden)}
        shapes |= {"norm_1": (hidden,), "norm_2": (hidden,), "q_norm": (width,), "k_norm": (width,)}
        ffn, experts = (model.intermediate_size or 0,), ()
        if model.is_moe:
            ffn, experts = (model.moe_intermediate_size or 0,), (model.num_experts,)
            shapes["router"] = (model.num_experts, hidden)
        shapes |= {"gate": (*experts, *ffn, hidden), "up": (*experts, *ffn, hidden)}
        shapes["down"] = (*experts, hidden, *ffn)
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator) * 0.05
            self.weights[name] = values.to(dtype).requires_grad_()

    def attention(self, x_BSH: Any, constants: tuple[Any, Any]) -> Any:
        weights, (batch, length, _) = self.weights, x_BSH.shape
        q, k, v = (F.linear(x_BSH, weights[n]).view(batch, length, -1, self.model.qk_head_dim) for n in "qkv")
        if self.model.qk_norm == "head":
            q, k = self.norm(q, weights["q_norm"]), self.norm(k, weights["k_norm"])
        q, k = rotated(q, *constants), rotated(k, *constants)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out_BNSD = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return F.linear(out_BNSD.transpose(1, 2).reshape(batch, length, -1), weights["o"])

    def experts(self, x_TH: Any) -> Any:
        model, weights = self.model, self.weights
        scores = F.softmax(F.linear(x_TH, weights["router"]), -1, dtype=torch.float32)
        chosen, choices = torch.topk(scores, model.num_experts_per_tok, -1)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        order = torch.argsort(choices.flatten(), stable=True)
        dispatched = x_TH.index_select(0, order // model.num_experts_per_tok)
        counts = torch.bincount(choices.flatten(), minlength=model.num_experts).tolist()
        outputs = []
        for expert, rows in enumerate(dispatched.split(counts)):
            gate, up = (F.linear(rows, weights[name][expert]) for name in ("gate", "up"))
            outputs.append(F.linear(F.silu(gate) * up, weights["down"][expert]))
        at_home = torch.cat(outputs).index_select(0, torch.argsort(order))
        by_token = at_home.view(*chosen.shape, x_TH.shape[-1])
        return (by_token * chosen[..., None].to(x_TH.dtype)).sum(1)

    def __call__(self, x_BSH: Any, constants: tuple[Any, Any]) -> Any:
        weights = self.weights
        x_BSH = x_BSH + self.attention(self.norm(x_BSH, weights["norm_1"]), constants)
        normed = self.norm(x_BSH, weights["norm_2"])
        if self.model.is_moe:
            return x_BSH + self.experts(normed.view(-1, normed.shape[-1])).view_as(x_BSH)
        gate, up = (F.linear(normed, weights[name]) for name in ("gate", "up"))
        return x_BSH + F.linear(F.silu(gate) * up, weights["down"])


def saved_by(function: Any, constants: tuple[Any, ...]) -> list[tuple[int, Any]]:
    """Bytes and type of each distinct storage that autograd keeps, parameters and constants left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in constants}
    found: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found.setdefault(storage.data_ptr(), (storage.nbytes(), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # held until the count is done: a freed storage's address would be used again
    assert result.requires_grad
    return list(found.values())


def measured(model: Model, dtype: Any = torch.float32, norm: Any = FusedRmsNorm.apply) -> tuple[int, int]:
    """Bytes that autograd keeps of one layer: activations, and indices (64-bit integers)."""
    layer, (batch, length) = PlainLayer(model, dtype, norm), (2, 128)
    x_BSH = torch.randn(batch, length, model.hidden_size).to(dtype).requires_grad_()
    tables = torch.randn(2, length, 1, model.qk_head_dim).to(dtype)
    constants = (tables[0].clone(), tables[1].clone())
    found = saved_by(lambda: layer(x_BSH, constants), (*layer.weights.values(), *constants))
    indices = sum(size for size, kind in found if kind == torch.int64)
    return sum(size for size, _ in found) - indices, indices


@pytest.mark.parametrize("qk_norm", ["none", "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_layer_keeps_what_plain_pytorch_keeps(qk_norm: str, dtype: str) -> None:
    model = Model.model_validate({**DENSE, "qk_norm": qk_norm})
    unit = 4 if dtype == "float32" else 2
    graph = kept(layer_block(model, 0, shape_of(element_bytes=unit)))
    assert measured(model, getattr(torch, dtype)) == (sum(graph.values()), 0)


@pytest.mark.parametrize("qk_norm", ["none", "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_moe_layer_keeps_what_plain_pytorch_keeps(qk_norm: str, dtype: str) -> None:
    """To the byte, but for the router's arithmetic: dividing the k weights by their sum keeps them before
    (4k) and the sum (4), and the weights in the compute type are what scales the outputs."""
    model = Model.model_validate({**MOE, "qk_norm": qk_norm})
    unit, tokens, chosen = (4 if dtype == "float32" else 2), 256, 2
    graph = kept(layer_block(model, 0, shape_of(element_bytes=unit)))
    indices = {name: size for name, size in graph.items() if name.endswith((".index", ".choices"))}
    activations, integers = measured(model, getattr(torch, dtype))
    scaled = unit * chosen * tokens
    assert activations - scaled - 4 * tokens == sum(graph.values()) - sum(indices.values())
    # The graph keeps the order of a rank's experts apart from that of the exchange: one index more.
    assert integers == sum(indices.values()) - indices["moe.sort.index"] == 8 * 3 * chosen * tokens
    assert sum(graph.values()) == pytest.approx(activations + integers, rel=0.002)


def test_a_moe_block_keeps_44_bytes_a_token_and_hidden_unit_and_28_with_fused_kernels() -> None:
    """k = 2, F = 2h, gated, 2 bytes. The norm keeps its input and the router its output: 2·2. Experts keep
    their inputs and outputs, 2k·2, and gate, up, silu(gate) and their product, 4k·2·2: 44 in all. Fused
    kernels keep neither silu(gate) nor the outputs: k·2 + 3k·2·2 = 28 beside the norm's 4."""
    model = catalogued("mixtral-8x7b").model_copy(update={"moe_intermediate_size": 2 * 4096})
    hidden = 2 * 128 * model.hidden_size
    for engine, expected in (("native", 44), ("megatron", 28 + 4)):
        shape = shape_of(engine, element_bytes=2)  # type: ignore[arg-type]
        graph = kept(layer_block(model, 0, shape))
        block = sum(size for name, size in graph.items() if name.startswith(("moe.", "middle", "mlp_norm")))
        assert block / hidden == pytest.approx(expected, rel=0.01)


def test_the_cpus_rms_norm_keeps_more_than_the_fused_one() -> None:
    """F.rms_norm on a CPU decomposes and keeps the normalised rows beside the input: one more hidden-sized
    tensor a norm, which a careful runtime does not keep. The graph counts the fused kernel."""
    model, tokens = Model.model_validate(DENSE), 256

    def decomposed(x: Any, weight: Any) -> Any:
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    more = measured(model, norm=decomposed)[0] - measured(model)[0]
    assert more == 2 * tokens * 4 * model.hidden_size


def test_a_gpt_block_keeps_what_layer_norm_and_gelu_keep() -> None:
    """LayerNorm keeps its input and two numbers a row; gelu its input; each matmul its input."""
    model, batch, length, hidden, ffn = Model.model_validate(GPT), 2, 128, 128, 320
    up, down = (torch.randn(*size, requires_grad=True) for size in ((ffn, hidden), (hidden, ffn)))
    ones = torch.ones(hidden, requires_grad=True)
    x_BSH = torch.randn(batch, length, hidden, requires_grad=True)

    def feed_forward() -> Any:
        normed = F.layer_norm(x_BSH, (hidden,), ones, ones)
        return x_BSH + F.linear(F.gelu(F.linear(normed, up)), down)

    found = sum(size for size, _ in saved_by(feed_forward, (up, down, ones)))
    graph = kept(layer_block(model, 0, shape_of()))
    mine = {name: size for name, size in graph.items() if name.startswith(("mlp", "middle"))}
    assert found == sum(mine.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_keeps_one_fp32_tensor_of_the_logits_shape(dtype: str) -> None:
    """Korthikanti et al., arXiv:2205.05198 §4.3: 4sbv, in FP32; the logits themselves are not kept."""
    model, kind = Model.model_validate(DENSE), getattr(torch, dtype)
    logits = torch.randn(256, model.vocab_size).to(kind).requires_grad_()
    labels = torch.zeros(256, dtype=torch.long)
    found = saved_by(lambda: F.cross_entropy(logits.float(), labels), (labels,))
    graph = kept(head_block(model, shape_of(element_bytes=kind.itemsize)))
    assert [size for size, _ in found if size > 4] == [graph["probabilities"]] == [4 * 256 * 512]
    assert "logits" not in graph


# --- names and sizes ---


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("engine", ["native", "megatron", "torchtitan", "deepspeed"])
def test_ops_that_keep_one_tensor_agree_on_its_size(name: str, engine: EngineName) -> None:
    """Two ops that save one name keep it once: a wrong size on either side would be hidden."""
    model = catalogued(name)
    for parallel, tp in ((False, 1), (True, 1), (False, 4), (True, 4)):
        shape = shape_of(engine, sequence_parallel=parallel, tp=tp, ep=2)
        degrees = {"tp": tp, "cp": 2, "ep": 2, "etp": 1, "sp": tp if parallel else 1}
        for layer in (0, model.num_hidden_layers - 1):
            sizes: dict[str, int] = {}
            for node in layer_block(model, layer, shape).ops:
                for saved in (*node.saves, *node.internal):
                    size = saved.local_bytes(degrees)
                    assert sizes.setdefault(saved.tensor, size) == size, saved.tensor


@pytest.mark.parametrize("name", CATALOGUE)
def test_sequence_parallelism_over_one_rank_changes_nothing(name: str) -> None:
    model = catalogued(name)
    for engine in ("native", "megatron"):
        blocks = [
            layer_block(model, 3, shape_of(engine, sequence_parallel=on))  # type: ignore[arg-type]
            for on in (False, True)
        ]
        for dropped in (frozenset[str](), frozenset(("norm", "activation")), frozenset(("attention",))):
            assert kept(blocks[0], dropped) == kept(blocks[1], dropped)


def test_the_shared_experts_gate_keeps_their_output_and_its_score() -> None:
    """output · sigmoid(gate): the product needs both in backward (Megatron-LM `shared_experts.py`)."""
    shared = {**MOE, "n_shared_experts": 1, "shared_expert_gate": True}
    graph = kept(layer_block(Model.model_validate(shared), 0, shape_of()))
    plain = kept(layer_block(Model.model_validate({**shared, "shared_expert_gate": False}), 0, shape_of()))
    more = {name: size for name, size in graph.items() if name not in plain}
    assert more == {"moe.shared.out": 256 * 128 * 4, "moe.shared_gate.score": 256 * 4}


def test_the_z_loss_keeps_the_routers_logits() -> None:
    """logsumexp needs its input in backward: tokens · experts in FP32 (ST-MoE, arXiv:2202.08906)."""
    graph = kept(layer_block(Model.model_validate({**MOE, "router": {"z_loss": 1e-3}}), 0, shape_of()))
    assert graph["moe.router_logits"] == 256 * 8 * 4


def test_weights_before_the_second_matmul_replace_the_outputs_after_it() -> None:
    """Megatron-LM `experts.py`: SwiGLU and weights in one kernel keep gate, up and the weights; without a
    gate nothing is fused, and what the weights multiply is kept too."""
    for gated, also in ((True, set()), (False, {"moe.experts.unweighted"})):
        model = Model.model_validate({**MOE, "gated": gated})
        native = kept(layer_block(model, 0, shape_of()))
        megatron = kept(layer_block(model, 0, shape_of("megatron")))
        assert set(megatron) - set(native) == {"moe.experts.weights"} | also
        gone = {"moe.expert_outputs"} | ({"moe.experts.activated"} if gated else set())
        assert set(native) - set(megatron) == gone


# --- recompute ---


def test_recomputed_attention_still_keeps_its_output() -> None:
    """Korthikanti et al., arXiv:2205.05198 §5: selective recompute drops 5as²b and keeps 34sbh, in which the
    output projection's input, 2sbh, stands. Flash attention had only its statistics to drop."""
    block = layer_block(Model.model_validate(DENSE), 0, shape_of())
    whole, selective = kept(block), kept(block, frozenset(("attention",)))
    assert {name for name in whole if name not in selective} == {"attention.logsumexp"}


def test_recomputed_norms_and_activations_keep_their_inputs() -> None:
    block = layer_block(Model.model_validate(DENSE), 0, shape_of())
    whole, selective = kept(block), kept(block, frozenset(("norm", "activation")))
    norms = {f"{name}{part}" for name in ("attention_norm", "mlp_norm") for part in ("", ".statistics")}
    assert set(whole) - set(selective) == {*norms, "mlp.activated", "mlp.product"}
    assert {"in", "middle", "mlp.gate", "mlp.up"} <= set(selective)


# --- FLOPs ---


def forward_flops(block: Block) -> int:
    return sum(flops(node, ALONE).forward for node in block.ops)


def test_a_dense_layer_has_the_flops_of_the_sc21_appendix() -> None:
    """Narayanan et al., SC21, arXiv:2104.04473 appendix: a layer's forward is 24Bsh² + 4Bs²h, the logits
    2BshV. Causality leaves s(s + 1)/2 of the s² pairs."""
    gpt = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1000}
    model = Model.model_validate({**gpt, "intermediate_size": 256, "gated": False, "norm": "layernorm"})
    batch, length, hidden, vocabulary = 3, 32, 64, 1000
    shape = shape_of(micro_batch_size=batch, sequence_length=length)
    attention = 2 * batch * length * (length + 1) * hidden
    assert forward_flops(layer_block(model, 0, shape)) == 24 * batch * length * hidden**2 + attention
    assert forward_flops(head_block(model, shape)) == 2 * batch * length * hidden * vocabulary
    assert forward_flops(embedding_block(model, shape)) == 0


def test_backward_doubles_matmuls_and_remakes_the_scores() -> None:
    """Each matmul has two gradients. FlashAttention-2, arXiv:2307.08691 §3.1 and §4.1: five matmuls backward
    to two forward, so 2.5 times where keys and values have one width."""
    block = layer_block(Model.model_validate(DENSE), 0, shape_of())
    for node in block.ops:
        work = flops(node, ALONE)
        if node.kind is OpKind.ATTENTION:
            assert (work.input_gradient, work.weight_gradient) == (work.forward * 5 // 2, 0)
        else:
            assert work.input_gradient == work.weight_gradient == work.forward


def test_pytorch_counts_attention_backward_alike() -> None:
    """torch.utils.flop_counter, sdpa_backward_flop_count: not causal there, so all s² pairs."""
    counter = pytest.importorskip("torch.utils.flop_counter")
    sizes = [(2, 6, 128, 32)] * 4
    assert counter.sdpa_flop_count(*sizes[:3]) == 2 * 2 * 6 * 128**2 * (32 + 32)
    assert counter.sdpa_backward_flop_count(*sizes) == 2 * 2 * 6 * 128**2 * (3 * 32 + 2 * 32)


def test_each_chosen_expert_counts_once_a_token() -> None:
    """Three matmuls of 2hF for each of the k experts of a token, however many experts there are."""
    for experts in (8, 16):
        model = Model.model_validate({**MOE, "num_experts": experts})
        block = layer_block(model, 0, shape_of())
        routed = [node for node in block.ops if node.kind is OpKind.GROUPED_MATMUL]
        assert sum(flops(node, ALONE).forward for node in routed) == 256 * 2 * 3 * 2 * 128 * 256
        assert flops(op(block, "moe.router"), ALONE).forward == 2 * 256 * 128 * experts


def test_latent_attention_by_hand() -> None:
    """DeepSeek-V2, arXiv:2405.04434 §2.1: each low-rank matrix once a token, heads at 192 and 128 wide."""
    model = catalogued("deepseek-v3")
    batch, length, heads = 1, 128, 128
    block = layer_block(model, 0, shape_of(micro_batch_size=batch))
    matrices = 7168 * 1536 + 1536 * heads * 192 + 7168 * 576 + 512 * heads * 256 + heads * 128 * 7168
    pairs = length * (length + 1) // 2
    expected = 2 * length * matrices + 2 * heads * pairs * (192 + 128)
    feed_forward = 2 * length * 3 * 7168 * 18432
    assert forward_flops(block) == expected + feed_forward


@given(st.integers(1, 40), st.integers(1, 50))
def test_attention_pairs_are_those_that_a_mask_leaves(length: int, window: int) -> None:
    """A query sees itself and the window − 1 tokens before it (Mistral, arXiv:2310.06825 §2)."""
    seen = [(q, k) for q in range(length) for k in range(length) if k <= q and q - k < window]
    assert attention_pairs(length, window) == len(seen)
    assert attention_pairs(length, None) == length * (length + 1) // 2


def test_a_window_without_named_layers_holds_in_every_layer() -> None:
    model = catalogued("mistral-7b")
    shape = shape_of(sequence_length=8192)
    for layer in (0, 31):
        core = op(layer_block(model, layer, shape), "attention.core")
        assert core.window == model.sliding_window == 4096
        pairs = 4096 * 8192 - 4096 * 4095 // 2
        assert flops(core, ALONE).forward == 2 * 2 * 32 * pairs * 256


def test_named_layers_alone_have_a_window() -> None:
    model = catalogued("gpt-oss-20b")
    windows = [op(layer_block(model, layer, shape_of()), "attention.core").window for layer in (0, 1, 2, 3)]
    assert windows == [128, None, 128, None]


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_op_moves_bytes_in_both_directions(name: str) -> None:
    for block in (layer_block(catalogued(name), 3, shape_of()), head_block(catalogued(name), shape_of())):
        assert len({node.name for node in block.nodes}) == len(block.nodes)
        for node in block.ops:
            moved = traffic(node, ALONE)
            assert moved.forward > 0
            assert moved.input_gradient > 0


# --- communication ---


def listed(block: Block, axis: str) -> list[tuple[str, Any, Any, Any]]:
    return [
        (node.name.removeprefix(f"{block.name}."), node.forward, node.backward, node.weight_gradient)
        for node in block.collectives
        if node.axis == axis
    ]


def test_a_dense_layer_gathers_twice_and_scatters_twice_under_sequence_parallelism() -> None:
    """Korthikanti et al., arXiv:2205.05198 §4.2.2: g is an all-gather forward and a reduce-scatter backward,
    ḡ the reverse; two of each a layer. Megatron gathers again for the weight gradient instead of keeping."""
    model = Model.model_validate(DENSE)
    for engine, again in (("native", None), ("megatron", GATHER)):
        shape = shape_of(engine, sequence_parallel=True, tp=2)  # type: ignore[arg-type]
        assert listed(layer_block(model, 0, shape), "tp") == [
            ("attention.enter", GATHER, SCATTER, again),
            ("attention.leave", SCATTER, GATHER, None),
            ("mlp.enter", GATHER, SCATTER, again),
            ("mlp.leave", SCATTER, GATHER, None),
        ]


def test_a_dense_layer_reduces_twice_each_way_without_sequence_parallelism() -> None:
    """Megatron-LM, arXiv:1909.08053 §3: f is an all-reduce backward, g one forward; two of each a layer."""
    assert listed(layer_block(Model.model_validate(DENSE), 0, shape_of(tp=2)), "tp") == [
        ("attention.enter", None, REDUCE, None),
        ("attention.leave", REDUCE, None, None),
        ("mlp.enter", None, REDUCE, None),
        ("mlp.leave", REDUCE, None, None),
    ]


def test_a_norm_over_all_heads_adds_up_its_squares_over_tp() -> None:
    """OLMoE's query and key norms span all heads (arXiv:2409.02060), of which a rank has some."""
    block = layer_block(catalogued("olmoe-1b-7b"), 0, shape_of(tp=2))
    assert listed(block, "tp")[1:3] == [
        ("attention.q_norm.squares", REDUCE, REDUCE, None),
        ("attention.k_norm.squares", REDUCE, REDUCE, None),
    ]


def test_latent_attention_gathers_compressed_tokens_and_the_rotated_key() -> None:
    """Megatron-LM `multi_latent_attention.py`: q and kv up-projections gather their compressed inputs, and
    k_pos_emb is gathered by itself; the hidden states are not gathered."""
    shape = shape_of("megatron", sequence_parallel=True, tp=2)
    block = layer_block(catalogued("deepseek-v3"), 0, shape)
    sizes = {
        node.name.removeprefix("layers.0.attention."): node.dims[-1].size
        for node in block.collectives
        if node.axis == "tp" and "attention" in node.name
    }
    expected = {"q_b.enter": 1536, "kv_b.enter": 512, "rope_key.enter": 64}
    assert sizes == {**expected, "leave": 7168}
    assert [again for *_, again in listed(block, "tp")][:3] == [GATHER, GATHER, None]


def test_context_parallelism_exchanges_keys_and_values_again_in_backward() -> None:
    """A rank keeps its own keys and values, so backward needs those of the others once more, and their
    gradients go back (Ring Attention, arXiv:2310.01889)."""
    block = layer_block(Model.model_validate(DENSE), 0, shape_of("megatron"))
    assert listed(block, "cp") == [
        ("attention.exchange_k", GATHER, SCATTER, None),
        ("attention.exchange_k_again", None, GATHER, None),
        ("attention.exchange_v", GATHER, SCATTER, None),
        ("attention.exchange_v_again", None, GATHER, None),
    ]
    degrees = {**ALONE, "cp": 4}
    moved = {node.local_bytes(degrees) for node in block.collectives if node.axis == "cp"}
    assert moved == {2 * 128 * 2 * 32 * 4}
    (keys,) = (saved for saved in op(block, "attention.core").saves if saved.tensor.endswith("k_rotated"))
    assert keys.local_bytes(degrees) == 2 * 128 // 4 * 2 * 32 * 4


def test_a_moe_layer_exchanges_twice_each_way_what_its_tokens_choose() -> None:
    """GShard, arXiv:2006.16668: dispatch and combine, each T·k·h, mirrored in backward."""
    model = Model.model_validate(MOE)
    block = layer_block(model, 0, shape_of(ep=4))
    degrees = {**ALONE, "ep": 4}
    large = [node for node in block.collectives if node.axis == "ep" and node.dims[-1].name == "hidden"]
    assert [(n.name, n.forward, n.backward, n.local_bytes(degrees)) for n in large] == [
        (f"layers.0.moe.{name}", EXCHANGE, EXCHANGE, 256 * 2 * 128 * 4) for name in ("dispatch", "combine")
    ]


def test_the_allgather_dispatcher_moves_every_token_to_every_rank() -> None:
    """Megatron-LM `token_dispatcher.py`, MoEAllGatherTokenDispatcher: gather, and scatter the sums back."""
    block = layer_block(Model.model_validate(MOE), 0, shape_of(ep=4, dispatcher="allgather"))
    degrees = {**ALONE, "ep": 4}
    sizes = {
        node.name.removeprefix("layers.0.moe."): node.local_bytes(degrees)
        for node in block.collectives
        if node.axis == "ep"
    }
    assert sizes == {
        "gather_choices": 4 * 256 * 2 * 8,
        "gather_weights": 4 * 256 * 2 * 4,
        "dispatch": 4 * 256 * 128 * 4,
        "combine": 4 * 256 * 128 * 4,
    }
    kinds = {name: (forward, backward) for name, forward, backward, _ in listed(block, "ep")}
    assert kinds["moe.dispatch"] == (GATHER, SCATTER)
    assert kinds["moe.combine"] == (SCATTER, GATHER)


def test_expert_tensor_parallelism_gathers_tokens_and_scatters_sums() -> None:
    """Megatron-LM `token_dispatcher.py`: all-gather after the all-to-all, reduce-scatter before it; sorting
    then handles the gathered tokens."""
    block = layer_block(Model.model_validate(MOE), 0, shape_of(ep=2, tp=2, sequence_parallel=True))
    degrees = {"tp": 2, "cp": 1, "ep": 2, "etp": 2, "sp": 2}
    assert listed(block, "etp") == [
        ("moe.gather_counts", GATHER, None, None),
        ("moe.gather_tokens", GATHER, SCATTER, None),
        ("moe.scatter_tokens", SCATTER, GATHER, None),
    ]
    routed = 256 * 2 // 2  # this rank's tokens · k
    assert op(block, "moe.permute").dims[0].local(degrees) == routed
    for name in ("moe.sort", "moe.unsort"):
        assert op(block, name).dims[0].local(degrees) == 2 * routed


def test_a_rank_with_one_expert_sorts_nothing() -> None:
    """Megatron-LM `token_dispatcher.py`: sort_chunks_by_idxs only if num_local_experts > 1."""
    for ep, sorts in ((4, True), (8, False)):
        names = {node.name for node in layer_block(Model.model_validate(MOE), 0, shape_of(ep=ep)).nodes}
        assert ("layers.0.moe.sort" in names) is sorts
        assert ("layers.0.moe.unsort" in names) is sorts


@pytest.mark.parametrize("sizes", [(4, 2, 2), (8, 4, 2), (8, 4, 3), (12, 3, 4), (8, 8, 3)])
def test_distinct_ranks_is_the_mean_over_all_choices(sizes: tuple[int, int, int]) -> None:
    """Brute force over all C(E, k) equally likely choices of k experts from E over ep ranks."""
    experts, ep, chosen = sizes
    choices = list(combinations(range(experts), chosen))
    total = sum(len({expert // (experts // ep) for expert in choice}) for choice in choices)
    mean = float(Fraction(total, len(choices)))
    assert distinct_ranks(experts, chosen, ep) == pytest.approx(mean, rel=1e-12)


def test_deepep_sends_a_token_once_to_each_rank() -> None:
    """DeepSeek-V3: 8 of 256 experts over 64 ranks of four meet 64·(1 − Π (252 − i)/(256 − i)) = 7.68 of them
    on average. (Its limit to four groups would leave fewer; the graph does not know of it.)"""
    model = catalogued("deepseek-v3")
    sizes = {}
    for dispatcher in ("alltoall", "deepep"):
        block = layer_block(model, 5, shape_of("megatron", ep=64, dispatcher=dispatcher))
        (sent,) = (node for node in block.collectives if node.name.endswith("moe.dispatch"))
        sizes[dispatcher] = sent.local_bytes({**ALONE, "ep": 64})
    assert sizes["alltoall"] == 256 * 8 * 7168 * 4
    assert sizes["deepep"] / sizes["alltoall"] == pytest.approx(distinct_ranks(256, 8, 64) / 8, rel=1e-3)
    elsewhere = 1.0
    for drawn in range(8):
        elsewhere *= (252 - drawn) / (256 - drawn)
    assert distinct_ranks(256, 8, 64) == pytest.approx(64 * (1 - elsewhere)) == pytest.approx(7.676, abs=1e-3)


def test_capacity_and_gshard_decide_how_many_copies_are_routed() -> None:
    """GShard as fairseq's `moe` branch pads it: 2·ceil(S/E) slots for each expert; a capacity below one
    even share drops the rest; dropless is k copies a token."""
    dropless = Model.model_validate(MOE)
    assert routed_tokens(dropless, shape_of()) == 512
    dropping = Model.model_validate({**MOE, "router": {"capacity_factor": 0.5, "drop": "probs"}})
    assert routed_tokens(dropping, shape_of()) == 256
    gshard = Model.model_validate({**MOE, "num_experts": 6, "router": {"type": "gshard_top2"}})
    assert routed_tokens(gshard, shape_of(sequence_length=50)) == 2 * 17 * 6


def test_vocabulary_parallel_cross_entropy_reduces_three_numbers_a_token() -> None:
    """Megatron-LM `tensor_parallel/cross_entropy.py`: maximum, target logit, sum of exponentials."""
    block = head_block(Model.model_validate(DENSE), shape_of(tp=2))
    reduced = [node for node in block.collectives if node.name.startswith("loss.")]
    assert [(n.name, n.forward, n.backward, n.local_bytes({**ALONE, "tp": 2})) for n in reduced] == [
        (f"loss.{what}", REDUCE, None, 256 * 4) for what in ("maximum", "target", "sum")
    ]


def test_the_vocabulary_is_padded_as_the_engine_pads_it() -> None:
    """Megatron-LM: to a multiple of 128·tp (GPT-2's 50,257 becomes 50,304, or 51,200 with tp 8)."""
    model = Model.model_validate({**DENSE, "vocab_size": 50257})
    for engine, tp, padded in (("megatron", 1, 50304), ("megatron", 8, 51200), ("native", 8, 50264)):
        shape = shape_of(engine, tp=tp)  # type: ignore[arg-type]
        (head,) = (node for node in head_block(model, shape).ops if node.name == "head")
        assert head.dims[1].size == padded


def test_a_gated_activation_moves_more_in_two_ops_than_in_one() -> None:
    """Fused, forward reads gate and up and writes their product (3), backward reads those and the gradient
    and writes two (5). As two ops: silu 2 and product 3 forward; backward 3 for silu, 3 for each factor."""
    for engine, counts in (("megatron", (3, 5)), ("native", (5, 9))):
        block = layer_block(Model.model_validate(DENSE), 0, shape_of(engine))  # type: ignore[arg-type]
        moved = traffic(op(block, "mlp.activation"), ALONE)
        tensor = 256 * 320 * 4
        assert (moved.forward, moved.input_gradient) == (counts[0] * tensor, counts[1] * tensor)
