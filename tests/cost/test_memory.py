"""Memory of a rank: the published formulas for activations and model states, and what pipelines hold."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost.memory import (
    STATES,
    RankMemory,
    StateBytes,
    held_params,
    memory,
    rank_memory,
    state_bytes,
    state_parts,
    worst,
)
from meshwright.deployment import deployment_from
from meshwright.ir.parameters import count_parameters
from meshwright.ir.program import LoweredBlock, Program, lower
from meshwright.ir.sharding import local_numel
from meshwright.plan import Plan, resolve
from meshwright.policy import SCHEDULES, SPLIT_BACKWARD, V_SCHEDULES

LINKS = [{"name": "node", "kind": "nvlink", "bandwidth": "450 GB/s", "latency": "3 us"}]
GPT: dict[str, Any] = {  # LayerNorm, GELU, f = 4h, plain attention: the model of arXiv:2205.05198 fig. 2
    "num_hidden_layers": 16,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "vocab_size": 2048,
    "intermediate_size": 1024,
    "gated": False,
    "norm": "layernorm",
}
MOE = {**GPT, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "gated": True}
LENGTH, MICRO = 128, 2
SBH = LENGTH * MICRO * 256
HEADS = LENGTH * MICRO * 8  # a·s·b
TOKENS = LENGTH * MICRO  # s·b


def plan_of(
    model: dict[str, Any],
    layout: dict[str, int] | None = None,
    micro_batches: int = 4,
    precision: str = "bf16",
    optimizer: str = "adamw",
    **policy: Any,
) -> Plan:
    degrees = {"tp": 1, "cp": 1, "pp": 1, "ep": 1, "etp": 1, "dp": 1, **(layout or {})}
    world = prod(degrees[axis] for axis in ("tp", "cp", "dp", "pp"))
    document = {
        "cluster": {"nodes": 1, "gpus_per_node": world, "gpu": "h100-sxm", "links": LINKS},
        "model": model,
        "workload": {
            "global_batch_size": micro_batches * MICRO * degrees["dp"],
            "sequence_length": LENGTH,
            "precision": precision,
            "optimizer": optimizer,
        },
        "layout": degrees,
        "policy": {"engine": "megatron", "micro_batch_size": MICRO, **policy},
    }
    return resolve(deployment_from(document, Path()))


def program_of(*args: Any, **kwargs: Any) -> Program:
    return lower(plan_of(*args, **kwargs))


def layer_of(program: Program) -> LoweredBlock:
    return next(block for block in program.stages[0].blocks if block.name == "layers.0")


def line(rank: RankMemory, *names: str) -> int:
    return sum(rank.line(name) for name in names)


# --- activations of a layer: Korthikanti et al., arXiv:2205.05198 ---
#
# Equation 1: sbh(34 + 5as/h) without parallelism. 34 = 11 for attention (input 2, q and k 4, v 2, output 2,
# dropout mask 1), 19 for the feed-forward network (2 + 8 + 8, mask 1), 4 for two norms' inputs. Without the
# masks: 32. Flash attention keeps no 5as²b but one FP32 number a head and token; the norms' mean and
# 1/deviation, which the paper neglects, are 8 bytes a token each.

DROPOUT_MASKS = 2 * SBH


def test_a_layer_without_parallelism_is_equation_1_without_dropout() -> None:
    statistics = 4 * HEADS + 2 * 8 * TOKENS
    assert layer_of(program_of(GPT)).saved_bytes + DROPOUT_MASKS == 34 * SBH + statistics


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_tensor_parallelism_alone_is_equation_2(tp: int) -> None:
    """sbh(10 + 24/t + 5as/(ht)): norms' inputs, the two gathered inputs and both masks are not divided."""
    program = program_of(GPT, {"tp": tp}, sequence_parallel=False)
    statistics = 4 * HEADS // tp + 2 * 8 * TOKENS
    assert layer_of(program).saved_bytes + DROPOUT_MASKS == (10 + 24 / tp) * SBH + statistics


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_sequence_parallelism_divides_all_of_it_as_equation_4(tp: int) -> None:
    """sbh/t (34 + 5as/h); Megatron keeps its share of the two inputs and gathers them again."""
    whole = 32 * SBH + 4 * HEADS + 2 * 8 * TOKENS
    assert layer_of(program_of(GPT, {"tp": tp})).saved_bytes == whole // tp


