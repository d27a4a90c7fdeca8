"""A plan lowered to its ranks: together they do the model's work, and speak as often as papers say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.deployment import deployment_from
from meshwright.ir.blocks import layer_block
from meshwright.ir.graph import Block, CollectiveKind
from meshwright.ir.parameters import count_parameters, parameters
from meshwright.ir.program import LoweredBlock, Program, degrees_of, lower, lower_block, model_flops, shape_of
from meshwright.ir.sharding import local_numel
from meshwright.ir.tasks import CommTask, ComputeTask, Task
from meshwright.plan import Plan, resolve
from meshwright.verify import verify

LINKS = [{"name": "node", "kind": "nvlink", "bandwidth": "450 GB/s", "latency": "3 us"}]
DENSE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "vocab_size": 1024,  # a multiple of 128·tp, so that padding adds nothing
    "intermediate_size": 96,
}
MOE = {**DENSE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def plan_of(
    model: dict[str, Any] | str,
    layout: dict[str, int] | None = None,
    batch: int = 8,
    length: int = 64,
    precision: str = "bf16",
    **policy: Any,
) -> Plan:
    degrees = {"tp": 1, "cp": 1, "pp": 1, "ep": 1, "etp": 1, "dp": 1, **(layout or {})}
    world = prod(degrees[axis] for axis in ("tp", "cp", "dp", "pp"))
    document = {
        "cluster": {"nodes": 1, "gpus_per_node": world, "gpu": "h100-sxm", "links": LINKS},
        "model": model,
        "workload": {"global_batch_size": batch, "sequence_length": length, "precision": precision},
        "layout": degrees,
        "policy": {"engine": "megatron", **policy},
    }
    return resolve(deployment_from(document, Path()))


def comms(tasks: Iterable[Task]) -> list[CommTask]:
    return [task for task in tasks if isinstance(task, CommTask)]


def ring_bytes(task: CommTask) -> float:
    """Bytes that each rank sends: (n − 1)/n of the buffer, twice for an all-reduce (arXiv:1910.02054 §7)."""
    times = 2 if task.kind is CollectiveKind.ALL_REDUCE else 1
    return times * task.bytes * (task.num_ranks - 1) / task.num_ranks


def errors(plan: Plan) -> list[str]:
    return [finding.rule for finding in verify(plan) if finding.level == "error"]


# --- FLOPs: all ranks together ---


def ranks_forward_flops(program: Program) -> int:
    """Forward FLOPs of all ranks over one step."""
    layout = program.plan.layout
    per_stage = layout.tp * layout.cp * layout.dp * program.plan.num_micro_batches
    return per_stage * sum(block.flops().forward for stage in program.stages for block in stage.blocks)


def whole_forward_flops(plan: Plan) -> int:
    """The same by hand: 2 FLOPs for each weight that a token meets, and 2·(d_qk + d_v) for each of the
    s(s + 1)/2 query-key pairs of a head (SC21, arXiv:2104.04473 appendix, halved for causality)."""
    model, batch = plan.model, plan.workload.global_batch_size
    length = plan.workload.max_sequence_length
    met = 0
    for param in parameters(model):
        is_matrix = len(param.shape) > 1 and param.part != "embedding"
        share = model.num_experts_per_tok / model.num_experts if param.is_expert else 1
        met += round(param.numel * share) if is_matrix else 0
    met += model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0
    widths = model.num_attention_heads * (model.qk_head_dim + model.value_head_dim)
    pairs = model.num_hidden_layers * length * (length + 1) // 2
    return batch * (2 * length * met + 2 * pairs * widths)


@st.composite
def dividing_plans(draw: st.DrawFn) -> Plan:
    """Layouts and models in which every size divides by every degree that cuts it."""
    tp, cp, dp, pp = (draw(st.sampled_from(sizes)) for sizes in ([1, 2, 4], [1, 2], [1, 2], [1, 2, 4]))
    ranks = tp * cp * dp
    layout = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
    is_moe = draw(st.booleans())
    model = dict(MOE if is_moe else DENSE)
    model["tie_word_embeddings"] = draw(st.booleans())
    if draw(st.booleans()):
        model |= {**LATENT, "q_lora_rank": draw(st.sampled_from([None, 24]))}
    else:
        model |= {"num_key_value_heads": draw(st.sampled_from([4, 8]))}
    sequence_parallel = tp > 1 and (is_moe or "kv_lora_rank" in model or draw(st.booleans()))
    dispatcher = "alltoall"
    if is_moe:
        layout["etp"] = draw(st.sampled_from([n for n in (1, 2, 4) if ranks % n == 0]))
        layout["ep"] = draw(st.sampled_from([n for n in (1, 2, 4, 8) if ranks % (n * layout["etp"]) == 0]))
        model |= {"n_shared_experts": draw(st.integers(0, 1)), "shared_expert_gate": draw(st.booleans())}
        model |= {"first_k_dense_replace": draw(st.integers(0, 2)), "gated": draw(st.booleans())}
        dispatcher = draw(st.sampled_from(["alltoall", "allgather", "deepep"]))
    policy = {"sequence_parallel": sequence_parallel, "dispatcher": dispatcher}
    return plan_of(model, layout, **policy)


@settings(max_examples=100, deadline=None)
@given(dividing_plans())
def test_the_ranks_together_do_the_work_of_the_whole_model(plan: Plan) -> None:
    assert errors(plan) == []
    assert ranks_forward_flops(lower(plan)) == whole_forward_flops(plan)


@settings(max_examples=30, deadline=None)
@given(dividing_plans())
def test_a_step_has_the_flops_of_the_model_however_it_is_cut(plan: Plan) -> None:
    """model_flops describes one process; forward over all ranks of any layout adds up to a third of it."""
    layout = plan.layout
    per_stage = layout.tp * layout.cp * layout.dp * plan.num_micro_batches
    program = lower(plan)
    forward = sum(block.flops().forward for stage in program.stages for block in stage.blocks)
    assert 3 * per_stage * forward == model_flops(plan, plan.workload.max_sequence_length)


def test_latent_down_projections_repeat_without_sequence_parallelism() -> None:
    """Their weights are whole on each rank of tp, which then all work on the same tokens: (tp − 1) times
    2·(h·q_rank + h·(kv_rank + rope)) more for each token and layer."""
    model = {**DENSE, **LATENT}
    plan = plan_of(model, {"tp": 4}, sequence_parallel=False)
    repeated = 3 * 2 * 64 * (24 + 16 + 4) * 4 * 8 * 64
    assert ranks_forward_flops(lower(plan)) - whole_forward_flops(plan) == repeated
    parallel = plan_of(model, {"tp": 4}, sequence_parallel=True)
    assert ranks_forward_flops(lower(parallel)) == whole_forward_flops(parallel)


def test_replicated_key_value_heads_repeat_their_projections() -> None:
    """Two heads on eight ranks: each is computed four times, so three times more than needed."""
    plan = plan_of({**DENSE, "num_key_value_heads": 2}, {"tp": 8})
    repeated = 3 * 2 * 2 * 64 * (2 * 8) * 4 * 8 * 64  # k and v, 2·h·(heads · width), layers, tokens
    assert ranks_forward_flops(lower(plan)) - whole_forward_flops(plan) == repeated


# --- parameters: all stages together ---


@settings(max_examples=40, deadline=None)
@given(
    pp=st.sampled_from([1, 2, 4]),
    schedule=st.sampled_from(["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"]),
    tied=st.booleans(),
    layers=st.integers(8, 11),
)
def test_stages_hold_every_parameter_once_and_a_tied_table_twice(
    pp: int, schedule: str, tied: bool, layers: int
) -> None:
    model = {**MOE, "tie_word_embeddings": tied, "num_hidden_layers": layers}
    plan = plan_of(model, {"pp": pp}, engine="native", schedule=schedule)
    program = lower(plan)
    held = Counter(param.name for stage in program.stages for param in stage.params)
    expected = Counter(param.name for param in parameters(plan.model))
    if tied and len(program.stages) > 1:
        expected["embedding.weight"] += 1
    assert held == expected
    assert sorted(n for stage in program.stages for n in stage.layers) == list(range(layers))
    total = sum(param.numel for stage in program.stages for param in stage.params)
    extra = plan.model.vocab_size * plan.model.hidden_size if sum(held.values()) > len(held) else 0
    assert total == count_parameters(plan.model).total + extra


def test_a_v_puts_embedding_and_head_on_the_first_rank() -> None:
    """arXiv:2401.10241 §6: the first rank holds the first and the last stage."""
    model = {**DENSE, "num_hidden_layers": 8}
    for schedule in ("ZBVZeroBubble", "DualPipeV"):
        program = lower(plan_of(model, {"pp": 4}, engine="native", schedule=schedule))
        assert [stage.rank for stage in program.stages] == [0, 1, 2, 3, 3, 2, 1, 0]
        first, *others = (program.stages_of(rank) for rank in range(4))
        assert (first[0].has_embedding, first[1].has_head) == (True, True)
        assert not any(s.has_embedding or s.has_head for stages in others for s in stages)


# --- pipelines ---


@pytest.mark.parametrize(
    ("schedule", "pp", "vpp", "crossings"),
    [
        ("GPipe", 4, 1, 3),
        ("1F1B", 4, 1, 3),
        ("Interleaved1F1B", 4, 2, 7),  # p·v − 1 boundaries, each between ranks
        ("ZBVZeroBubble", 4, 2, 6),  # 2p − 1, but the turn of the V stays on the last rank
        ("DualPipeV", 4, 2, 6),
        ("DualPipeV", 1, 2, 0),
    ],
)
def test_activations_cross_every_boundary_between_ranks(
    schedule: str, pp: int, vpp: int, crossings: int
) -> None:
    """SC21, arXiv:2104.04473 §3.2: b·s·h between stages each way; interleaving sends v times as often."""
    layout = {"pp": pp, "vpp": vpp, "tp": 2, "cp": 1}
    plan = plan_of({**DENSE, "num_hidden_layers": 8}, layout, engine="native", schedule=schedule)
    sends = [task for stage in lower(plan).stages for task in stage.sends]
    phases = Counter(task.phase for task in sends)
    assert phases == ({"forward": crossings, "input_gradient": crossings} if crossings else {})
    assert {task.bytes for task in sends} <= {64 // 2 * 64 * 2}  # this rank's half of the sequence
    assert {task.kind for task in sends} <= {CollectiveKind.SEND_RECV}


def test_uneven_layers_stand_where_the_plan_puts_them() -> None:
    plan = plan_of({**DENSE, "num_hidden_layers": 7}, {"pp": 3}, layers_per_stage=(1, 4, 2))
    program = lower(plan)
    assert [stage.layers for stage in program.stages] == [(0,), (1, 2, 3, 4), (5, 6)]
    assert [block.name for block in program.stages[1].blocks] == [f"layers.{n}" for n in (1, 2, 3, 4)]
    names = {task.name.rsplit(".attention", 1)[0] for task in program.stages[1].blocks[2].tasks}
    assert all(name.startswith("layers.3") for name in names)


def test_equal_layers_are_lowered_once_and_named_for_their_own_place() -> None:
    program = lower(plan_of({**MOE, "first_k_dense_replace": 2}))
    blocks = {block.name: block for block in program.stages[0].blocks}
    for layer, twin in ((0, 1), (2, 3)):
        alone = lower_block(program.plan, layer_block(program.plan.model, twin, shape_of(program.plan)))
        assert alone == blocks[f"layers.{twin}"]
        assert blocks[f"layers.{layer}"].saved_bytes == alone.saved_bytes


# --- groups of one rank ---


def test_nothing_is_communicated_on_axes_of_one_rank() -> None:
    for model in (DENSE, {**MOE, "n_shared_experts": 1, "router": {"aux_loss": 1e-3}}):
        program = lower(plan_of(model))
        assert list(program.collectives(0)) == []


@settings(max_examples=40, deadline=None)
@given(dividing_plans())
def test_every_group_has_the_size_of_its_axis(plan: Plan) -> None:
    program = lower(plan)
    layout = plan.layout
    sizes = {axis: layout.size(axis) for axis in ("tp", "cp", "ep", "etp", "edp", "dp_cp", "pp")}
    sizes |= {"embedding": 2, "world": layout.world_size}
    for rank in range(layout.pp):
        for task, times in program.collectives(rank):
            assert task.num_ranks > 1
            assert task.bytes > 0
            assert task.num_ranks == sizes[task.axis], task
            is_gather = task.name.endswith((".gather_dense", ".gather_experts"))
            if is_gather and layout.pp > 1:  # what a backward gathered, the next forward finds
                assert 1 <= times <= plan.num_micro_batches
            else:
                assert times == (1 if task.phase == "step" else plan.num_micro_batches)


# --- bytes on the wire ---


def test_tensor_parallel_traffic_is_four_tensors_a_layer_and_direction() -> None:
    """arXiv:2205.05198 §4.2.2: sequence parallelism moves what the all-reduces moved, in two halves: a ring
    all-reduce is a reduce-scatter and an all-gather. 4 of each half a layer, of b·s·h."""
    width = 8 * 64 * 64 * 2
    for parallel, kinds in ((False, {CollectiveKind.ALL_REDUCE}), (True, None)):
        plan = plan_of(DENSE, {"tp": 4}, micro_batch_size=8, sequence_parallel=parallel, engine="deepspeed")
        block = lower(plan).stages[0].blocks[1]
        over_tp = [task for task in comms(block.tasks) if task.axis == "tp"]
        assert {task.bytes for task in over_tp} == {width}
        assert sum(map(ring_bytes, over_tp)) == 8 * width * 3 / 4
        assert kinds is None or {task.kind for task in over_tp} == kinds


def test_experts_exchange_their_tokens_each_way() -> None:
    """T·k·h elements of this rank's tokens, for dispatch and combine, forward and backward."""
    layout = {"dp": 2, "tp": 2, "ep": 4}
    plan = plan_of(MOE, layout, engine="native", micro_batch_size=4)
    block = lower(plan).stages[0].blocks[1]
    tokens = 4 * 64 // 2  # sequence parallelism gives each rank of tp half of them
    large = [task for task in comms(block.tasks) if task.axis == "ep" and not task.name.endswith("counts")]
    assert [(t.phase, t.bytes) for t in large] == [
        (phase, tokens * 2 * 64 * 2) for _ in "dc" for phase in ("forward", "input_gradient")
    ]