@pytest.mark.parametrize("tp", [2, 4])
def test_pytorch_keeps_the_two_gathered_inputs_whole(tp: int) -> None:
    """Autograd keeps what a column-parallel matmul reads: 4sbh whole instead of 4sbh/t."""
    whole = 32 * SBH + 4 * HEADS + 2 * 8 * TOKENS
    kept = layer_of(program_of(GPT, {"tp": tp}, engine="native")).saved_bytes
    assert kept == (whole - 4 * SBH) // tp + 4 * SBH


def test_selective_recompute_is_equation_5() -> None:
    """34sbh/t remain, the attention core's output among them: flash attention had only statistics to drop."""
    program = program_of(GPT, {"tp": 4}, recompute="selective")
    assert layer_of(program).saved_bytes == (32 * SBH + 2 * 8 * TOKENS) // 4
    remade = rank_memory(program, 0).line("recomputed activations")
    assert remade == 4 * HEADS // 4


@pytest.mark.parametrize("tp", [1, 4])
def test_full_recompute_keeps_the_layers_input(tp: int) -> None:
    """§5: 2sbh a layer (here the sequence-parallel share of it); one layer at a time is made again."""
    program = program_of(GPT, {"tp": tp}, recompute="full")
    assert layer_of(program).saved_bytes == 2 * SBH // tp
    whole = (32 * SBH + 4 * HEADS + 2 * 8 * TOKENS) // tp
    assert rank_memory(program, 0).line("recomputed activations") == whole - 2 * SBH // tp


def test_embedding_and_head_are_section_4_3() -> None:
    """4sbh/t (1 + V/h): the final norm's input, the output matmul's, 4sbV logits in FP32; and 8sb of token
    ids, as Megatron-LM `theoretical_memory_usage.py` counts them."""
    program = program_of(GPT, {"tp": 4}, micro_batches=1)
    embedding, *_, head = program.stages[0].blocks
    logits = 4 * TOKENS * 2048
    assert head.saved_bytes == (4 * SBH + logits + 8 * TOKENS) // 4  # the last: the norm's statistics
    assert embedding.saved_bytes == 8 * TOKENS
    assert rank_memory(program, 0).line("logits") == logits // 4


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (2, 2), (4, 2), (4, 4)])
def test_the_first_rank_holds_all_layers_once_or_more_when_interleaved(pp: int, vpp: int) -> None:
    """§4.2.3: L layers on the first rank, however many stages; interleaved 1 + (p − 1)/(pv) times that."""
    program = program_of(GPT, {"pp": pp, "vpp": vpp}, micro_batches=4 * pp)
    layer, embedding = layer_of(program).saved_bytes, 8 * TOKENS
    interleaved = 1 + (pp - 1) / (pp * vpp) if vpp > 1 else 1
    first = rank_memory(program, 0)
    in_flight_embeddings = first.line("activations") - 16 * interleaved * layer
    assert in_flight_embeddings % embedding == 0
    assert 0 < in_flight_embeddings <= first.num_in_flight * embedding


# --- model states ---


def states(plan: Plan, rank: int = 0) -> tuple[int, int, int]:
    params = held_params(lower(plan).stages_of(rank))
    totals = state_bytes(plan, params)
    return totals["weights"], totals["gradients"], totals["optimizer states"]


def test_megatron_keeps_18_bytes_a_parameter_and_6_plus_12_over_dp_with_its_distributed_optimizer() -> None:
    """Megatron-LM `training/theoretical_memory_usage.py`: num_bytes_per_parameter."""
    for dp in (2, 4):
        for tp, pp in ((1, 1), (2, 2)):
            layout = {"dp": dp, "tp": tp, "pp": pp}
            whole, divided = (plan_of(GPT, layout, zero_stage=stage) for stage in (0, 1))
            held = sum(local_numel(p, whole.layout) for p in held_params(lower(whole).stages_of(0)).values())
            assert sum(states(whole)) == 18 * held
            assert sum(states(divided)) == held * (6 + 12 / dp)


def test_megatron_divides_experts_over_their_own_replicas() -> None:
    """6 + 12/(dp·cp) for dense parameters, 6 + 12/edp for routed experts, edp = world / (etp·ep·pp)."""
    plan = plan_of(MOE, {"dp": 8, "ep": 4, "tp": 2, "etp": 2}, zero_stage=1)
    assert (plan.layout.size("dp_cp"), plan.layout.edp) == (8, 2)
    held = {False: 0, True: 0}
    for param in held_params(lower(plan).stages_of(0)).values():
        held[param.is_expert] += local_numel(param, plan.layout)
    assert held[True] == count_parameters(plan.model).by_part["experts"] // (4 * 2)
    assert sum(states(plan)) == held[False] * (6 + 12 / 8) + held[True] * (6 + 12 / 2)


@pytest.mark.parametrize(
    ("stage", "giga_bytes"),
    [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)],  # arXiv:1910.02054 fig. 1: Ψ = 7.5 B, K = 12, 64 ranks
)
def test_zero_stages_divide_as_the_papers_table(stage: int, giga_bytes: float) -> None:
    """§3.1 and §5: (2 + 2 + K)Ψ; 4Ψ + KΨ/N; 2Ψ + (2 + K)Ψ/N; (4 + K)Ψ/N."""
    ranks = 64
    plan = plan_of(GPT, {"dp": ranks}, micro_batches=1, engine="deepspeed", zero_stage=stage)
    size = count_parameters(plan.model).total
    expected = {0: 16, 1: 4 + 12 / ranks, 2: 2 + 14 / ranks, 3: 16 / ranks}[stage]
    assert sum(states(plan)) == size * expected
    assert round(7.5 * expected, 1) == giga_bytes


@pytest.mark.parametrize(("engine", "more"), [("native", 4), ("torchtitan", 1), ("deepspeed", 1)])
def test_gradients_that_add_up_before_one_reduction_are_whole_until_then(engine: str, more: int) -> None:
    """FSDP2 left as it is, and DeepSpeed's ZeRO-2 (#2252), reduce in every backward and keep their share."""
    for stage in (2, 3):
        policy = {"engine": engine, "zero_stage": stage}
        one, several = (states(plan_of(GPT, {"dp": 4}, micro_batches=m, **policy)) for m in (1, 4))
        assert several[1] == more * one[1]
        assert (several[0], several[2]) == (one[0], one[2])


@pytest.mark.parametrize("engine", ["native", "torchtitan"])
def test_a_pipeline_keeps_whole_gradients_even_of_one_micro_batch(engine: str) -> None:
    """torch.distributed.pipelining reduces after the last backward, never during one."""
    for count in (1, 4):
        plan = plan_of(
            GPT, {"dp": 4, "pp": 2}, micro_batches=count, engine=engine, zero_stage=2, schedule="GPipe"
        )
        held = sum(p.numel for p in held_params(lower(plan).stages_of(0)).values())
        assert states(plan)[1] == 4 * held