@pytest.mark.parametrize(("zero_stage", "volume"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_zero_moves_two_parameters_each_and_stage_3_three(zero_stage: int, volume: int) -> None:
    """Rajbhandari et al., arXiv:1910.02054 §7: 2Ψ for an all-reduce and for ZeRO 1 and 2, 3Ψ for stage 3:
    gather for forward, gather for backward, reduce-scatter. In 2-byte gradients, one micro-batch."""
    ranks = 4
    plan = plan_of(DENSE, {"dp": ranks}, batch=4, engine="deepspeed", zero_stage=zero_stage)
    assert plan.num_micro_batches == 1
    program = lower(plan)
    moved = sum(ring_bytes(task) * times for task, times in program.collectives(0) if task.bytes > 8)
    size = 2 * count_parameters(plan.model).total
    assert moved == pytest.approx(volume * size * (ranks - 1) / ranks, rel=1e-12)


def test_zero_3_gathers_each_block_before_each_pass() -> None:
    """PyTorch FSDP2 gathers a block's parameters before its forward and again before its backward, for each
    micro-batch; experts over the ranks that hold the same experts."""
    plan = plan_of(MOE, {"dp": 4, "ep": 2}, engine="native", zero_stage=3, batch=8)
    program = lower(plan)
    block = program.stages[0].blocks[1]
    gathers = [t for t in comms(block.tasks) if t.kind is CollectiveKind.ALL_GATHER]
    assert [(t.name.rsplit(".", 1)[1], t.phase, t.axis, t.num_ranks) for t in gathers] == [
        ("gather_dense", "forward", "dp_cp", 4),
        ("gather_dense", "input_gradient", "dp_cp", 4),
        ("gather_experts", "forward", "edp", 2),
        ("gather_experts", "input_gradient", "edp", 2),
    ]
    own = [p for p in program.stages[0].params if p.name.startswith("layers.0.")]
    for expert, size in ((False, gathers[0].bytes), (True, gathers[2].bytes)):
        assert size == 2 * sum(local_numel(p, plan.layout) for p in own if p.is_expert is expert)
    assert [t.name for t in program.step[0] if t.name.startswith("parameters")] == []


def test_zero_3_under_1f1b_gathers_what_no_backward_left_whole() -> None:
    """torch 2.13 pipelining: a forward divides, a backward does not. Rank r has P − r forwards before its
    first backward; then each forward finds the parameters whole, until none is left."""
    program = lower(plan_of(DENSE, {"dp": 2, "pp": 2}, engine="native", zero_stage=3, batch=16))
    count = program.plan.num_micro_batches
    assert count == 8
    for rank in range(2):
        times = {t.phase: n for t, n in program.collectives(rank) if t.name.endswith(".gather_dense")}
        assert times == {"forward": 2 - rank, "input_gradient": count - (2 - rank) + 1}


def test_pytorch_keeps_gathered_under_a_pipeline_what_a_backward_gathered(tmp_path: Path) -> None:
    """Four processes of PyTorch: whole after every backward, divided after every forward and after the step,
    gathered as often as the program says."""
    pytest.importorskip("torch")
    script = Path(__file__).with_name("zero_3_pipeline.py")
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    program = lower(plan_of(DENSE, {"dp": 2, "pp": 2}, engine="native", zero_stage=3, batch=8))
    assert program.plan.num_micro_batches == 4
    for position, seen, whole_after_step in json.loads(done.stdout):
        assert not whole_after_step
        assert all(after == (name == "backward") for name, _, after in seen)
        gathered = Counter(name for name, before, _ in seen if not before)
        counted = {t.phase: n for t, n in program.collectives(position) if t.name.endswith("gather_dense")}
        assert counted == {"forward": gathered["forward"], "input_gradient": gathered["backward"]}


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("engine", ["native", "torchtitan", "deepspeed"])
def test_gradients_are_reduced_as_often_as_the_engine_does(engine: str, zero_stage: int) -> None:
    """Every backward (DeepSpeed #2252, torchtitan #1710) or once per step; the same bytes each time."""
    plan = plan_of(
        {**MOE, "tie_word_embeddings": True},
        {"dp": 4, "ep": 2},
        engine=engine,
        zero_stage=zero_stage,
        batch=16,
    )
    scatter, program = CollectiveKind.REDUCE_SCATTER, lower(plan)
    times = 1 if engine == "native" else plan.num_micro_batches
    reduced: Counter[str] = Counter()
    for task, number in program.collectives(0):
        if task.kind is scatter and task.axis in ("dp_cp", "edp"):
            assert number == times
            reduced[task.axis] += task.bytes
    params = {p.name: p for p in program.stages[0].params}.values()
    width = program.engine.gradient_bytes.value
    for axis, expert in (("dp_cp", False), ("edp", True)):
        held = sum(local_numel(p, plan.layout) for p in params if p.is_expert is expert)
        assert reduced[axis] == width * held


@pytest.mark.parametrize(
    ("engine", "pp", "per_step"), [("torchtitan", 1, 8), ("torchtitan", 2, 1), ("deepspeed", 1, 1)]
)
def test_zero_2_gathers_parameters_per_step_or_where_fsdp2_divided_them(
    engine: str, pp: int, per_step: int
) -> None:
    """FSDP2 divides its parameters again after each backward that reduces; a pipeline after its last."""
    program = lower(plan_of(DENSE, {"dp": 2, "pp": pp}, engine=engine, zero_stage=2, batch=16))
    gathers = [
        (t, n) for t, n in program.collectives(0) if t.kind is CollectiveKind.ALL_GATHER and t.axis == "dp_cp"
    ]
    assert {n for _, n in gathers} == {per_step}
    held = sum(local_numel(p, program.plan.layout) for s in program.stages_of(0) for p in s.params)
    assert sum(t.bytes for t, _ in gathers) == 2 * held


def test_experts_and_dense_parameters_reduce_over_their_own_replicas() -> None:
    """Megatron-LM: dense gradients over dp·cp, expert gradients over edp = world / (etp·ep·pp)."""
    plan = plan_of(MOE, {"tp": 2, "cp": 2, "dp": 2, "ep": 4}, zero_stage=1)
    program = lower(plan)
    reduced = {t.name: (t.kind, t.axis, t.num_ranks, t.bytes) for t in program.step[0]}
    held = {
        expert: sum(local_numel(p, plan.layout) for p in program.stages[0].params if p.is_expert is expert)
        for expert in (False, True)
    }
    scatter, gather = CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_GATHER
    assert reduced["gradients.dense"] == (scatter, "dp_cp", 4, 4 * held[False])
    assert reduced["parameters.dense"] == (gather, "dp_cp", 4, 2 * held[False])
    assert reduced["gradients.experts"] == (scatter, "edp", 2, 4 * held[True])
    assert reduced["parameters.experts"] == (gather, "edp", 2, 2 * held[True])


# --- gradients that no axis of the data reduces ---


def step_bytes(plan: Plan, rank: int = 0) -> dict[str, tuple[str, int, int]]:
    return {t.name: (t.axis, t.num_ranks, t.bytes) for t in lower(plan).step[rank]}


def test_sequence_parallelism_leaves_partial_gradients_to_add_up_over_tp() -> None:
    """Megatron-LM `finalize_model_grads.py`: gradients of norms and router are summed over tp."""
    by_hand = 4 * (2 * 64 + 8 * 64) + 64  # each layer's two norms and router, and the last norm
    found = step_bytes(plan_of(MOE, {"tp": 2}))
    assert found["gradients.partial"] == ("tp", 2, 4 * by_hand)
    assert "gradients.partial" not in step_bytes(plan_of(DENSE, {"tp": 2}, sequence_parallel=False))


def test_norms_that_heads_share_are_partial_even_without_sequence_parallelism() -> None:
    """Megatron-LM `finalize_model_grads.py` sums q_layernorm and k_layernorm whenever there are any."""
    plan = plan_of({**DENSE, "qk_norm": "head"}, {"tp": 2}, sequence_parallel=False)
    assert step_bytes(plan)["gradients.partial"] == ("tp", 2, 4 * 4 * 2 * 8)


def test_ranks_that_hold_the_same_key_value_heads_add_up_their_gradients() -> None:
    """Each rank saw the queries of its own heads alone."""
    plan = plan_of({**DENSE, "num_key_value_heads": 2}, {"tp": 8})
    assert step_bytes(plan)["gradients.replicated_heads"] == ("tp", 4, 4 * 4 * 2 * 8 * 64)
    assert "gradients.replicated_heads" not in step_bytes(plan_of(DENSE, {"tp": 8}))


def test_output_biases_of_experts_are_partial_over_etp() -> None:
    """A bias is added once to a sum that the ranks of etp share, or on each rank's own tokens: either way
    no rank has the whole gradient."""
    biased = {**MOE, "expert_bias": True}
    layout = {"tp": 2, "dp": 2, "ep": 2, "etp": 2}
    assert step_bytes(plan_of(biased, layout))["gradients.expert_biases"] == ("etp", 2, 4 * 4 * 4 * 64)
    assert "gradients.expert_biases" not in step_bytes(plan_of(MOE, layout))


def test_first_and_last_stage_add_up_the_gradients_of_a_tied_table() -> None:
    """Megatron-LM's embedding group; on a V both stand on the first rank, so nothing is sent."""
    tied = {**DENSE, "tie_word_embeddings": True, "num_hidden_layers": 8}
    for schedule, ranks in (("1F1B", {0, 3}), ("Interleaved1F1B", {0, 3}), ("ZBVZeroBubble", set())):
        plan = plan_of(tied, {"pp": 4}, engine="native", schedule=schedule)
        found = {rank for rank in range(4) if "gradients.tied_embedding" in step_bytes(plan, rank)}
        assert found == ranks
    assert step_bytes(plan_of(tied, {"pp": 4, "tp": 2}))["gradients.tied_embedding"][2] == 4 * 512 * 64


def test_balance_losses_add_up_their_counts_over_the_tokens_of_a_sequence() -> None:
    """Megatron-LM `moe/router.py` reduces counts over tp·cp, whose ranks share a sequence; here their summed
    probabilities go along: two FP32 numbers for each expert and sequence, one axis after the other."""
    plan = plan_of({**MOE, "router": {"aux_loss": 1e-2}}, {"tp": 2, "cp": 2}, micro_batch_size=4)
    found = [t for t in comms(lower(plan).stages[0].blocks[1].tasks) if "balance" in t.name]
    assert [(t.axis, t.phase, t.bytes) for t in found] == [
        (axis, "forward", 2 * 4 * 8 * 4) for axis in ("tp", "cp")
    ]


def test_a_correction_bias_needs_the_counts_of_the_whole_batch() -> None:
    """Megatron-LM `finalize_model_grads.py`: tokens per expert and layer, over tp·cp·dp, once per step."""
    model = {**MOE, "first_k_dense_replace": 1, "router": {"type": "sigmoid", "correction_bias": True}}
    found = step_bytes(plan_of(model, {"tp": 2, "cp": 2, "dp": 2}))
    counts = 3 * 8 * 4
    assert found["experts.counts_tp"] == ("tp", 2, counts)
    assert found["experts.counts_dp_cp"] == ("dp_cp", 4, counts)
    assert "experts.counts_tp" not in step_bytes(plan_of(MOE, {"tp": 2}))


# --- recompute ---


def test_full_recompute_keeps_the_input_and_the_choices() -> None:
    block = lower(plan_of(MOE, recompute="full", micro_batch_size=2)).stages[0].blocks[1]
    tokens = 2 * 64
    kept = {name.removeprefix("layers.0."): size for name, (size, _) in block.saved.items()}
    assert kept.pop("in") == tokens * 64 * 2
    assert all(name.endswith((".choices", ".index")) for name in kept)
    assert sum(kept.values()) <= 4 * tokens * 2 * 8


def test_recompute_repeats_forward_and_nothing_else() -> None:
    """Full recompute runs each layer's forward again, communication included; selective only its classes."""
    layout = {"tp": 2, "dp": 2, "ep": 2}
    plain, selective, full = (
        lower(plan_of(MOE, layout, engine="native", recompute=how)).stages[0]
        for how in ("none", "selective", "full")
    )
    forward = [task for task in plain.tasks("forward") if task.name.startswith("layers.")]
    again = list(full.tasks("recompute"))
    assert [(t.name, t.kind) for t in again] == [(t.name, t.kind) for t in forward]
    assert any(isinstance(task, CommTask) for task in again)
    chosen = list(selective.tasks("recompute"))
    assert chosen
    assert {task.name.split(".")[-1] for task in chosen} == {"attention_norm", "mlp_norm", "activation"}
    for other in (selective, full):
        kept = [task for task in other.tasks() if task.phase != "recompute"]
        assert kept == list(plain.tasks())
        assert [b.flops() for b in other.blocks] == [b.flops() for b in plain.blocks]


# --- golden: any change of an op, a collective or a kept tensor shows ---

FINGERPRINTED: dict[str, dict[str, Any]] = {
    "brief": {
        "model": {
            "num_hidden_layers": 16,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "head_dim": 64,
            "num_experts": 64,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 2048,
            "gated": False,
            "vocab_size": 50257,
        },
        "layout": {"tp": 8, "pp": 4, "dp": 16, "ep": 16},
        "batch": 128,
        "length": 1024,
        "precision": "fp16",
        "engine": "native",
    },
    "qwen3-30b-a3b": {
        "model": "qwen3-30b-a3b",
        "layout": {"tp": 4, "cp": 2, "pp": 2, "dp": 4, "ep": 8, "etp": 2},
        "batch": 32,
        "length": 4096,
        "dispatcher": "allgather",
        "recompute": "selective",
    },
    "deepseek-v3": {
        "model": "deepseek-v3",
        "layout": {"tp": 2, "pp": 8, "dp": 32, "ep": 64},
        "batch": 512,
        "length": 4096,
        "dispatcher": "deepep",
    },
}


def fingerprint(block: LoweredBlock) -> list[str]:
    """Every task of a block by phase, and every tensor that it keeps."""
    lines = [f"[{block.name}]"]
    for phase in ("forward", "recompute", "input_gradient", "weight_gradient"):
        lines.append(f"  {phase}")
        for task in block.tasks:
            if task.phase != phase:
                continue
            name = task.name.removeprefix(f"{block.name}.")
            if isinstance(task, ComputeTask):
                sizes = "×".join(map(str, task.sizes))
                lines.append(f"    {name} {task.kind} {sizes} {task.flops} FLOP {task.traffic_bytes} B")
            else:
                lines.append(f"    {name} {task.kind} over {task.axis} of {task.num_ranks} {task.bytes} B")
    lines.append("  kept")
    for name, (size, for_weight) in block.saved.items():
        lines.append(f"    {name.removeprefix(f'{block.name}.')} {size} B{' for W' if for_weight else ''}")
    return lines


def program_text(program: Program) -> str:
    """Each kind of block once, what the stages send, and the step's communication of first and last rank."""
    plan = program.plan
    seen: set[Any] = set()
    lines = [f"{plan.policy.engine} {' '.join(f'{a}{n}' for a, n in plan.layout.degrees().items())}"]
    for stage in program.stages:
        for block in stage.blocks:
            number = block.name.partition(".")[2]
            kind = plan.model.is_moe_layer(int(number)) if number else block.name
            if kind not in seen:
                seen.add(kind)
                lines += fingerprint(block)
    for stage in program.stages:
        lines += [f"[{task.name}] {task.phase} {task.bytes} B" for task in stage.sends if stage.index < 2]
    for rank in (0, plan.layout.pp - 1):
        lines.append(f"[step of pipeline rank {rank}]")
        for task in program.step[rank]:
            lines.append(f"  {task.name} {task.kind} over {task.axis} of {task.num_ranks} {task.bytes} B")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", FINGERPRINTED)
def test_programs_are_as_recorded(name: str, golden: Callable[[str, str], None]) -> None:
    plan = plan_of(**FINGERPRINTED[name])
    assert errors(plan) == []
    golden(f"program_{name}.txt", program_text(lower(plan)))


@pytest.mark.parametrize("name", FINGERPRINTED)
def test_taking_any_node_out_changes_the_fingerprint(name: str) -> None:
    plan = plan_of(**FINGERPRINTED[name])
    degrees = degrees_of(plan.layout, plan.policy.sequence_parallel)
    block = layer_block(plan.model, plan.model.num_hidden_layers - 1, shape_of(plan))
    whole = fingerprint(lower_block(plan, block))
    for position, node in enumerate(block.nodes):
        rest = Block(block.name, (*block.nodes[:position], *block.nodes[position + 1 :]))
        silent = node in block.collectives and degrees[node.axis] == 1  # type: ignore[union-attr]
        assert (fingerprint(lower_block(plan, rest)) == whole) is silent, node.name