def test_only_what_zero_divides_counts_as_divided() -> None:
    """torchtitan under stage 2: an FP32 share and the gathered bf16 copy; all else is a share."""
    plan = plan_of(GPT, {"dp": 4}, micro_batches=1, engine="torchtitan", zero_stage=2)
    size = count_parameters(plan.model).total
    parts = state_parts(plan, held_params(lower(plan).stages_of(0)))
    assert parts["weights"] == StateBytes(whole=2 * size, divided=size)
    assert parts["gradients"] == StateBytes(divided=size)
    assert parts["optimizer states"] == StateBytes(divided=2 * size)


def test_fsdp2_keeps_masters_in_the_sharded_parameters() -> None:
    """torchtitan: FP32 shards, and under stage 2 the gathered copy in bf16 between forward and backward."""
    size = count_parameters(plan_of(GPT).model).total
    for stage, weights in ((2, size + 2 * size), (3, size)):  # 4 bytes over 4 ranks; 2 bytes whole
        plan = plan_of(GPT, {"dp": 4}, micro_batches=1, engine="torchtitan", zero_stage=stage)
        assert states(plan) == (weights, size, 2 * size)


@pytest.mark.parametrize(
    ("precision", "optimizer", "per_parameter"),
    [
        ("fp32", "adamw", (4, 4, 8)),
        ("bf16", "adamw", (2, 4, 12)),
        ("fp32", "sgd", (4, 4, 0)),
        ("bf16", "sgd", (2, 4, 4)),
    ],
)
def test_number_type_and_optimizer_decide_the_states(
    precision: str, optimizer: str, per_parameter: tuple[int, int, int]
) -> None:
    """AdamW: two FP32 moments; mixed precision: an FP32 master (arXiv:1910.02054 §3.1)."""
    plan = plan_of(GPT, precision=precision, optimizer=optimizer, engine="native", zero_stage=0)
    size = count_parameters(plan.model).total
    assert states(plan) == tuple(n * size for n in per_parameter)


def test_a_tied_table_counts_on_both_ends_and_once_on_a_v() -> None:
    tied = {**GPT, "tie_word_embeddings": True}
    for schedule, ends in (("1F1B", (0, 3)), ("ZBVZeroBubble", (0, 0))):
        plan = plan_of(tied, {"pp": 4}, micro_batches=8, engine="native", schedule=schedule)
        program = lower(plan)
        holders = [r for r in range(4) if "embedding.weight" in held_params(program.stages_of(r))]
        assert holders == sorted(set(ends))
        table = 2048 * 256
        middle, first = (sum(p.numel for p in held_params(program.stages_of(r)).values()) for r in (1, 0))
        assert first - middle == table + (2 * 256 if schedule == "ZBVZeroBubble" else 0)  # a V: the last norm


# --- what pipelines hold ---


@pytest.mark.parametrize("micro_batches", [4, 5, 9])
def test_1f1b_holds_as_many_micro_batches_as_stages_follow(micro_batches: int) -> None:
    """arXiv:2104.04473 §2.2: min(m, p − r) in flight on rank r; GPipe holds all m."""
    by_schedule = {"1F1B": [min(micro_batches, 4 - r) for r in range(4)], "GPipe": [micro_batches] * 4}
    for schedule, held in by_schedule.items():
        program = program_of(GPT, {"pp": 4}, micro_batches, engine="native", schedule=schedule)
        layer = layer_of(program).saved_bytes
        for rank, number in zip(memory(program), held, strict=True):
            assert rank.num_in_flight == number
            beside = {0: 8 * TOKENS, 3: 4 * SBH + 8 * TOKENS}.get(rank.pp_rank, 0)
            assert rank.line("activations") == number * (4 * layer + beside)
            assert (rank.line("logits") > 0) == (rank.pp_rank == 3)


def test_a_v_peaks_where_1f1b_does_on_every_rank_alike() -> None:
    """arXiv:2401.10241 §6: ZB-V peaks where 1F1B does, at p stages' worth, but on every rank. DualPipe keeps
    one chunk more than it has stages (arXiv:2412.19437 Table 2: PP + 1), and DualPipeV has 2p of them."""
    layers = {}
    for schedule in ("1F1B", "ZBVZeroBubble", "DualPipeV"):
        program = program_of(GPT, {"pp": 4}, 16, engine="torchtitan", zero_stage=2, schedule=schedule)
        layer = layer_of(program).saved_bytes
        layers[schedule] = [round(rank.line("activations") / layer, 1) for rank in memory(program)[1:3]]
    assert layers["1F1B"] == [12, 8]
    assert layers["ZBVZeroBubble"] == [16, 16]
    assert layers["DualPipeV"] == [18, 18]  # 2·4 + 1 chunks of two layers


def test_zero_bubble_holds_inputs_and_output_gradients_until_the_weight_gradient() -> None:
    """arXiv:2401.10241 §2: W needs each matmul's input and the gradient of its output, nothing else."""
    policy = {"zero_stage": 2, "schedule": "InterleavedZeroBubble"}
    program = program_of(GPT, {"pp": 4}, 16, engine="torchtitan", **policy)
    layer = layer_of(program)
    inputs = (2 + 2 + 2 + 8) * SBH  # of q, k, v; o; up; down
    outputs = (3 + 1 + 4 + 1) * 2 * SBH
    assert layer.deferred_bytes == inputs + outputs
    waiting = [rank.line("deferred weight gradients") for rank in memory(program)]
    assert waiting == sorted(waiting)
    assert waiting[0] == 0
    assert waiting[3] >= 3 * 2 * layer.deferred_bytes  # rank r runs its weight gradients r steps late


def test_an_engine_that_retains_the_graph_keeps_all_until_the_weight_gradient() -> None:
    """As torch.distributed.pipelining splits backward: what forward kept, and the outputs' gradients."""
    program = program_of(GPT, {"pp": 4}, 16, engine="native", schedule="InterleavedZeroBubble")
    layer = layer_of(program)
    waiting = [rank.line("deferred weight gradients") for rank in memory(program)]
    assert waiting[2] % (layer.saved_bytes + layer.output_gradient_bytes) == 0
    assert waiting[2] > 0


def test_a_reduced_share_has_a_buffer_of_its_own_where_the_engine_says_so() -> None:
    whole = memory(program_of(GPT, {"dp": 4}, engine="native", zero_stage=0))[0]
    divided = memory(program_of(GPT, {"dp": 4}, engine="native"))[0]
    assert whole.line("gradient shares") == 0
    assert divided.line("gradient shares") == -(-divided.line("gradients") // 4)


def test_receive_buffers_of_all_micro_batches_stand_from_the_first() -> None:
    few, many = (
        memory(program_of(GPT, {"pp": 2}, count, engine="native", schedule="1F1B"))[1] for count in (4, 16)
    )
    assert many.line("pipeline buffers") == 4 * few.line("pipeline buffers") > 0


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    pp=st.sampled_from([1, 2, 4]),
    micro_batches=st.integers(8, 12),
    model=st.sampled_from([GPT, MOE, {**MOE, "num_hidden_layers": 19, "n_shared_experts": 1}]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    zero_stage=st.sampled_from([0, 1, 2, 3]),
)
def test_lines_are_named_once_positive_and_add_up(
    schedule: str, pp: int, micro_batches: int, model: dict[str, Any], recompute: str, zero_stage: int
) -> None:
    micro_batches = micro_batches // pp * pp
    layout = {"pp": pp, "dp": 2, "tp": 2, "ep": 2 if "num_experts" in model else 1}
    policy = {"schedule": schedule, "recompute": recompute, "zero_stage": zero_stage}
    program = program_of(model, layout, micro_batches, engine="native", **policy)
    ranks = memory(program)
    assert [rank.pp_rank for rank in ranks] == list(range(pp))
    for rank in ranks:
        names = [part.name for part in rank.lines]
        assert len(set(names)) == len(names)
        assert all(part.bytes > 0 and part.why for part in rank.lines)
        assert rank.total_bytes == sum(part.bytes for part in rank.lines)
        assert rank.stages == tuple(s.index for s in program.stages if s.rank == rank.pp_rank)
        known = {*STATES, "activations", "logits", "deferred weight gradients"}
        known |= {"gradient shares"} | ({"gathered parameters", "pipeline buffers"} if pp > 1 else set())
        assert {part.name for part in rank.lines if not part.assumed} <= known
        assert all(part.assumed == ("assumed:" in part.why) for part in rank.lines)
        if rank.line("logits"):  # a split backward may peak when the logits are gone
            assert rank.pp_rank == (0 if schedule in V_SCHEDULES else pp - 1)
    assert worst(ranks).total_bytes == max(rank.total_bytes for rank in ranks)


@settings(max_examples=30, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    engine=st.sampled_from(["native", "deepspeed"]),
    pp=st.sampled_from([1, 2]),
)
def test_more_zero_and_more_recompute_never_need_more(schedule: str, engine: str, pp: int) -> None:
    layout = {"pp": pp, "dp": 8}
    kept, held = [], []
    for stage in (0, 1, 2, 3):
        program = program_of(GPT, layout, 8, engine=engine, schedule=schedule, zero_stage=stage)
        held.append([line(r, "weights", "gradients", "optimizer states") for r in memory(program)])
    for recompute in ("none", "selective", "full"):
        program = program_of(GPT, layout, 8, engine=engine, schedule=schedule, recompute=recompute)
        names = ("activations", "recomputed activations", "deferred weight gradients")
        kept.append([line(rank, *names) for rank in memory(program)])
    retains = engine == "native" and schedule in SPLIT_BACKWARD  # what is run again waits for W, too
    for costs in (held,) if retains else (held, kept):
        for more, less in pairwise(costs):
            assert all(a >= b for a, b in zip(more, less, strict=True))
    assert held[0] > held[1] > held[3]
    assert kept[0] > kept[2]


def test_uneven_stages_weigh_what_they_hold() -> None:
    program = program_of({**GPT, "num_hidden_layers": 9}, {"pp": 3}, 6, layers_per_stage=(1, 6, 2))
    layer = layer_of(program).saved_bytes
    ranks = memory(program)
    assert [rank.line("activations") // layer for rank in ranks] == [3 * 1, 2 * 6, 2]
    assert worst(ranks).pp_rank == 1
    per_layer = sum(p.numel for p in held_params(program.stages_of(1)).values()) // 6
    assert ranks[1].line("weights") == 2 * 6 * per_layer


def test_experts_that_are_divided_weigh_less_and_what_they_exchange_is_counted() -> None:
    alone = program_of(MOE, {"dp": 4}, engine="megatron")
    divided = program_of(MOE, {"dp": 4, "ep": 4}, engine="megatron")
    experts = count_parameters(alone.plan.model).by_part["experts"]
    saved = memory(alone)[0].line("weights") - memory(divided)[0].line("weights")
    assert saved == 2 * experts * 3 // 4
    assert memory(alone)[0].line("expert dispatch buffers") == 0
    assert memory(divided)[0].line("expert dispatch buffers") == 2 * TOKENS * 2 * 256 * 2


def test_stage_3_gathers_the_largest_block_twice() -> None:
    """The block at work and the one that is prefetched (PyTorch FSDP2)."""
    program = program_of(MOE, {"dp": 4}, engine="native", zero_stage=3)
    rank = memory(program)[0]
    layer = sum(p.numel for p in program.stages[0].params if p.name.startswith("layers.0."))
    assert rank.line("gathered parameters") == 2 * 2 * layer
    assert rank.line("gradient bucket") == 4 * layer
    unsharded = memory(program_of(MOE, {"dp": 4}, engine="native"))[0]
    assert line(unsharded, "gathered parameters", "gradient bucket") == 0


@pytest.mark.parametrize("engine", ["native", "torchtitan"])
def test_stage_3_under_a_pipeline_keeps_what_a_backward_gathered(engine: str) -> None:
    """The shares, FP32 masters under FSDP2, and the whole copy in the compute type until the stage's next
    forward."""
    plan = plan_of(GPT, {"dp": 4, "pp": 2}, 8, engine=engine, zero_stage=3)
    program = lower(plan)
    for rank in memory(program):
        held = sum(p.numel for p in held_params(program.stages_of(rank.pp_rank)).values())
        assert rank.line("weights") == 4 * held // 4
        assert rank.line("gathered parameters") == 2 * held
        why = next(part.why for part in rank.lines if part.name == "gathered parameters")
        assert "backward" in why


def test_stage_3_with_many_chunks_keeps_the_three_that_pytorch_keeps_active() -> None:
    program = program_of(GPT, {"dp": 2, "pp": 2, "vpp": 4}, 8, engine="native", zero_stage=3)
    stages = program.stages_of(1)
    sizes = sorted(sum(p.numel for p in stage.params) for stage in stages)
    assert memory(program)[1].line("gathered parameters") == 2 * sum(sizes[1:])


def test_a_pipeline_has_nothing_to_gather_on_one_replica() -> None:
    program = program_of(GPT, {"pp": 2}, 8, engine="native", zero_stage=3)
    assert [rank.line("gathered parameters") for rank in memory(program)] == [0, 0]


def test_one_micro_batch_is_singular() -> None:
    program = program_of(GPT, {"pp": 2}, 8)
    whys = [part.why for rank in memory(program) for part in rank.lines if part.name == "activations"]
    assert [why.split(" in flight")[0] for why in whys] == ["2 micro-batches", "1 micro-batch"]


def test_neighbours_in_the_pipeline_need_buffers() -> None:
    """One b·s·h to send and one to receive for each neighbour: a middle stage has two."""
    ranks = memory(program_of(GPT, {"pp": 4}, 8))
    assert [rank.line("pipeline buffers") // (2 * SBH) for rank in ranks] == [2, 4, 4, 2]


# --- on top of what is held ---


def peak_and_held(function: Any) -> tuple[int, int]:
    """Most bytes of new storages alive while a function runs, and those alive when it returns."""
    import weakref

    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    alive: dict[int, int] = {}
    peak = 0

    class Storages(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            tree_map_only(Tensor, note, result)
            return result

    def note(tensor: Any) -> None:
        nonlocal peak
        storage = tensor.untyped_storage()
        if storage._cdata not in alive:
            alive[storage._cdata] = storage.nbytes()
            peak = max(peak, sum(alive.values()))
            weakref.finalize(storage, alive.pop, storage._cdata, None)

    with Storages():
        kept = function()
        held = sum(alive.values())
    del kept
    return peak, held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_peaks_in_backward_at_three_fp32_tensors_of_the_logits_shape(dtype: str) -> None:
    """F.cross_entropy in FP32, measured: forward leaves its log-probabilities, backward adds their gradient
    and that of the logits. (Megatron's works in place, so there the line errs high.)"""
    torch = pytest.importorskip("torch")
    logits = torch.randn(64, 1000).to(getattr(torch, dtype)).requires_grad_()
    labels, unit = torch.zeros(64, dtype=torch.long), 64 * 1000

    def forward() -> Any:
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    _, held = peak_and_held(forward)
    peak, _ = peak_and_held(lambda: forward().backward())
    assert held == pytest.approx(4 * unit, rel=0.001)
    assert peak == pytest.approx(12 * unit, rel=0.001)
    program = program_of({**GPT, "vocab_size": 50304}, micro_batches=1, engine="native")
    rank = rank_memory(program, 0)
    assert rank.line("logits") == 4 * TOKENS * 50304
    assert rank.line("activation gradients") == 8 * TOKENS * 50304
